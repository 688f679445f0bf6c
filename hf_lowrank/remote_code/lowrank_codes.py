"""Whole numbers in as few bytes as their entropy, and the steps of the grid they count: how rounded weights are kept.

A rounded weight (O, I) is `W[i, j] = rows[i] * codes[i, j] * columns[j]`: whole numbers times a step of the row and a
step of the column. In bytes, with everything little-endian:

    5 x uint32     lengths, in bytes, of what follows; of the fourth the number of bits
    side           zlib of: the largest step (float32); of each row its step, then its class (uint8 each); of each
                   column the same; of each lane the number of its words (uint16)
    exceptions     zlib of: places (uint32), then codes (int32), of those that their class cannot hold
    states         of each lane (uint32)
    low bits       one bit plane after the other
    words          of one lane after the other (uint16)

A step is `largest * 2**(-u / 16)`. The class of a code is the sum of its row's and its column's, less 64, within 0
and 120: the code is a draw of `p(z) ~ q**(z**2)`, the discrete normal distribution, whose variance is `2**(class/2 -
9)`. From class 31 on, where the low bits of a code tell nothing of each other, those are kept as they are and the
rest has a lower class. What is left is coded by range asymmetric numeral systems (Duda, arXiv 1311.2540) with
frequencies out of 4096, in lanes that are decoded side by side: code `n` is the one number `n // L` of lane `n % L`,
of `L = ceil(O I / 2048)`.

All tables are made of whole numbers by whole numbers, so that every machine finds the same.
"""

import struct
import zlib
from collections.abc import Iterator, Sequence
from functools import cache

import torch

from .lowrank_plan import PlanError

LANE = 2048
PRECISION = 12
LOWEST_STATE = 1 << 16
NUM_CLASSES = 31
STEPS_PER_OCTAVE = 16
CLASS_OFFSET = 64
LARGEST_CLASS = 120
CENTER = 64
# Codes that are decoded side by side: several numbers of 8 bytes each.
_AT_ONCE = 1 << 25
# `q` of each class, times 2**24.
_BASES = (
    16416, 23234, 32896, 46598, 66052, 93717, 133152, 189551, 270595, 387849, 559153, 812948, 1196450, 1791222,
    2736788, 4211295, 6184384, 8272603, 10175896, 11780768, 13066108, 14058751, 14805841, 15357952, 15760735,
    16051906, 16261035, 16410554, 16517109, 16592872, 16646654,
)  # fmt: skip


