"""Low-rank approximation in the metrics of what a matrix sees and of what its errors do."""

from hf_lowrank.methods.matrix.method import MatrixMethod
from hf_lowrank.methods.matrix.svd import MetricSVD
from hf_lowrank.methods.metric import Metric, identity, moment_metric, row_metric
from hf_lowrank.statistics.moments import MatrixStatistics

# Measured on WikiText and sentence embeddings (examples/benchmark_quality.py): little is best for the inputs, which
# many tokens describe; more for the gradients, which are noisier.
INPUT_SHRINKAGE = 0.01
_OUTPUT_SHRINKAGE = 0.1
_ROW_SHRINKAGE = 0.1


class WhitenedSVD(MetricSVD):
    """The least error of the outputs on the inputs seen: `min E ||(W - W') x||^2 = ||(W - W') C^(1/2)||_F^2`.

    `C = E[x x^T]`. The optimum of DRONE (Chen et al., NeurIPS 2021) and SVD-LLM (Wang et al., ICLR 2025), in the
    projection form that inverts no covariance. For an embedding table, rows count as often as their tokens occur.
    """

    needs: frozenset[str] = frozenset({"input_moment", "row_weights"})

    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """Of the rows and of the columns of a weight."""
        return _row_side(statistics), _input_side(statistics)


class TwoSidedSVD(MetricSVD):
    """The least change of the loss to second order: `min tr(G (W - W') C (W - W')^T)`.

    `C = E[x x^T]` of the inputs and `G = E[g g^T]` of the gradients at the outputs: the Kronecker-factored curvature
    (KFAC-SVD, ICML 2026). With `G = I` this is `WhitenedSVD`.

    A head keeps only the diagonal of its `G`, `E[p_v (1 - p_v)]` for token `v`. A table that is embedding and head at
    once loses `sum_v f_v dE_v G dE_v^T + E[sum_v p_v (1 - p_v) dE_v h h^T dE_v^T]`, with `f` the tokens' frequencies
    and `h` the head's inputs; of the products of one metric for rows and one for columns this takes the one with the
    same row and column sums.
    """

    needs: frozenset[str] = frozenset({"input_moment", "output_moment", "row_weights"})

    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """Of the rows and of the columns of a weight."""
        output_side = _row_side(statistics)
        if statistics is not None and statistics.output_moment is not None:
            output_side = moment_metric(statistics.output_moment, statistics.num_tokens, _OUTPUT_SHRINKAGE)
        return output_side, _input_side(statistics)


class WeightedSVD(MetricSVD):
    """Rows weighted by how much the loss feels them: `min sum_i f_i ||W_i - W'_i||^2`.

    `f_i` is the sum over row `i` of the diagonal Fisher information of the weights (FWSVD: Hsu et al., ICLR 2022).
    """

    needs: frozenset[str] = frozenset({"fisher", "row_weights"})

    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """Of the rows and of the columns of a weight."""
        side = _row_side(statistics)
        if statistics is not None and statistics.fisher is not None:
            side = row_metric(statistics.fisher.sum(dim=1), INPUT_SHRINKAGE)
        return side, identity()


def _row_side(statistics: MatrixStatistics | None) -> Metric:
    if statistics is None or statistics.row_weights is None:
        return identity()
    weights = statistics.row_weights
    if statistics.head_weights is not None and statistics.input_moment is not None:
        # Both sides of a tied table by their shares of the trace: the row and column sums of the whole curvature.
        whole, head = statistics.input_moment.trace(), statistics.head_weights
        weights = ((whole - head.sum()).clamp_min(0) * weights + head) / whole
    return row_metric(weights, _ROW_SHRINKAGE)


def _input_side(statistics: MatrixStatistics | None) -> Metric:
    if statistics is None or statistics.input_moment is None:
        return identity()
    return moment_metric(statistics.input_moment, statistics.num_tokens, INPUT_SHRINKAGE)


WHITENED_SVD = MatrixMethod(WhitenedSVD())
TWO_SIDED_SVD = MatrixMethod(TwoSidedSVD())
WEIGHTED_SVD = MatrixMethod(WeightedSVD())
