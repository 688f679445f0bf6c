"""Two factors rounded one after the other: the second makes good what was done to the first."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hf_lowrank.files.kept_on_disk import KeptOnDisk
from hf_lowrank.methods.metric import moment_metric
from hf_lowrank.methods.rounding.grids import Columns, Rounded, as_columns, round_in_metric
from hf_lowrank.methods.rounding.levels import Costs, Part

_MOST_ENERGIES = 1 << 16
# Of a factor's Gram matrix: enough for rows that became zeros, and for nothing else.
_SHRINKAGE, _MANY = 1e-7, 1 << 50


@dataclass(eq=False)
class Pair(Part):
    """A product `W = up @ down` (O, I) of rank `R`.

    Turned within the rank space, `(up Q^-1)(Q down)`, such that in the metrics `up` has orthogonal columns and `down`
    orthogonal rows, of the same lengths `sqrt(s)`: then errors in row `k` of `down` cost `s_k`, whatever those of
    others are, and what lies below the level of error is all zeros. Once `down` is rounded, `up` becomes the best
    beside it, `W C down^T (down C down^T)^-1`, and is rounded in the metric `down C down^T`.

    Args:
        names: Of `up` and of `down`.
        read: Gives both, (O, R) and (R, I).
        costs: Of the product.
        scratch: A folder to keep the turned factors in.
    """

    names: tuple[str, str]
    read: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    costs: Callable[[], Costs]
    scratch: Path

    @property
    def num_codes(self) -> int:
        """See `Part`."""
        return sum(factor.numel() for factor in self._turned())

    def at(self, level: float) -> Mapping[str, Rounded]:
        """See `Part`."""
        (rows, columns), (up, down) = self.costs(), self._turned()
        first = round_in_metric(down, _lengths(up, rows), columns, level)
        seen = columns.rooted(first.weight.double())
        metric = moment_metric(seen @ seen.T, _MANY, _SHRINKAGE)
        best = metric.solve(seen @ columns.rooted(down).T @ up.T).T
        second = round_in_metric(best, rows, as_columns(metric, len(down)), level)
        return dict(zip(self.names, (second, first), strict=True))

    def sampled_bits(self, level: float) -> float:
        """See `Part`: both whole, since one hangs on the other."""
        return sum(one.bits for one in self.at(level).values())

    def energies(self) -> torch.Tensor:
        """See `Part`."""
        (rows, columns), (up, down) = self.costs(), self._turned()
        lengths = _lengths(up, rows)
        of_up = rows[:, None] * up.square() * lengths
        of_down = lengths[:, None] * (down[:, columns.order] * columns.diagonal).square()
        both = torch.cat([of_up.flatten(), of_down.flatten()]) / 12
        return both[:: max(1, len(both) // _MOST_ENERGIES)]

    @cached_property
    def _turned(self) -> KeptOnDisk[tuple[torch.Tensor, torch.Tensor]]:
        """The factors as they are rounded, float64."""
        return KeptOnDisk(lambda: turned(*self.read(), *self.costs()), self.scratch)


def turned(
    up: torch.Tensor, down: torch.Tensor, rows: torch.Tensor, columns: Columns
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with factors that are orthogonal, and alike in length, in these metrics; see `Pair`."""
    up, down, roots = up.double(), down.double(), rows.sqrt()[:, None]
    left, left_mixing = torch.linalg.qr(roots * up)
    right_mixing = torch.linalg.qr(columns.rooted(down).T).R
    inner, values, _ = torch.linalg.svd(left_mixing @ right_mixing.T)
    lengths = values.clamp_min(torch.finfo(values.dtype).eps * float(values.max()) or 1.0).sqrt()
    return left @ inner * lengths / roots, (inner.T @ left_mixing @ down) / lengths[:, None]


def _lengths(up: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return (rows[:, None] * up.square()).sum(0).clamp_min(torch.finfo(torch.float64).tiny)
