"""Grids to bytes: the classes that codes are draws of, and the coder. `lowrank_codes` says what the bytes are."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch.nn import functional as F

from hf_lowrank.remote_code.lowrank_codes import (
    CENTER,
    CLASS_OFFSET,
    LARGEST_CLASS,
    LOWEST_STATE,
    NUM_CLASSES,
    PRECISION,
    frequencies,
    in_lanes,
    lanes_of,
    split_classes,
)

# Variance of what is never seen: a code that is always 0 costs next to nothing, and may still occur.
_LEAST_VARIANCE = 2.0**-9
_ROUNDS = 4
# Codes that are coded side by side: several numbers of 8 bytes each.
_AT_ONCE = 1 << 25


@cache
def _tables() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each class the frequency of every code, those before it, (31, 128) each, and the largest code, (31)."""
    counts = torch.tensor([frequencies(index) for index in range(NUM_CLASSES)])
    return counts, counts.cumsum(1) - counts, (counts > 0).sum(1) // 2


def fitted_classes(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes of rows and columns, (O) and (I), such that variances are products of one of each.

    `a_i = mean_j z_ij^2 / b_j` and `b_j = mean_i z_ij^2 / a_i` in turn: the likeliest for normal codes, and blind to
    a column whose codes are all large.
    """
    squares = codes.float().square() + _LEAST_VARIANCE
    columns = squares.mean(0)
    for _ in range(_ROUNDS):
        rows = (squares / columns).mean(1)
        columns = (squares / rows[:, None]).mean(0)
    row_classes = 2 * (rows.log2() - rows.log2().min())
    column_classes = 2 * (columns.log2() + rows.log2().min() + 9) + CLASS_OFFSET
    limit = LARGEST_CLASS + CLASS_OFFSET
    return row_classes.round().clamp(0, limit).long(), column_classes.round().clamp(0, limit).long()


def _all_classes(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = fitted_classes(codes)
    return rows, columns, (rows[:, None] + columns - CLASS_OFFSET).clamp(0, LARGEST_CLASS)


def coded_bits(codes: torch.Tensor, num_rows: int | None = None) -> float:
    """About how many bits the bytes of (O, I) codes will have, side and all.

    Args:
        num_rows: How many there are of what these rows are a sample of.
    """
    rows, columns, classes = _all_classes(codes)
    high, low_bits, index, exceptional = _parts(codes, classes)
    counts, _, _ = _tables()
    bits = (PRECISION - counts.float().log2()[index, high + CENTER]).sum(dtype=torch.float64) + low_bits.sum()
    share = 1.0 if num_rows is None else num_rows / len(rows)
    num_codes = round(share * codes.numel())
    side = 8 * 1.4 * (share * len(rows) + len(columns)) + 48 * lanes_of(num_codes) + 600
    return share * float(bits + 40 * exceptional.sum()) + side


def _parts(
    codes: torch.Tensor, classes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The high part that is coded, the number of low bits, the class of the high part, and what that cannot hold."""
    index, low_bits = split_classes(classes)
    high = (codes + ((1 << low_bits) >> 1)) >> low_bits
    largest = _tables()[2][index]
    return high.clamp(-largest, largest), low_bits, index, high.abs() > largest


@dataclass(frozen=True)
class Steps:
    """The steps of a grid: rows `largest * 2**(-u / 16)` for `u` in `rows`, (O), and columns the same of 1, (I)."""

    largest: float
    rows: torch.Tensor
    columns: torch.Tensor


def pack(grids: Sequence[tuple[torch.Tensor, Steps]]) -> list[torch.Tensor]:
    """The bytes of grids, uint8, each of codes (O, I) and its steps; coded side by side."""
    found: list[torch.Tensor] = []
    batch: list[tuple[torch.Tensor, Steps]] = []
    for index, grid in enumerate(grids, start=1):
        batch.append(grid)
        if index == len(grids) or sum(codes.numel() for codes, _ in batch) > _AT_ONCE:
            found += _packed(batch)
            batch = []
    return found


def _packed(grids: Sequence[tuple[torch.Tensor, Steps]]) -> list[torch.Tensor]:
    fitted = [_all_classes(codes) for codes, _ in grids]
    parts = [_parts(codes, classes) for (codes, _), (_, _, classes) in zip(grids, fitted, strict=True)]
    coded = _coded([high.flatten() for high, _, _, _ in parts], [index.flatten() for _, _, index, _ in parts])
    found = []
    for (codes, steps), (rows, columns, _), (_, low_bits, _, exceptional), (words, num_words, states) in zip(
        grids, fitted, parts, coded, strict=True
    ):
        planes = [
            ((codes + ((1 << low_bits) >> 1)) >> plane & 1)[low_bits > plane] for plane in range(int(low_bits.max()))
        ]
        places = exceptional.flatten().nonzero()[:, 0]
        bits = torch.cat(planes) if planes else torch.empty(0, dtype=torch.long)
        counts = torch.stack([num_words % 256, num_words // 256], dim=1)
        side = b"".join(
            part.to(torch.uint8).numpy().tobytes() for part in (steps.rows, rows, steps.columns, columns, counts)
        )
        sections = [
            zlib.compress(struct.pack("<f", steps.largest) + side, 9),
            zlib.compress(_bytes(torch.stack([places, codes.flatten()[places]]), torch.int32), 9),
            _bytes(states, torch.int32),
            _as_bytes(bits),
            _bytes(words, torch.int16),
        ]
        lengths = [len(section) for section in sections]
        lengths[3] = len(bits)
        content = struct.pack("<5I", *lengths) + b"".join(sections)
        found.append(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return found


def _bytes(values: torch.Tensor, dtype: torch.dtype) -> bytes:
    # Unsigned ones keep their bits: torch wraps around.
    return bytes(values.to(dtype).contiguous().numpy().astype("<i2" if dtype == torch.int16 else "<i4").tobytes())


def _as_bytes(bits: torch.Tensor) -> bytes:
    padded = torch.cat([bits, bits.new_zeros(-len(bits) % 8)]).view(-1, 8)
    return bytes((padded << torch.arange(8)).sum(1).to(torch.uint8).numpy().tobytes())


def _coded(
    high: Sequence[torch.Tensor], index: Sequence[torch.Tensor]
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each weight the words of one lane after the other, how many each lane has, and their last states.

    Args:
        high: What is coded of each.
        index: The classes of that.
    """
    order = sorted(range(len(high)), key=lambda one: -in_lanes(high[one]).shape[0])  # lanes that end first come last
    codes, kinds = ([in_lanes(values[one]) for one in order] for values in (high, index))
    longest = len(codes[0])
    now, kind = (
        torch.cat([F.pad(one, (0, 0, 0, longest - len(one))) for one in part], dim=1) for part in (codes, kinds)
    )
    counts, starts, _ = _tables()
    state = torch.full((now.shape[1],), LOWEST_STATE)
    written, lanes = torch.zeros_like(state), torch.arange(len(state))
    words = torch.zeros(len(state), longest, dtype=torch.int32)
    lengths = torch.tensor([len(one) for one in codes for _ in range(one.shape[1])])
    actives = (lengths[:, None] > torch.arange(longest)).sum(0).tolist()
    for step, active in reversed(list(enumerate(actives))):
        old, code, own = state[:active], now[step, :active] + CENTER, kind[step, :active]
        count = counts[own, code]
        full = old >= count << (32 - PRECISION)
        words[lanes[:active][full], written[:active][full]] = (old[full] & 0xFFFF).int()
        written[:active] += full
        old = torch.where(full, old >> 16, old)
        state[:active] = ((old // count) << PRECISION) + old % count + starts[own, code]
    found = {}
    widths = [one.shape[1] for one in codes]
    for one, *part in zip(order, words.split(widths), written.split(widths), state.split(widths), strict=True):
        places = part[1][:, None] - 1 - torch.arange(longest)  # a lane is read from its end
        kept = places >= 0
        found[one] = (part[0].gather(1, places.clamp_min(0))[kept], part[1], part[2])
    return [found[one] for one in range(len(high))]
