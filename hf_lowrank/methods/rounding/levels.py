"""One level of error for all weights of a model: the one at which they come to a number of bytes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.methods.rounding.coding import coded_bits, pack
from hf_lowrank.methods.rounding.grids import Columns, Rounded, round_in_metric
from hf_lowrank.progress import Progress, no_progress

# Of the bytes asked for, how many may be left; in bits what may be left of a few.
_TOLERANCE = 0.002
_LEAST_SLACK = 2048.0
_MOST_PASSES = 10
# Of each weight, about as many rows are looked at for a first guess, and how near that comes to what is wanted.
_SAMPLED_ROWS = 64
_NEAR_GUESS = 0.02
_RANGE = 120.0
_LONGEST_STEP = 8.0
# Of each row, and of the columns.
Costs = tuple[torch.Tensor, Columns]
_NORMAL = 2 * math.pi * math.e


class Part(ABC):
    """Some weights to be rounded, and what errors in them cost."""

    @property
    @abstractmethod
    def num_codes(self) -> int:
        """Numbers in them."""

    @abstractmethod
    def at(self, level: float) -> Mapping[str, Rounded]:
        """Each by its name, rounded to that error for each number."""

    @abstractmethod
    def sampled_bits(self, level: float) -> float:
        """About how many they take at that level, by rounding some rows."""

    @abstractmethod
    def energies(self) -> torch.Tensor:
        """Squares of some numbers over those of a step whose level is 1."""

    def predicted_bits(self, level: float) -> float:
        """About how many they take at that level, `sum log2(1 + 2 pi e z^2) / 2` of codes `z` never put right."""
        return float((1 + _NORMAL * self._energies / level).log2().mean() / 2) * self.num_codes

    @cached_property
    def log_gain(self) -> float:
        """Mean logarithm of `g[i] W[i, j]^2 L[j, j]^2 / 12`: what errors weigh beside sizes."""
        seen = self._energies[self._energies > 0]
        return float(seen.log().mean()) if len(seen) else -math.inf

    @cached_property
    def _energies(self) -> torch.Tensor:
        return self.energies()


@dataclass(eq=False)
class Single(Part):
    """A weight (O, I).

    Args:
        read: Gives it.
        costs: Gives what errors cost: of each row, (O), and the metric of its columns.
    """

    name: str
    read: Callable[[], torch.Tensor]
    costs: Callable[[], Costs]

    def at(self, level: float) -> Mapping[str, Rounded]:
        """See `Part`."""
        return {self.name: round_in_metric(self.read(), *self.costs(), level)}

    def sampled_bits(self, level: float) -> float:
        """See `Part`."""
        (rows, columns), weight = self.costs(), self.read()
        chosen = self._chosen
        return coded_bits(round_in_metric(weight[chosen], rows[chosen], columns, level).codes, len(weight))

    def energies(self) -> torch.Tensor:
        """See `Part`."""
        rows, columns = self.costs()
        weight = self.read()[self._chosen][:, columns.order].double()
        return rows[self._chosen, None] * (weight * columns.diagonal).square() / 12

    @cached_property
    def num_codes(self) -> int:
        """See `Part`."""
        return self.read().numel()

    @cached_property
    def _chosen(self) -> torch.Tensor:
        """Some rows, of few bits and of many alike."""
        rows, weight = self.costs()[0], self.read()
        order = (rows * weight.square().mean(1)).argsort()
        return order[torch.linspace(0, len(order) - 1, min(len(order), _SAMPLED_ROWS)).long()]


def rounded_within(
    parts: Sequence[Part], num_bytes: float, progress: Progress = no_progress
) -> dict[str, torch.Tensor]:
    """The bytes of each weight by name, all at one level of error, `num_bytes` together at most and nearly.

    The damage to second order is the sum of all terms, so it is least where all are alike. Some rows of each say where
    to begin; then the size of the whole says how far to go.

    Raises:
        InputError: If not even the coarsest grid takes so little.
    """
    budget = 8 * num_bytes
    slack = max(budget * _TOLERANCE, _LEAST_SLACK)
    wanted, real = max(budget - slack / 2, 0.0), 1.0
    guessed = guesses(parts, wanted)  # levels, as powers of two, and estimated bits
    tried: list[tuple[float, float]] = []
    level = _next(guessed, wanted)
    for _ in range(_MOST_PASSES):
        rounded: dict[str, Rounded] = {}
        for part in progress(parts, "rounding"):
            rounded |= part.at(2**level)
        estimate = sum(one.bits for one in rounded.values())
        if abs(real * estimate - wanted) < slack / 2:
            contents = pack([(one.codes, one.steps) for one in rounded.values()])
            found = 8.0 * sum(map(len, contents))
            if budget - slack < found <= budget:
                break
            real = found / estimate
        tried.append((level, estimate))
        level = _next([*guessed[:-1], *tried], wanted / real)
    else:
        contents = pack([(one.codes, one.steps) for one in rounded.values()])
    size = sum(map(len, contents))
    if size > num_bytes:
        raise InputError(
            f"Rounded weights take {size / 1e6:.3f}MB, not the {num_bytes / 1e6:.3f}MB there are. Ask for more."
        )
    return dict(zip(rounded, contents, strict=True))


def guesses(parts: Sequence[Part], bits: float) -> list[tuple[float, float]]:
    """Powers of two of levels and the bits that some rows say they come to, the last nearly those."""
    low, high = -_RANGE, _RANGE
    for _ in range(40):
        middle = (low + high) / 2
        predicted = sum(part.predicted_bits(2**middle) for part in parts)
        low, high = (middle, high) if predicted > bits else (low, middle)
    tried: list[tuple[float, float]] = []
    level = (low + high) / 2
    for _ in range(_MOST_PASSES):
        tried.append((level, sum(part.sampled_bits(2**level) for part in parts)))
        if abs(tried[-1][1] - bits) < _NEAR_GUESS * bits:
            break
        level = _next(tried, bits)
    return tried


def _next(tried: Sequence[tuple[float, float]], wanted: float) -> float:
    """The level to try next: along the line through the last two, or by the law of fine grids."""
    level, bits = tried[-1]
    slope = -0.13 * bits
    if len(tried) > 1 and tried[-2][0] != level:
        slope = min(slope / 8, (bits - tried[-2][1]) / (level - tried[-2][0]))
    step = (wanted - bits) / min(slope, -1.0)
    return max(-_RANGE, min(_RANGE, level + max(-_LONGEST_STEP, min(_LONGEST_STEP, step))))
