"""Rounding a weight to a grid so that its error is least in a metric of its columns, row by row.

With `C = L L^T`, `L` lower triangular, and a cost `g` of each row, the error `sum_i g_i (E C E^T)[i, i]` of
`E = W - W'` is a sum over entries, `g_i (E L)[i, j]^2`, each of which only entries of later columns take part in. From
the last column to the first, each code is chosen to make its own term least (Babai's nearest plane, which is GPTQ:
Frantar et al., ICLR 2023; Chen et al., 2507.18553). With steps in proportion to `1 / sqrt(g_i)` and `1 / L[j, j]` all
terms are alike, and the sum of the logarithms of the steps, which the entropy of the codes hangs on, is the largest
for that error: reverse water-filling (WaterSIC, 2603.04956), here also among rows and among the weights of a model.

Costs of rows by a whole matrix `G`, with feedback among rows as well, predict a third less error in the metric, and
measure no better: the estimate of `G` is not good enough to lean on.
"""

import math
from dataclasses import dataclass

import torch

from hf_lowrank.methods.metric import Metric
from hf_lowrank.methods.rounding.coding import Steps, coded_bits
from hf_lowrank.remote_code.lowrank_codes import STEPS_PER_OCTAVE, Grid, steps_of

_BLOCK = 64
_FINEST = 255
_LARGEST_CODE = 1 << 30


@dataclass(frozen=True)
class Rounded:
    """A weight (O, I) on a grid; see `hf_lowrank.remote_code.lowrank_codes` for the steps.

    Args:
        codes: (O, I).
    """

    codes: torch.Tensor
    steps: Steps

    @property
    def weight(self) -> torch.Tensor:
        """The weight itself, (O, I), float32."""
        return Grid(self.codes, self.steps.largest * steps_of(self.steps.rows), steps_of(self.steps.columns)).weight()

    @property
    def bits(self) -> float:
        """About how many its bytes will have."""
        return coded_bits(self.codes)


def round_in_metric(weight: torch.Tensor, row_costs: torch.Tensor, column_metric: Metric, error: float) -> Rounded:
    """A weight (O, I) rounded to an expected cost of `error` for each of its numbers.

    A uniform error within steps of `r_i c_j`: `error = g_i (r_i c_j L[j, j])^2 / 12`.

    Args:
        row_costs: `g`, (O), positive.
    """
    root = column_metric.triangle(weight.shape[1])
    row_steps, largest_row = _steps(row_costs.double().sqrt())
    column_steps, largest_column = _steps(diagonal(root))
    largest = float(torch.tensor(math.sqrt(12 * error) * largest_row * largest_column))
    unit = None if root.dim() == 1 else (root / root.diagonal()).float()
    codes = _codes(weight.float(), unit, largest * steps_of(row_steps), steps_of(column_steps))
    return Rounded(codes.clamp(-_LARGEST_CODE, _LARGEST_CODE).int(), Steps(largest, row_steps, column_steps))


def diagonal(root: torch.Tensor) -> torch.Tensor:
    """Of a triangle, (n, n), or of one that is nothing else, (n)."""
    return root if root.dim() == 1 else root.diagonal()


def _steps(roots: torch.Tensor) -> tuple[torch.Tensor, float]:
    """`u` of steps in proportion to `1 / roots`, and the largest of these."""
    sizes = 1 / roots.double()
    largest = float(sizes.max())
    return (STEPS_PER_OCTAVE * (largest / sizes).log2()).round().clamp(0, _FINEST).long(), largest


def _codes(weight: torch.Tensor, unit: torch.Tensor | None, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """All codes of a column at once, the last column first.

    Args:
        unit: `L` with ones on its diagonal, below which it says how an error is made good; None if nothing is there.
    """
    if unit is None:
        return torch.round(weight / rows[:, None] / columns)
    errors, codes = torch.zeros_like(weight.T), torch.zeros_like(weight.T)  # (I, O): a column is a piece
    wanted = weight.T.contiguous()
    for stop in range(weight.shape[1], 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        owed = unit[stop:, start:stop].T @ errors[stop:]  # (b, O)
        for column in range(stop - 1, start - 1, -1):
            due = owed[column - start] + unit[column + 1 : stop, column] @ errors[column + 1 : stop]
            step = rows * columns[column]
            codes[column] = torch.round((wanted[column] + due) / step)
            errors[column] = wanted[column] - codes[column] * step
    return codes.T.contiguous()
