"""Rounding a weight to a grid so that its error is least in a metric of its columns, row by row.

With `C = L L^T`, `L` lower triangular, and a cost `g` of each row, the error `sum_i g_i (E C E^T)[i, i]` of
`E = W - W'` is a sum over entries, `g_i (E L)[i, j]^2`, each of which only entries of later columns take part in. From
the last column to the first, each code is chosen to make its own term least (Babai's nearest plane, which is GPTQ:
Frantar et al., ICLR 2023; Chen et al., 2507.18553). With steps in proportion to `1 / sqrt(g_i)` and `1 / L[j, j]` all
terms are alike, and the sum of the logarithms of the steps, which the entropy of the codes hangs on, is the largest
for that error: reverse water-filling (WaterSIC, 2603.04956), here also among rows and among the weights of a model.

Columns go in the order of a pivoted Cholesky decomposition, each time the one that those before it say least of, so
that at few bits as many as can be are all zeros, and those before them make them good. And a code pays for its bits:
of a normal distribution of variance `v` a code `z` takes `z^2 log2(e) / (2 v)` of them, each of which is worth
`ln(2) / 6` of a squared step, so that what is best is not the nearest to `x` but to `x v / (v + 1/12)`.

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


@dataclass(frozen=True)
class Columns:
    """A metric `C = L L^T` of columns, made ready to round in.

    Args:
        order: The columns as rows and columns of `L` stand for them, (I).
        diagonal: Of `L`, (I), float64.
        unit: `L` over its diagonal, (I, I), float32, which says how an error is made good; None if nothing is beside
            that.
    """

    order: torch.Tensor
    diagonal: torch.Tensor
    unit: torch.Tensor | None

    def rooted(self, weight: torch.Tensor) -> torch.Tensor:
        """`W L`, (O, I), whose columns go in that order: the squares of its entries are what those of `W` cost."""
        scaled: torch.Tensor = weight[:, self.order] * self.diagonal.to(weight)
        return weight[:, self.order] @ self._root.to(weight) if self.unit is not None else scaled

    def drawn(self, normal: torch.Tensor) -> torch.Tensor:
        """Rows of the covariance `C` of rows (N, I) of standard normal numbers."""
        found = normal * self.diagonal.to(normal) if self.unit is None else normal @ self._root.T.to(normal)
        return torch.empty_like(found).index_copy(1, self.order, found)

    @property
    def _root(self) -> torch.Tensor:
        assert self.unit is not None  # asked before
        return self.unit * self.diagonal


def as_columns(metric: Metric, size: int) -> Columns:
    """A metric of so many columns, made ready."""
    root = metric.triangle(size)
    if root.dim() == 1:
        return Columns(torch.arange(size), root, None)
    moment = root @ root.T
    order = _leading(moment)
    root = torch.linalg.cholesky(moment[order][:, order])
    return Columns(order, root.diagonal().clone(), (root / root.diagonal()).float())


def damage(weight: torch.Tensor, rounded: torch.Tensor, row_costs: torch.Tensor, columns: Columns) -> float:
    """What errors in a weight (O, I) cost together: `sum_i g_i (E C E^T)[i, i]`."""
    squares = columns.rooted((weight - rounded).float()).square().sum(1, dtype=torch.float64)
    return float((row_costs * squares).sum())


def _leading(moment: torch.Tensor) -> torch.Tensor:
    """An order in which each column is the one that those before it leave most of, (I)."""
    left = (moment / moment.diagonal().max()).float()
    spare, order = left.diagonal().clone(), list[int]()
    for start in range(0, len(left), _BLOCK):
        panel = left.new_zeros(len(left), min(_BLOCK, len(left) - start))
        for place in range(panel.shape[1]):
            column = int(spare.argmax())
            order.append(column)
            panel[:, place] = left[column] - panel @ panel[column]
            panel[:, place] /= spare[column].clamp_min(torch.finfo(torch.float32).tiny).sqrt()
            spare -= panel[:, place].square()
            spare[order] = -math.inf
        left -= panel @ panel.T
    return torch.tensor(order)


def round_in_metric(weight: torch.Tensor, row_costs: torch.Tensor, columns: Columns, level: float) -> Rounded:
    """A weight (O, I) rounded at a level: the cost of a uniform error within steps, of each number.

    With steps of `r_i c_j` the level is `g_i (r_i c_j L[j, j])^2 / 12`.

    Args:
        row_costs: `g`, (O), positive.
    """
    row_steps, largest_row = _steps(row_costs.double().sqrt())
    column_steps, largest_column = _steps(columns.diagonal)
    largest = float(torch.tensor(math.sqrt(12 * level) * largest_row * largest_column))
    steps = largest * steps_of(row_steps), steps_of(column_steps)
    codes, back = _codes(weight.float()[:, columns.order], columns.unit, *steps), columns.order.argsort()
    codes = codes[:, back].clamp(-_LARGEST_CODE, _LARGEST_CODE).int()
    return Rounded(codes, Steps(largest, row_steps, column_steps[back]))


def diagonal(root: torch.Tensor) -> torch.Tensor:
    """Of a triangle, (n, n), or of one that is nothing else, (n)."""
    return root if root.dim() == 1 else root.diagonal()


def _steps(roots: torch.Tensor) -> tuple[torch.Tensor, float]:
    """`u` of steps in proportion to `1 / roots`, and the largest of these."""
    sizes = 1 / roots.double()
    largest = float(sizes.max())
    return (STEPS_PER_OCTAVE * (largest / sizes).log2()).round().clamp(0, _FINEST).long(), largest


def _codes(weight: torch.Tensor, unit: torch.Tensor | None, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """All codes of a column at once, the last column first; see `Columns` for `unit`."""
    energies = (weight / rows[:, None] / columns).square().mean(1)
    shares = energies / energies.mean().clamp_min(torch.finfo(torch.float32).tiny)
    errors, codes = torch.zeros_like(weight.T), torch.zeros_like(weight.T)  # (I, O): a column is a piece
    wanted = weight.T.contiguous()
    for stop in range(weight.shape[1], 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        owed = wanted[start:stop]  # (b, O)
        if unit is not None:
            owed = owed + unit[stop:, start:stop].T @ errors[stop:]
        for column in range(stop - 1, start - 1, -1):
            due, step = owed[column - start], rows * columns[column]
            if unit is not None:
                due = due + unit[column + 1 : stop, column] @ errors[column + 1 : stop]
            exact = due / step
            variances = exact.square().mean() * shares
            codes[column] = torch.round(exact * (variances / (variances + 1 / 12)))
            errors[column] = wanted[column] - codes[column] * step
    return codes.T.contiguous()
