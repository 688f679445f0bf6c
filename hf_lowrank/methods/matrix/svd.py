"""Truncated singular value decomposition through the smaller Gram matrix, in any metric."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Protocol

import torch

from hf_lowrank.methods.factors import Factors, balanced
from hf_lowrank.methods.metric import BlockMetric, Metric, identity
from hf_lowrank.statistics.moments import MatrixStatistics

_CHUNK = 4096


class Truncations(Protocol):
    """Every truncation of one matrix (O, I), in memory or on disk."""

    @property
    def singular_values(self) -> torch.Tensor:
        """In the solver's metric, largest first, float64, (min(O, I))."""
        ...

    def factors(self, rank: int) -> Factors:
        """The balanced factors of the best approximation of that rank, in float32 or the weight's wider type."""
        ...


@dataclass(frozen=True)
class Decomposition:
    """Every truncation of one matrix: the best of rank `R` in the metrics of its rows and its columns.

    With `G = L_G L_G^T` on the output side, `C = L_C L_C^T` on the input side and `M = L_G^T W L_C`, the error
    `tr(G (W - W') C (W - W')^T) = ||L_G^T (W - W') L_C||_F^2` is least for the truncated SVD of `M`, carried back.
    Only the singular vectors of the shorter side are held; the other factor is a projection of `W` itself, so nothing
    is inverted but one triangular factor, and full rank is exact.

    Args:
        weight: (O, I).
        singular_values: Of `M`, largest first, float64, (min(O, I)).
        vectors: Left singular vectors of `M` if `O <= I`, else its right ones, (min(O, I), min(O, I)).
    """

    weight: torch.Tensor
    singular_values: torch.Tensor
    vectors: torch.Tensor
    output_metric: Metric
    input_metric: Metric

    def factors(self, rank: int) -> Factors:
        """The balanced factors of the best approximation of that rank, in float32 or the weight's wider type."""
        wide, half = scaled(self.weight)
        vectors = self.vectors[:, :rank]
        if wide.shape[0] <= wide.shape[1]:
            up = self.output_metric.unroot(vectors)  # L_G^-T U
            down = self.output_metric.root(vectors).T @ wide  # U^T L_G^T W
        else:
            down = self.input_metric.unroot(vectors).T  # (L_C^-T V)^T
            up = wide @ self.input_metric.root(vectors)  # W L_C V
        del wide  # as large as a token table
        factors = balanced(up, down)
        return Factors(factors.up.mul_(2.0**half), factors.down.mul_(2.0**half))


@dataclass(frozen=True)
class TruncationsOfSeveral:
    """Every truncation of several matrices of one shape, all at one rank, such as those of a mixture's experts.

    Args:
        each: Of every matrix.
    """

    each: Sequence[Truncations]

    @cached_property
    def singular_values(self) -> torch.Tensor:
        """`sqrt(sum_e s_ek^2)` of the values of all, so that what a rank leaves out is what it leaves out of all."""
        return torch.stack([found.singular_values for found in self.each]).square().sum(dim=0).sqrt()

    def factors(self, rank: int) -> Factors:
        """The factors of all, (E, O, R) and (E, R, I)."""
        found = [truncations.factors(rank) for truncations in self.each]
        return Factors(torch.stack([one.up for one in found]), torch.stack([one.down for one in found]))


def decompose(weight: torch.Tensor, output_metric: Metric, input_metric: Metric) -> Decomposition:
    """Decompose a weight (O, I) in the given metrics; float64 inside, whatever its type."""
    wide, half = scaled(weight)
    gram = _metric_gram(wide, output_metric, input_metric)
    values, vectors = torch.linalg.eigh(gram)
    return Decomposition(
        weight=weight,
        singular_values=values.flip(0).clamp_min(0).sqrt() * 2.0**half * 2.0**half,
        vectors=vectors.flip(1).to(wide.dtype),
        output_metric=output_metric,
        input_metric=input_metric,
    )


class MetricSVD(ABC):
    """A truncated SVD in metrics that statistics give; see `Decomposition` for what it minimizes."""

    needs: frozenset[str] = frozenset()
    fits_each_rank = False

    @abstractmethod
    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """Of the rows and of the columns of a weight."""

    def decompose(self, weight: torch.Tensor, statistics: MatrixStatistics | None = None) -> Decomposition:
        """Every truncation of `weight` (O, I)."""
        return decompose(weight, *self.metrics(statistics))

    def fitted(self, found: Truncations, weight: torch.Tensor, statistics: MatrixStatistics | None) -> Truncations:
        """Themselves: a truncated SVD is the best of its rank already."""
        return found

    def decompose_jointly(
        self, weights: Sequence[torch.Tensor], statistics: Sequence[MatrixStatistics | None]
    ) -> Decomposition:
        """Every truncation of weights (O, I) one above the other: a common factor on the side of their one input.

        The metric of the columns is that of the first; each has its own for its rows.
        """

        def make_metric(index: int) -> Metric:
            return self.metrics(statistics[index])[0]

        is_tall = sum(map(len, weights)) > weights[0].shape[1]  # then each is used once
        make = make_metric if is_tall else cache(make_metric)
        rows = [(partial(make, index), len(weight)) for index, weight in enumerate(weights)]
        return decompose(torch.cat(list(weights)), BlockMetric(rows), self.metrics(statistics[0])[1])


class SVD(MetricSVD):
    """The best rank-`R` approximation in the Frobenius norm: `min ||W - up @ down||_F`.

    The error is the norm of the discarded singular values (Eckart and Young, Psychometrika 1936). Of an O x I matrix
    only the `min(O, I)`-sized Gram matrix is decomposed, in float64: exact at full rank, and no failure on any finite
    matrix.
    """

    def metrics(self, statistics: MatrixStatistics | None) -> tuple[Metric, Metric]:
        """Of the rows and of the columns of a weight: all entries count alike."""
        return identity(), identity()


def scaled(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The weight in float32 or wider over `4**half`, which brings its largest entry near 1, and `half`.

    Squares of huge or tiny entries would leave the range. A power of two keeps every digit, and its root, which goes
    to either factor, is one as well.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    half = math.frexp(float(wide.abs().max()))[1] // 2
    return (wide / 2.0**half).div_(2.0**half), half


def _metric_gram(wide: torch.Tensor, output_metric: Metric, input_metric: Metric) -> torch.Tensor:
    """`M M^T` or `M^T M` of `M = L_G^T W L_C`, whichever is smaller, in float64.

    `M` is formed in chunks along the longer side where that side's metric is the identity or diagonal, so that no
    float64 copy of a large matrix is held.
    """
    tall, long_metric, short_metric = wide, output_metric, input_metric
    if wide.shape[0] <= wide.shape[1]:
        tall, long_metric, short_metric = wide.T, input_metric, output_metric
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=wide.device)
    for chunk in long_metric.rooted_chunks(tall, _CHUNK):  # rows of L^T T
        gram.addmm_(chunk.T, chunk)
    return short_metric.congruent(gram)  # L^T gram L
