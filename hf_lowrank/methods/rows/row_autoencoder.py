"""Codes, lengths and one linear decoder for the rows of several matrices, each with metrics of its own."""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from hf_lowrank.methods.metric import DiagonalMetric, FullMetric, Metric, identity

Operator = Callable[[torch.Tensor], torch.Tensor]

# A sweep that lowers the loss by less than this fraction is the last.
_TOLERANCE = 3e-3
_MOST_SWEEPS = 20
_SWEEPS_TO_LOOK = 2
_CG_STEPS = 3
_RIDGE = 1e-13
# Rows shorter than the square root of this, beside the longest, count like those.
_SHORTEST = 1e-12


@dataclass(frozen=True)
class Rows:
    """The rows of one matrix (N, D), and what their errors cost: `tr(G E C E^T)` for an error `E`.

    Args:
        row_metric: `G`, between rows.
        column_metric: `C`, between the entries of a row.
    """

    values: torch.Tensor
    row_metric: Metric
    column_metric: Metric

    @property
    def norms(self) -> torch.Tensor:
        """Length of each row, (N)."""
        norms: torch.Tensor = torch.linalg.norm(self.values, dim=1)
        return norms


def rows_by_direction(values: torch.Tensor) -> Rows:
    """Rows (N, D) whose errors count relative to their lengths, all entries alike: what is left is the direction."""
    squares = values.double().square().sum(dim=1)
    return Rows(values, DiagonalMetric(1 / squares.clamp_min(_SHORTEST * squares.max())), identity())


@dataclass(frozen=True)
class RowCodes:
    """What makes the rows of several matrices: `norms_i * (codes_i @ basis + offset)`.

    Args:
        codes: Of each matrix, (N, R).
        norms: Of each matrix, (N).
        basis: (R, D).
        offset: (D).
    """

    codes: list[torch.Tensor]
    norms: list[torch.Tensor]
    basis: torch.Tensor
    offset: torch.Tensor

    @property
    def products(self) -> list[torch.Tensor]:
        """The rows of each matrix."""
        pairs = zip(self.codes, self.norms, strict=True)
        return [(codes @ self.basis + self.offset) * norms[:, None] for codes, norms in pairs]


