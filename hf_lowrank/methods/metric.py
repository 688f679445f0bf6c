"""Positive definite metrics on one side of a matrix, by a root that is never inverted."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch

# How far a moment may be pulled towards a multiple of the identity when few tokens stand behind it.
_MOST_SHRINKAGE = 0.3


class Metric(ABC):
    """A metric `M = L L^T` on vectors of length `n`."""

    @abstractmethod
    def root(self, vectors: torch.Tensor) -> torch.Tensor:
        """`L V` for (n, k) `V`."""

    @abstractmethod
    def unroot(self, vectors: torch.Tensor) -> torch.Tensor:
        """`L^-T V` for (n, k) `V`."""

    def triangle(self, size: int) -> torch.Tensor:
        """`L` itself, (n, n), or its diagonal, (n), where nothing else is in it; float64."""
        raise NotImplementedError

    @abstractmethod
    def solve(self, vectors: torch.Tensor) -> torch.Tensor:
        """`M^-1 V` for (n, k) `V`, float64."""

    @abstractmethod
    def congruent(self, gram: torch.Tensor) -> torch.Tensor:
        """`L^T A L` for (n, n) symmetric `A`, float64."""

    @abstractmethod
    def rooted_chunks(self, tall: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        """The rows of `L^T T` for (n, k) `T`, in float64 pieces."""

    def rooted(self, tall: torch.Tensor) -> torch.Tensor:
        """`L^T T` for (n, k) `T`, float64."""
        return torch.cat(list(self.rooted_chunks(tall, len(tall))))


class DiagonalMetric(Metric):
    """`M = diag(w)`; no `w` means the identity.

    Args:
        weights: (n), positive, float64.
    """

    def __init__(self, weights: torch.Tensor | None = None) -> None:
        self._roots = None if weights is None else weights.sqrt()[:, None]  # (n, 1)

    def root(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self._roots is None else vectors * self._roots.to(vectors)

    def unroot(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self._roots is None else vectors / self._roots.to(vectors)

    def triangle(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.float64) if self._roots is None else self._roots[:, 0]

    def solve(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors if self._roots is None else vectors / self._roots.square()

    def congruent(self, gram: torch.Tensor) -> torch.Tensor:
        return gram if self._roots is None else self._roots * gram * self._roots.T

    def rooted_chunks(self, tall: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        for start in range(0, len(tall), size):
            chunk = tall[start : start + size].double()
            yield chunk if self._roots is None else chunk * self._roots[start : start + size]


class FullMetric(Metric):
    """`M = L L^T` with a lower triangular `L`, float64, (n, n)."""

    def __init__(self, lower: torch.Tensor) -> None:
        self._lower = lower

    def root(self, vectors: torch.Tensor) -> torch.Tensor:
        rooted: torch.Tensor = self._lower @ vectors.double()
        return rooted.to(vectors.dtype)

    def unroot(self, vectors: torch.Tensor) -> torch.Tensor:
        solved: torch.Tensor = torch.linalg.solve_triangular(self._lower.T, vectors.double(), upper=True)
        return solved.to(vectors.dtype)

    def triangle(self, size: int) -> torch.Tensor:
        return self._lower

    def solve(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(vectors, self._lower)

    def congruent(self, gram: torch.Tensor) -> torch.Tensor:
        return self._lower.T @ gram @ self._lower

    def rooted_chunks(self, tall: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        yield self._lower.T @ tall.double()


class BlockMetric(Metric):
    """The metrics of several vectors on all their entries, one after the other: `M = diag(M_1, M_2, ...)`.

    Args:
        blocks: What makes each when it is used, so that one is in memory at a time, with the length of its vectors.
    """

    def __init__(self, blocks: Sequence[tuple[Callable[[], Metric], int]]) -> None:
        self._metrics = [metric for metric, _ in blocks]
        self._lengths = [length for _, length in blocks]

    def root(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.cat([metric.root(part) for metric, part in self._parts(vectors)])

    def unroot(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.cat([metric.unroot(part) for metric, part in self._parts(vectors)])

    def solve(self, vectors: torch.Tensor) -> torch.Tensor:
        return torch.cat([metric.solve(part) for metric, part in self._parts(vectors)])

    def congruent(self, gram: torch.Tensor) -> torch.Tensor:
        return self.rooted(self.rooted(gram).T).T

    def rooted_chunks(self, tall: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
        for metric, part in self._parts(tall):
            yield from metric.rooted_chunks(part, size)

    def _parts(self, rows: torch.Tensor) -> Iterator[tuple[Metric, torch.Tensor]]:
        return zip((make() for make in self._metrics), rows.split(self._lengths), strict=True)


def identity() -> Metric:
    """The Euclidean metric."""
    return DiagonalMetric()


def shrunk(weights: torch.Tensor, shrinkage: float) -> torch.Tensor:
    """How much each row counts, pulled towards all alike so that no row is lost."""
    return (1 - shrinkage) * weights + shrinkage * weights.mean()


def row_metric(weights: torch.Tensor, shrinkage: float) -> Metric:
    """The metric of how often each row counts; see `shrunk`."""
    return DiagonalMetric(shrunk(weights, shrinkage))


def shrinkage_strength(size: int, num_tokens: int, shrinkage: float) -> float:
    """`a = shrinkage`, or `n / (10 T)` where few tokens `T` stand behind a moment of size `n`, at most 0.3."""
    return max(shrinkage, min(_MOST_SHRINKAGE, size / (10 * max(num_tokens, 1))))


def moment_metric(moment: torch.Tensor, num_tokens: int, shrinkage: float) -> Metric:
    """The metric of a second moment (n, n), made positive definite.

    `(1 - a) M + a mean(diag M) I` with `a` of `shrinkage_strength`. Should its Cholesky decomposition still fail, the
    eigenvalues below the precision of float64 are lifted.
    """
    size = len(moment)
    strength = shrinkage_strength(size, num_tokens, shrinkage)
    mean = float(moment.diagonal().mean())
    if not mean > 0:  # nothing was ever seen there: any error is as good as another
        return identity()
    shrunk = (1 - strength) * moment
    shrunk.diagonal().add_(strength * mean)
    lower, info = torch.linalg.cholesky_ex(shrunk)
    if not bool(info):
        return FullMetric(lower)
    values, vectors = torch.linalg.eigh(shrunk)
    floor = torch.finfo(torch.float64).eps * size * values[-1]
    repaired = vectors * values.clamp_min(floor).sqrt()  # any root will do; QR makes it triangular
    return FullMetric(_positive_lower(repaired))


def _positive_lower(root: torch.Tensor) -> torch.Tensor:
    upper: torch.Tensor = torch.linalg.qr(root.T).R
    return (upper * upper.diagonal().sign()[:, None]).T
