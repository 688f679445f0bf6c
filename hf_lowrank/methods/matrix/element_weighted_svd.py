"""Low-rank approximation with a weight of its own for every entry, by alternating least squares."""

from dataclasses import dataclass

import torch

from hf_lowrank.methods.factors import Factors, balanced
from hf_lowrank.methods.matrix.data_aware_svd import INPUT_SHRINKAGE, WeightedSVD
from hf_lowrank.methods.matrix.method import MatrixMethod
from hf_lowrank.methods.matrix.svd import MetricSVD, Truncations, scaled
from hf_lowrank.methods.metric import Metric
from hf_lowrank.statistics.moments import MatrixStatistics

# A sweep that lowers the error by less than this share of it is the last one, and so is the twentieth.
TOLERANCE = 1e-3
MOST_SWEEPS = 20
# Pull of each row towards where it was, over the mean of its Gram matrix' diagonal: nothing but a guard.
_RIDGE = 1e-9
# Numbers of the largest intermediate tensor.
_ROOM = 1 << 24


@dataclass(frozen=True)
class ElementWeightedTruncations:
    """Truncations that are solved for one by one, each when it is asked for.

    Args:
        weight: (O, I).
        fisher: Of its entries, not all zero, (O, I).
        start: What the rows' weights alone give: where each solution starts, and whose spectrum stands for all ranks.
    """

    weight: torch.Tensor
    fisher: torch.Tensor
    start: Truncations

    @property
    def singular_values(self) -> torch.Tensor:
        """Those in the metric of the rows."""
        return self.start.singular_values

    def factors(self, rank: int) -> Factors:
        """Balanced factors at which one more sweep no longer pays, in the type of `start`'s."""
        wide, half = scaled(self.weight)
        weights = regular_weights(self.fisher)
        start = self.start.factors(rank)
        target, unit = wide.double(), 2.0**half
        found = Factors(start.up.double() / unit, start.down.double() / unit)
        error = weighted_error(target, weights, found)
        for _ in range(MOST_SWEEPS):
            found, before = sweep(target, weights, found), error
            error = weighted_error(target, weights, found)
            if not error < (1 - TOLERANCE) * before:
                break
        found = balanced(found.up, found.down)
        return Factors((found.up * unit).to(start.up.dtype), (found.down * unit).to(start.down.dtype))


class ElementWeightedSVD(MetricSVD):
    """Every entry weighted by how much the loss feels it: `min sum_ij f_ij (W_ij - W'_ij)^2`.

    `f_ij` is the diagonal Fisher information of the weights (TFWSVD: Hua et al., EMNLP 2022). There is no closed form.
    From the solution of `WeightedSVD` on, either factor in turn is solved for exactly, row by row, which never raises
    the error; a sweep costs `4 O I R^2` operations. An embedding table's weights are those of its rows, for which
    `WeightedSVD` is the optimum already.
    """

    needs: frozenset[str] = WeightedSVD.needs
    fits_each_rank = True

    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """Of the rows and of the columns of a weight, where each solution starts."""
        return WeightedSVD().metrics(statistics)

    def fitted(self, found: Truncations, weight: torch.Tensor, statistics: MatrixStatistics | None) -> Truncations:
        """What the truncations of a weight (O, I) come to when each is fitted to the weights of the entries."""
        if statistics is None or statistics.fisher is None or not float(statistics.fisher.mean()) > 0:
            return found
        return ElementWeightedTruncations(weight, statistics.fisher, found)


def regular_weights(fisher: torch.Tensor) -> torch.Tensor:
    """Weights of mean 1 in proportion to `fisher` (O, I), pulled towards all alike so that none is zero; float64."""
    return (1 - INPUT_SHRINKAGE) * (fisher.double() / fisher.double().mean()) + INPUT_SHRINKAGE


def weighted_error(target: torch.Tensor, weights: torch.Tensor, factors: Factors) -> float:
    """`sum_ij f_ij (W_ij - (up down)_ij)^2` for `W` and `f` (O, I)."""
    return float((weights * (target - factors.product).square()).sum())


def sweep(target: torch.Tensor, weights: torch.Tensor, factors: Factors) -> Factors:
    """Solve for `up` at the given `down`, then for `down` at that `up`.

    The fixed factor is made orthonormal first, so that the systems are as well conditioned as the weights are.
    """
    inputs, mixing = torch.linalg.qr(factors.down.T)  # (I, R), (R, R)
    up = _solved_rows(target, weights, factors.up @ mixing.T, inputs)
    outputs, mixing = torch.linalg.qr(up)  # (O, R), (R, R)
    down = _solved_rows(target.T, weights.T, inputs @ mixing.T, outputs)
    return Factors(outputs, down.T)


def _solved_rows(target: torch.Tensor, weights: torch.Tensor, rows: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The best rows (n, R) such that `rows @ basis.T` approximates `target` (n, k), from the given ones on."""
    solved = torch.empty_like(rows)
    size = max(1, _ROOM // basis.numel())
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        weighted = basis.T * weights[chunk, None, :]  # (c, R, k)
        gram = weighted @ basis  # (c, R, R)
        slope = weighted @ (target[chunk] - rows[chunk] @ basis.T)[..., None]  # (c, R, 1)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        diagonal += _RIDGE * diagonal.mean(dim=1, keepdim=True) + torch.finfo(gram.dtype).tiny
        solved[chunk] = rows[chunk] + torch.cholesky_solve(slope, torch.linalg.cholesky(gram))[..., 0]
    return solved


ELEMENT_WEIGHTED_SVD = MatrixMethod(ElementWeightedSVD())