@cache
def frequencies(index: int) -> list[int]:
    """How often each code from -64 to 63 occurs in 4096 draws of a class; 0 for one that the class cannot hold."""
    shift, factor = 48, _BASES[index] << 24
    square, weight, weights = factor * factor >> shift, 1 << shift, [1 << shift]
    for _ in range(CENTER - 1):
        weight, factor = weight * factor >> shift, factor * square >> shift
        weights.append(weight)
    total = 2 * sum(weights) - weights[0]
    held = [weight for weight in weights if weight << 15 > total]
    half = [max(1, (weight << PRECISION) // total) for weight in held[1:]]
    counts = [0] * (2 * CENTER)
    counts[CENTER] = (1 << PRECISION) - 2 * sum(half)
    for distance, count in enumerate(half, start=1):
        counts[CENTER + distance] = counts[CENTER - distance] = count
    return counts


@cache
def _slots() -> torch.Tensor:
    """For each class and remainder its code, frequency - 1 and place within it, in one number, (31 * 4096), int32."""
    every = []
    for index in range(NUM_CLASSES):
        counts = torch.tensor(frequencies(index))
        codes = torch.arange(len(counts)).repeat_interleave(counts)
        starts = (counts.cumsum(0) - counts)[codes]
        every.append(codes | (counts[codes] - 1) << 7 | (torch.arange(1 << PRECISION) - starts) << 19)
    return torch.cat(every).int()


def split_classes(classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The class of what is coded, and how many low bits are kept as they are, of classes from 0 on."""
    low_bits = (classes - (NUM_CLASSES - 4)).clamp_min(0) >> 2
    return classes - 4 * low_bits, low_bits


def steps_of(u: torch.Tensor) -> torch.Tensor:
    """Steps as parts of the largest one, float32."""
    return torch.exp2(-u.double() / STEPS_PER_OCTAVE).float()


def lanes_of(num_codes: int) -> int:
    """Lanes that so many codes are coded in."""
    return -(-num_codes // LANE)


def in_lanes(values: torch.Tensor) -> torch.Tensor:
    """Values (N) filled up with 0 to whole lanes, (N / L, L)."""
    num_lanes = lanes_of(len(values))
    return torch.cat([values, values.new_zeros(-len(values) % num_lanes)]).view(-1, num_lanes)


class Grid:
    """A rounded weight as whole numbers and steps.

    Shapes:
        codes    (O, I), int16 or int32
        rows     (O), float32
        columns  (I), float32
    """

    def __init__(self, codes: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> None:
        self.codes = codes
        self.rows = rows
        self.columns = columns

    def to(self, device: torch.device) -> "Grid":
        """The same on another device."""
        return Grid(self.codes.to(device), self.rows.to(device), self.columns.to(device))

    def weight(self) -> torch.Tensor:
        """The weight itself, (O, I), float32."""
        return self.codes * self.columns * self.rows[:, None]


class _Reader:
    """The sections of one weight's bytes."""

    def __init__(self, packed: torch.Tensor, rows: int, columns: int) -> None:
        content = packed.cpu().numpy().tobytes()
        self.shape = (rows, columns)
        self.num_lanes = lanes_of(rows * columns)
        lengths = struct.unpack_from("<5I", content)
        parts, start = [], 20
        for length in (lengths[0], lengths[1], lengths[2], -(-lengths[3] // 8), lengths[4]):
            parts.append(content[start : start + length])
            start += length
        side, exceptions = (zlib.decompress(part) for part in parts[:2])
        expected = 4 + 2 * (rows + columns) + 2 * self.num_lanes
        if start != len(content) or len(side) != expected or len(parts[2]) != 4 * self.num_lanes:
            raise ValueError("of another shape")
        self.largest = struct.unpack_from("<f", side)[0]
        bytes_of = torch.frombuffer(bytearray(side[4:]), dtype=torch.uint8).long()
        self.row_steps, self.row_classes, self.column_steps, self.column_classes, counts = bytes_of.split(
            [rows, rows, columns, columns, 2 * self.num_lanes]
        )
        self.num_words = counts[::2] + 256 * counts[1::2]
        self.exceptions = _numbers(exceptions, torch.int32).long().view(2, -1)
        self.states = _numbers(parts[2], torch.int32).long() & 0xFFFFFFFF
        self.low_bits = _numbers(parts[3], torch.uint8)
        self.words = _numbers(parts[4], torch.int16).long() & 0xFFFF
        if len(self.words) != int(self.num_words.sum()):
            raise ValueError("cut short")

    def classes(self) -> torch.Tensor:
        """Of every code in order, filled up to whole lanes, (N / L, L)."""
        rows, columns = self.row_classes.short(), self.column_classes.short() - CLASS_OFFSET
        return in_lanes((rows[:, None] + columns).clamp_(0, LARGEST_CLASS).flatten())

    def grid(self, high: torch.Tensor, classes: torch.Tensor) -> Grid:
        """The weight whose codes have that high part, (N / L, L)."""
        rows, columns = self.shape
        codes, low = (part.flatten()[: rows * columns].int() for part in (high, split_classes(classes)[1]))
        start, wide = 0, bool(low.any())
        if wide:
            codes = (codes << low) - ((1 << low) >> 1)
        for plane in range(int(low.max()) if wide else 0):
            here = (low > plane).nonzero()[:, 0]
            codes[here] += self._bits(start, len(here)) << plane
            start += len(here)
        places, values = self.exceptions
        codes[places & 0xFFFFFFFF] = values.int()
        row_steps, column_steps = steps_of(self.row_steps), steps_of(self.column_steps)
        fits = int(codes.abs().max()) < 1 << 15
        return Grid((codes.short() if fits else codes).view(rows, columns), self.largest * row_steps, column_steps)

    def _bits(self, start: int, count: int) -> torch.Tensor:
        places = torch.arange(start, start + count)
        return (self.low_bits[places // 8] >> (places % 8)).int() & 1


def _numbers(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)


def unpack(packed: Sequence[tuple[torch.Tensor, tuple[int, int]]]) -> Iterator[Grid]:
    """The grids of weights in bytes, each with its shape (O, I), decoded side by side.

    Raises:
        PlanError: If the bytes are not those of such a weight.
    """
    start, held = 0, 0
    for stop, (_, (rows, columns)) in enumerate(packed, start=1):
        held += rows * columns
        if held > _AT_ONCE or stop == len(packed):
            yield from _unpacked(packed[start:stop])
            start, held = stop, 0


def _unpacked(packed: Sequence[tuple[torch.Tensor, tuple[int, int]]]) -> list[Grid]:
    try:
        readers = [_Reader(content, *shape) for content, shape in packed]
        classes = [reader.classes() for reader in readers]
        high = _decoded(readers, classes)
        return [reader.grid(part, own) for reader, part, own in zip(readers, high, classes, strict=True)]
    except (ValueError, IndexError, RuntimeError, struct.error, zlib.error) as error:
        raise PlanError(f"Rounded weights cannot be read ({error}). Get the whole folder again.") from error


def _decoded(readers: Sequence[_Reader], classes: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The high parts of all codes, (N / L, L) each."""
    order = sorted(range(len(readers)), key=lambda index: -len(classes[index]))  # lanes that end first come last
    longest = max(len(own) for own in classes)
    filled = [torch.nn.functional.pad(classes[index], (0, 0, 0, longest - len(classes[index]))) for index in order]
    tables = split_classes(torch.cat(filled, dim=1))[0].int() << PRECISION  # (longest, lanes)
    lengths = torch.tensor([len(classes[index]) for index in order for _ in range(readers[index].num_lanes)])
    active = (lengths[:, None] > torch.arange(longest)).sum(0).tolist()
    state = torch.cat([readers[index].states for index in order])
    words = torch.cat([*(readers[index].words for index in order), torch.zeros(1, dtype=torch.long)])
    counts = torch.cat([readers[index].num_words for index in order])
    place, slots, mask = counts.cumsum(0) - counts, _slots(), (1 << PRECISION) - 1
    found = torch.empty(tables.shape, dtype=torch.int8)
    for step, (table, count) in enumerate(zip(tables, active, strict=True)):
        now, at = state[:count], place[:count]
        entry = slots[table[:count] + (now & mask)]
        found[step, :count] = (entry & 127) - CENTER
        now = ((entry >> 7 & mask) + 1) * (now >> PRECISION) + (entry >> 19)
        short = now < LOWEST_STATE
        state[:count] = torch.where(short, now << 16 | words[at], now)
        at += short
    if not bool((state == LOWEST_STATE).all()):
        raise ValueError("damaged")
    widths = [readers[index].num_lanes for index in order]
    parts = dict(zip(order, found.split(widths, dim=1), strict=True))
    return [parts[index][: len(classes[index])] for index in range(len(readers))]
