"""Low-rank approximation of pruned matrices: rows count by what pruning left of them."""

from collections.abc import Sequence
from functools import partial

import torch

from hf_lowrank.methods.matrix.method import MatrixMethod
from hf_lowrank.methods.matrix.svd import Decomposition, MetricSVD, decompose
from hf_lowrank.methods.metric import BlockMetric, DiagonalMetric, Metric, identity
from hf_lowrank.statistics.moments import MatrixStatistics

# Of the mean: no row that has an entry is given up.
_LEAST_WEIGHT = 1e-3


class _SupportMetric(DiagonalMetric):
    """`M = diag(w)` where rows without a weight are not there: what is carried back is zero in them.

    Args:
        weights: (n), zero or positive, float64.
    """

    def __init__(self, weights: torch.Tensor) -> None:
        super().__init__(weights)
        self._is_there = (weights > 0)[:, None]  # (n, 1)

    def unroot(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.where(self._is_there, super().unroot(vectors), 0)

    def solve(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.where(self._is_there, super().solve(vectors), 0)


class SparsityAwareSVD(MetricSVD):
    """Rows weighted by their survivors: `min sum_i n_i ||W_i - W'_i||^2` with `n_i` entries of row `i` not zero.

    Rows without an entry stay exactly zero. Of a matrix without zeros it is the plain SVD. One of the two readings of
    the sparsity-aware SVD of LPAF (Ren and Zhu, LREC-COLING 2024), whose weights are not published exactly.
    """

    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """Of the rows and of the columns where the weight is not known: all entries count alike."""
        return identity(), identity()

    def row_weights(self, weight: torch.Tensor, statistics: MatrixStatistics | None) -> torch.Tensor:
        """How much each row of `weight` counts, (O), float64; zero for a row of zeros."""
        return (weight != 0).sum(dim=1).double()

    def decompose(self, weight: torch.Tensor, statistics: MatrixStatistics | None = None) -> Decomposition:
        """Every truncation of `weight` (O, I)."""
        return decompose(weight, self._row_metric(weight, statistics), identity())

    def decompose_jointly(
        self, weights: Sequence[torch.Tensor], statistics: Sequence[MatrixStatistics | None]
    ) -> Decomposition:
        """Every truncation of weights (O, I) one above the other."""
        pairs = zip(weights, statistics, strict=True)
        rows = [(partial(self._row_metric, weight, known), len(weight)) for weight, known in pairs]
        return decompose(torch.cat(list(weights)), BlockMetric(rows), identity())

    def _row_metric(self, weight: torch.Tensor, statistics: MatrixStatistics | None) -> Metric:
        found = self.row_weights(weight, statistics)
        is_there = (weight != 0).any(dim=1)
        mean = found[is_there].mean() if bool(is_there.any()) else found.new_zeros(())
        if not mean > 0:
            return identity()
        return _SupportMetric(torch.where(is_there, (found / mean).clamp_min(_LEAST_WEIGHT), 0.0))


class ImportanceAwareSVD(SparsityAwareSVD):
    """Rows weighted by the importance of their survivors: `sum_j |W_ij| sqrt(F_ij)`, `F` the Fisher information.

    `|W_ij g_ij|` is what removing an entry does to the loss to first order, the importance that first-order pruning
    sums up; `sqrt(F_ij)` is its root mean square of `g_ij`. Without statistics it counts survivors.
    """

    needs: frozenset[str] = frozenset({"fisher"})

    def row_weights(self, weight: torch.Tensor, statistics: MatrixStatistics | None) -> torch.Tensor:
        """How much each row of `weight` counts, (O), float64; zero for a row of zeros."""
        if statistics is None or statistics.fisher is None:
            return super().row_weights(weight, statistics)
        return (weight.double().abs() * statistics.fisher.sqrt()).sum(dim=1)


SPARSITY_AWARE_SVD = MatrixMethod(SparsityAwareSVD())
IMPORTANCE_AWARE_SVD = MatrixMethod(ImportanceAwareSVD())
