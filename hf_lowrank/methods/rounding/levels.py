"""One level of error for all weights of a model: the one at which they come to a number of bytes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.methods.metric import Metric
from hf_lowrank.methods.rounding.coding import pack
from hf_lowrank.methods.rounding.grids import Rounded, diagonal, round_in_metric
from hf_lowrank.progress import Progress, no_progress

# Of the bytes asked for, how many may be left; in bits what may be left of a few.
_TOLERANCE = 0.002
_LEAST_SLACK = 2048.0
_MOST_PASSES = 10
# Of each weight, about as many rows are looked at for a first guess.
_SAMPLED_ROWS = 64
_RANGE = 120.0
_LONGEST_STEP = 8.0
Costs = tuple[torch.Tensor, Metric]
_NORMAL = 2 * math.pi * math.e


@dataclass(frozen=True)
class Part:
    """A weight (O, I) to be rounded, and what errors in it cost.

    Args:
        read: Gives the weight.
        costs: Gives what errors cost: of each row, (O), and the metric of its columns.
    """

    name: str
    read: Callable[[], torch.Tensor]
    costs: Callable[[], Costs]

    def at(self, level: float) -> Rounded:
        """It, rounded to that error for each number."""
        return round_in_metric(self.read(), *self.costs(), level)

    def predicted_bits(self, level: float) -> float:
        """About how many it takes at that level: `sum log2(1 + 2 pi e z^2) / 2` of codes `z` as if never put right."""
        return float((1 + _NORMAL * self._energies / level).log2().mean() / 2) * self.num_codes

    @cached_property
    def num_codes(self) -> int:
        """Numbers in it."""
        return self.read().numel()

    @cached_property
    def log_gain(self) -> float:
        """Mean logarithm of `g[i] W[i, j]^2 L[j, j]^2`: what its errors weigh beside its size."""
        energies = self._energies
        return float(energies[energies > 0].log().mean()) if bool((energies > 0).any()) else -math.inf

    @cached_property
    def _energies(self) -> torch.Tensor:
        """Squares of some of its numbers over those of a step whose level is 1."""
        weight, (rows, metric) = self.read(), self.costs()
        columns = diagonal(metric.triangle(weight.shape[1]))
        chosen = torch.linspace(0, len(weight) - 1, min(len(weight), _SAMPLED_ROWS)).long()
        return rows[chosen, None] * (weight[chosen].double() * columns).square() / 12


def rounded_within(
    parts: Sequence[Part], num_bytes: float, progress: Progress = no_progress
) -> dict[str, torch.Tensor]:
    """The bytes of each part by name, all at one level of error, `num_bytes` together at most and nearly.

    The damage to second order is the sum of all terms, so it is least where all are alike. A first guess is made on
    some rows of each; then the size of the whole says how far to go, `n / 2` bits for each factor of two.

    Raises:
        InputError: If not even the coarsest grid takes so little.
    """
    budget = 8 * num_bytes
    slack = max(budget * _TOLERANCE, _LEAST_SLACK)
    wanted = max(budget - slack / 2, 0.0)
    level, real = _first_guess(parts, wanted), 1.0
    tried: list[tuple[float, float]] = []  # levels, as powers of two, and estimated bits
    for _ in range(_MOST_PASSES):
        rounded = {part.name: part.at(2**level) for part in progress(parts, "rounding")}
        estimate = sum(one.bits for one in rounded.values())
        if abs(real * estimate - wanted) < slack / 2:
            contents = pack([(one.codes, one.steps) for one in rounded.values()])
            found = 8.0 * sum(map(len, contents))
            if budget - slack < found <= budget:
                break
            real = found / estimate
        tried.append((level, estimate))
        level = _next(tried, wanted / real)
    else:
        contents = pack([(one.codes, one.steps) for one in rounded.values()])
    size = sum(map(len, contents))
    if size > num_bytes:
        raise InputError(
            f"Rounded weights take {size / 1e6:.3f}MB, not the {num_bytes / 1e6:.3f}MB there are. Ask for more."
        )
    return dict(zip(rounded, contents, strict=True))


def _first_guess(parts: Sequence[Part], bits: float) -> float:
    """The power of two of the level at which that many bits are predicted."""
    low, high = -_RANGE, _RANGE
    for _ in range(40):
        middle = (low + high) / 2
        predicted = sum(part.predicted_bits(2**middle) for part in parts)
        low, high = (middle, high) if predicted > bits else (low, middle)
    return (low + high) / 2


def _next(tried: Sequence[tuple[float, float]], wanted: float) -> float:
    """The level to try next: along the line through the last two, or by the law of fine grids."""
    level, bits = tried[-1]
    slope = -0.13 * bits
    if len(tried) > 1 and tried[-2][0] != level:
        slope = min(slope / 8, (bits - tried[-2][1]) / (level - tried[-2][0]))
    step = (wanted - bits) / min(slope, -1.0)
    return max(-_RANGE, min(_RANGE, level + max(-_LONGEST_STEP, min(_LONGEST_STEP, step))))
