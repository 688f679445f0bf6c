"""A method from another package: pip install it, and `hf-lowrank compress --method relative_svd` knows it.

    pip install examples/outside_method
    hf-lowrank compress my-bert small-bert --method relative_svd --keep-targets 0.5

Without installing, `register_method("relative_svd", ROW)` does the same for one process.
"""

import torch

from hf_lowrank.methods.matrix.method import MatrixMethod
from hf_lowrank.methods.matrix.svd import Decomposition, MetricSVD, decompose
from hf_lowrank.methods.metric import DiagonalMetric, Metric, identity
from hf_lowrank.methods.table import OF_MATRICES, MethodRow
from hf_lowrank.statistics.moments import MatrixStatistics


class RelativeSVD(MetricSVD):
    """Every row counts alike, however long it is: `min sum_i ||W_i - W'_i||^2 / ||W_i||^2`."""

    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """Of the rows and of the columns where the weight is not known."""
        return identity(), identity()

    def decompose(self, weight: torch.Tensor, statistics: MatrixStatistics | None = None) -> Decomposition:
        """Every truncation of `weight` (O, I)."""
        squares = weight.double().square().sum(dim=1)
        return decompose(weight, DiagonalMetric(1 / squares.clamp_min(squares.mean() * 1e-6)), identity())


METHOD = MatrixMethod(RelativeSVD())
ROW = MethodRow(home="relative_svd:METHOD", summary="the weights alone, every row alike", takes=OF_MATRICES)
