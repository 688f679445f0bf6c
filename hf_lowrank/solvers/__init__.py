"""How the numbers of a structure are found: one class a solver, one row of `SOLVERS` each."""

from collections.abc import Sequence
from typing import Protocol

import torch

from hf_lowrank.solvers.data_aware_svd import TwoSidedSVD, WeightedSVD, WhitenedSVD
from hf_lowrank.solvers.element_weighted_svd import ElementWeightedSVD
from hf_lowrank.solvers.metric import Metric
from hf_lowrank.solvers.sparsity_aware_svd import ImportanceAwareSVD, SparsityAwareSVD
from hf_lowrank.solvers.svd import SVD, Decomposition, Truncations
from hf_lowrank.statistics.moments import MatrixStatistics


class Solver(Protocol):
    """What every low-rank solver offers.

    Args:
        needs: Kinds of statistics it looks at; see `hf_lowrank.statistics.collection.KINDS`.
        fits_each_rank: Whether a decomposition is only where each rank's own solution starts.
    """

    needs: frozenset[str]
    fits_each_rank: bool

    def decompose(self, weight: torch.Tensor, statistics: MatrixStatistics | None = None) -> Decomposition:
        """Every truncation of a weight (O, I), best first in the solver's own measure of error."""
        ...

    def fitted(self, found: Truncations, weight: torch.Tensor, statistics: MatrixStatistics | None) -> Truncations:
        """What the truncations of a weight come to when each is fitted at its own rank."""
        ...

    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """What errors at the outputs and at the inputs of a weight cost in that measure."""
        ...

    def decompose_jointly(
        self, weights: Sequence[torch.Tensor], statistics: Sequence[MatrixStatistics | None]
    ) -> Decomposition:
        """The same for weights that read one input, one above the other."""
        ...


SOLVERS: dict[str, Solver] = {
    "svd": SVD(),
    "weighted_svd": WeightedSVD(),
    "element_weighted_svd": ElementWeightedSVD(),
    "whitened_svd": WhitenedSVD(),
    "two_sided_svd": TwoSidedSVD(),
    "sparsity_aware_svd": SparsityAwareSVD(),
    "importance_aware_svd": ImportanceAwareSVD(),
}