class RowAutoencoder:
    """The best linear decoder for rows of several matrices: `min sum_l tr(G_l E_l C_l E_l^T)` at any code length.

    Lengths are those of the rows. The start is closed: the leading eigenvectors of `sum_l A_l^T G_l A_l` in the mean
    of the metrics `C_l`; where these are all alike it is the optimum. From there codes and decoder are solved for in
    turns, the codes exactly, the decoder by conjugate gradients, until a sweep gains next to nothing.

    With identities for metrics this is the SVD of the matrices one above the other (Banaei et al., Findings of EACL
    2023, "concatenated"), with `G_l = diag(1 / |a_i|^2)` that of their directions.
    """

    def __init__(self, members: Sequence[Rows]) -> None:
        self._members = [_Member(rows) for rows in members]
        self._width = members[0].values.shape[1]

    @property
    def energy(self) -> float:
        """Loss of rows of zeros."""
        return sum(member.energy for member in self._members)

    @cached_property
    def errors(self) -> torch.Tensor:
        """Loss of the start at code lengths 1, 2, ..., D, float64, (D)."""
        tails = self._spectrum[0].clamp_min(0).cumsum(0).flip(0)
        return torch.cat([tails[1:], tails.new_zeros(1)])

    def errors_near(self, rank: int) -> torch.Tensor:
        """The same, all scaled so that the one of `rank` is what a few sweeps reach there, (D)."""
        if len(self._members) == 1 or not float(self.errors[rank - 1]) > 0:
            return self.errors
        *_, loss = self._swept(rank, _SWEEPS_TO_LOOK)
        return self.errors * (loss / self.errors[rank - 1])

    def solve(self, rank: int) -> RowCodes:
        """The best codes of length `rank`, and their decoder."""
        decoder, codes, _ = self._swept(rank, _MOST_SWEEPS)
        lengths = decoder[:-1].norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
        scaled = [
            torch.where(m.norms[:, None] > 0, c * lengths / m.norms[:, None], 0.0) for m, c in self._pairs(codes)
        ]
        basis = decoder[:-1] / lengths[:, None]
        return RowCodes(scaled, [member.norms for member in self._members], basis, decoder[-1])

    def _swept(self, rank: int, most: int) -> tuple[torch.Tensor, list[torch.Tensor], float]:
        """Decoder (R + 1, D), codes with the lengths multiplied in, and their loss, after at most so many sweeps."""
        _, vectors, offset = self._spectrum
        decoder = torch.cat([self._metric.unroot(vectors[:, -rank:].flip(1)).T, offset[None]])
        codes, loss = self._codes(decoder)
        for _ in range(most if rank < self._width else 0):
            found = self._decoder(codes, decoder)
            codes_found, loss_found = self._codes(found)
            if not loss_found < loss:
                break
            gained, decoder, codes, loss = loss - loss_found, found, codes_found, loss_found
            if gained < _TOLERANCE * loss or loss < torch.finfo(torch.float32).eps * self.energy:
                break
        return decoder, codes, loss

    def _pairs(self, codes: Sequence[torch.Tensor]) -> "list[tuple[_Member, torch.Tensor]]":
        return list(zip(self._members, codes, strict=True))

    @cached_property
    def _metric(self) -> Metric:
        """The mean of the members' metrics of columns, by their energy."""
        total = _total(member.energy * member.columns for member in self._members)
        lower, info = torch.linalg.cholesky_ex(total / max(self.energy, torch.finfo(torch.float64).tiny))
        return DiagonalMetric() if bool(info) else FullMetric(lower)

    @cached_property
    def _spectrum(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Eigenvalues (D) and eigenvectors (D, D), smallest first, of the rows less their offset (D)."""
        mean_trace = sum(float(member.columns.trace()) for member in self._members) / len(self._members)
        scales = [float(member.columns.trace()) / mean_trace for member in self._members]
        scaled = list(zip(scales, self._members, strict=True))
        squares = sum(scale * float(m.norms @ m.weighted_norms) for scale, m in scaled)
        sums = _total(scale * (m.weighted_norms @ m.rows) for scale, m in scaled)
        offset = sums / max(squares, torch.finfo(torch.float64).tiny)
        gram = _total(scale * (m.rows.T @ m.weighted_rows) for scale, m in scaled)
        gram = gram - squares * torch.outer(offset, offset)
        values, vectors = torch.linalg.eigh(self._metric.congruent((gram + gram.T) / 2))
        return values, vectors, offset

    def _codes(self, decoder: torch.Tensor) -> tuple[list[torch.Tensor], float]:
        """The best codes for a decoder (R + 1, D), lengths multiplied in, and the loss with them."""
        codes, loss = [], 0.0
        for member in self._members:
            found = member.codes(decoder)
            codes.append(found)
            loss += member.loss(found, decoder)
        return codes, loss

    def _decoder(self, codes: Sequence[torch.Tensor], start: torch.Tensor) -> torch.Tensor:
        """The decoder (R + 1, D) with the least loss beside these codes: `sum_l H_l X C_l = sum_l F_l C_l`."""
        systems = [member.system(found) for member, found in self._pairs(codes)]
        mean = _total(own for own, _, _ in systems)
        mean.diagonal().add_(_RIDGE * mean.trace() + torch.finfo(torch.float64).tiny)
        root = torch.linalg.cholesky(mean)

        def apply(decoder: torch.Tensor) -> torch.Tensor:
            return _total(own @ decoder @ columns for own, _, columns in systems)

        def precondition(residual: torch.Tensor) -> torch.Tensor:
            return self._metric.solve(torch.cholesky_solve(residual, root).T).T

        target = _total(wanted @ columns for _, wanted, columns in systems)
        return conjugate_gradients(apply, precondition, target, start)


def _total(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    return functools.reduce(torch.add, terms)


class _Member:
    """One matrix in float64, with all that stays the same while a decoder is sought."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows.values.double()
        self.norms = rows.norms.double()
        size = self.rows.shape[1]
        root = rows.column_metric.root(torch.eye(size, dtype=torch.float64, device=self.rows.device))
        self.columns = root @ root.T
        self._row_metric = rows.row_metric
        self.weighted_rows = applied(rows.row_metric, self.rows)
        self.weighted_norms = applied(rows.row_metric, self.norms[:, None])[:, 0]
        self.energy = float((self.weighted_rows * (self.rows @ self.columns)).sum())

    def codes(self, decoder: torch.Tensor) -> torch.Tensor:
        """The best codes (N, R), lengths multiplied in: errors of other rows do not matter to them."""
        basis, rest = decoder[:-1], self.rows - torch.outer(self.norms, decoder[-1])
        seen = basis @ self.columns
        gram = seen @ basis.T
        gram.diagonal().add_(_RIDGE * gram.trace() + torch.finfo(torch.float64).tiny)
        return torch.cholesky_solve((rest @ seen.T).T, torch.linalg.cholesky(gram)).T

    def loss(self, codes: torch.Tensor, decoder: torch.Tensor) -> float:
        """`tr(G E C E^T)`."""
        own, wanted, columns = self.system(codes)
        return self.energy + float(((own @ decoder - 2 * wanted) * (decoder @ columns)).sum())

    def system(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`H = Z^T G Z`, `F = Z^T G A` and `C` for the codes with the lengths as one more column, `Z`."""
        whole = torch.cat([codes, self.norms[:, None]], dim=1)
        weighted = torch.cat([applied(self._row_metric, codes), self.weighted_norms[:, None]], dim=1)
        return whole.T @ weighted, whole.T @ self.weighted_rows, self.columns


def applied(metric: Metric, vectors: torch.Tensor) -> torch.Tensor:
    """`M V` for (n, k) `V`."""
    return metric.root(metric.rooted(vectors))


def conjugate_gradients(
    apply: Operator, precondition: Operator, target: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """An approximate solution `X` of `apply(X) = target` from `start`, for a symmetric and positive `apply`."""
    found = start.clone()
    residual = target - apply(found)
    direction = precondition(residual)
    product = float((residual * direction).sum())
    for _ in range(_CG_STEPS):
        if not product > 0:
            break
        image = apply(direction)
        step = product / max(float((direction * image).sum()), torch.finfo(torch.float64).tiny)
        found = found + step * direction
        residual = residual - step * image
        preconditioned = precondition(residual)
        previous, product = product, float((residual * preconditioned).sum())
        direction = preconditioned + (product / previous) * direction
    return found
