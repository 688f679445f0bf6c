"""Codes and linear decoders for a token table: bands of rows, and in closed form what each of them keeps.

The best linear autoencoder in the Euclidean norm is the SVD, so what is gained comes from elsewhere: longer codes for
frequent tokens; rows that count by their frequency; columns that count by what errors there do to the loss; a decoder
and an offset for each band. All together against plain SVD: examples/benchmark_embeddings.py.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from hf_lowrank.methods.factors import BandedSolution, balanced
from hf_lowrank.methods.metric import Metric, identity
from hf_lowrank.remote_code.lowrank_banded import Band, BandedAutoencoder, bands_of, no_order, sizes_of_bands

_CHUNK = 4096
_MOST_BANDS = 3
# Bands may begin after a half of the rows, a quarter, ...: more places gain little, and each costs decompositions.
_NUM_HALVINGS = 9
_WIDE = 1024  # columns beyond which every other place will do: a decomposition is dear there
_SMALLEST_BAND = 8
# Ranks at which the error is computed; between them it is interpolated.
_NUM_KNOWN_RANKS = 10
# Rows that never occur count as if they made up this share of the text.
_UNSEEN_SHARE = 0.1
_NUM_BISECTIONS = 40
_SMALLEST_PRICE = 1e-9


@dataclass(frozen=True)
class TableObjective:
    """What the error of a table is: `sum_v w_v (e_v - e'_v)^T M (e_v - e'_v)` with `w_v = f_v^power / |e_v|^(2 n)`.

    `f_v` is the frequency of the token, `M` the metric of the columns, `n` is 1 for errors relative to the row.

    Args:
        frequency_power: 0 lets all rows count alike.
        is_relative: Whether errors count relative to the length of the row: what is left of it is its direction.
        uses_metric: Whether `M` is the one that statistics give, or the identity.
    """

    frequency_power: float = 0.75
    is_relative: bool = False
    uses_metric: bool = True


# `loss` gave the lowest perplexities of all powers and metrics tried; `direction` is the least cosine error over all
# rows alike, to second order.
CLOSED_FORM = {
    "loss": TableObjective(),
    "direction": TableObjective(frequency_power=0, is_relative=True, uses_metric=False),
}


@dataclass(frozen=True)
class _Moments:
    """Of some rows, by their weights: `sum w e e^T` (D, D), `sum w e` (D) and `sum w`."""

    gram: torch.Tensor
    total: torch.Tensor
    weight: float


@dataclass(frozen=True)
class _Spectrum:
    """Eigenvalues (D) and eigenvectors (D, D), largest first, of a band's rows about their mean (D)."""

    values: torch.Tensor
    vectors: torch.Tensor
    mean: torch.Tensor


@dataclass(frozen=True)
class _Layout:
    bands: list[Band]
    error: float


class BandedTable:
    """Every autoencoder of one table: the best at a size, under one objective.

    Args:
        weight: (V, D).
        frequencies: How often each token occurs, in any unit, (V); None where nothing is known.
        metric: Of the columns.
        most_bands: How many bands there may be, 3 at most.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        frequencies: torch.Tensor | None = None,
        metric: Metric | None = None,
        objective: TableObjective = TableObjective(),
        most_bands: int = _MOST_BANDS,
    ) -> None:
        self._weight = weight
        self._most_bands = most_bands
        self._metric = metric if metric is not None and objective.uses_metric else identity()
        row_weights = _row_weights(weight, frequencies, objective)
        counts = row_weights if frequencies is None else frequencies.to(row_weights)
        self._order = counts.argsort(descending=True, stable=True)
        self._row_weights = row_weights[self._order]
        self._spectra: dict[tuple[int, int], _Spectrum] = {}

    def sizes(self, rank: int, itemsize: int | None = None) -> dict[str, int]:
        """The best sizes that cost no more than one band of that rank, `R (V + D) + D` numbers.

        Args:
            itemsize: Bytes of a stored number, to pay for the order of the rows as well; None leaves that out.
        """
        budget = BandedAutoencoder.num_weights(*self._weight.shape, rank=rank)
        if itemsize is not None:
            order = no_order(len(self._weight), "meta")
            budget -= -(-order.numel() * order.element_size() // itemsize)
        return sizes_of_bands(self._best(budget).bands)

    def at_rank(self, rank: int) -> BandedSolution:
        """The best codes and decoders at the size of that rank."""
        return self.at_sizes(self.sizes(rank))

    def at_sizes(self, sizes: dict[str, int]) -> BandedSolution:
        """The best codes and decoders of the sizes in a spec."""
        return self.solve(bands_of(len(self._weight), self._weight.shape[1], sizes))

    def expected(self, sizes: dict[str, int]) -> BandedSolution:
        """What `at_sizes` gives, or what stands for it while sizes are chosen."""
        return self.at_sizes(sizes)

    def solve(self, bands: Sequence[Band]) -> BandedSolution:
        """The best codes and decoders for bands of those numbers of rows and code lengths."""
        wide = self._weight.to(torch.promote_types(self._weight.dtype, torch.float32))
        ends = [0, *itertools.accumulate(rows for rows, _ in bands)]
        pairs, means = [], []
        for (start, stop), (_, rank) in zip(itertools.pairwise(ends), bands, strict=True):
            spectrum = self._spectrum(start, stop)
            vectors, mean = spectrum.vectors[:, :rank], spectrum.mean.to(wide)
            members = wide[self._order[start:stop]] - mean
            pairs.append(
                balanced(members @ self._metric.root(vectors).to(wide), self._metric.unroot(vectors).to(wide).T)
            )
            means.append(mean)
        codes, bases = tuple(pair.up for pair in pairs), tuple(pair.down for pair in pairs)
        return BandedSolution(codes, bases, torch.stack(means), self._order)

    @cached_property
    def errors(self) -> NDArray[np.float64]:
        """Loss at the size of rank 1, 2, ..., `min(V, D)`, as a fraction of that of a table of zeros."""
        rows, columns = self._weight.shape
        last = min(rows, columns)
        gram = sum((moments.gram for moments in self._between), start=torch.zeros(()))
        total = max(float(self._metric.congruent(gram).trace()), torch.finfo(torch.float64).tiny)
        known = sorted({round(last ** (step / (_NUM_KNOWN_RANKS - 1))) for step in range(_NUM_KNOWN_RANKS)})
        found = [self._best(BandedAutoencoder.num_weights(rows, columns, rank=rank)).error / total for rank in known]
        found[-1] = 0.0
        every: NDArray[np.float64] = np.interp(np.arange(1, last + 1), known, np.minimum.accumulate(found))
        return every

    @cached_property
    def _places(self) -> list[int]:
        """Where a band may begin or end."""
        rows, columns = self._weight.shape
        halvings = range(1, _NUM_HALVINGS + 1, 1 if columns <= _WIDE else 2)
        inner = {rows >> halving for halving in halvings if rows >> halving >= _SMALLEST_BAND}
        return [0, *sorted(inner), rows]

    @cached_property
    def _between(self) -> list[_Moments]:
        """The moments of the rows between two places."""
        return [self._moments(start, stop) for start, stop in itertools.pairwise(self._places)]

    def _moments(self, start: int, stop: int) -> _Moments:
        columns = self._weight.shape[1]
        zeros = torch.zeros(columns + 1, columns, dtype=torch.float64, device=self._weight.device)
        gram, total = zeros[1:], zeros[0]
        for first in range(start, stop, _CHUNK):
            chunk = slice(first, min(first + _CHUNK, stop))
            rows, weights = self._weight[self._order[chunk]].double(), self._row_weights[chunk, None]
            gram.addmm_((rows * weights).T, rows)
            total += (rows * weights).sum(dim=0)
        return _Moments(gram, total, float(self._row_weights[start:stop].sum()))

    def _spectrum(self, start: int, stop: int) -> _Spectrum:
        """What a band from one row to another keeps, at every code length."""
        if (start, stop) not in self._spectra:
            if start in self._places and stop in self._places:
                found = self._between[self._places.index(start) : self._places.index(stop)]
            else:
                found = [self._moments(start, stop)]
            weight = sum(moments.weight for moments in found)
            mean = torch.stack([moments.total for moments in found]).sum(dim=0) / weight
            gram = torch.stack([moments.gram for moments in found]).sum(dim=0) - weight * torch.outer(mean, mean)
            values, vectors = torch.linalg.eigh(self._metric.congruent(gram))
            self._spectra[start, stop] = _Spectrum(values.flip(0).clamp_min(0), vectors.flip(1), mean)
        return self._spectra[start, stop]

    def _best(self, budget: int) -> _Layout:
        """The bands with the least error out of all that can be made at the places, for a number of numbers."""
        inner = range(1, len(self._places) - 1)
        cuts = (cut for number in range(self._most_bands) for cut in itertools.combinations(inner, number))
        layouts = [self._layout([0, *(self._places[i] for i in cut), self._places[-1]], budget) for cut in cuts]
        return min(layouts, key=lambda layout: layout.error)

    def _layout(self, ends: list[int], budget: int) -> _Layout:
        """The best code lengths of given bands: one threshold on the error saved by a number, for all."""
        columns = self._weight.shape[1]
        rows = torch.tensor([stop - start for start, stop in itertools.pairwise(ends)])
        spectra = [self._spectrum(start, stop).values.cpu() for start, stop in itertools.pairwise(ends)]
        most = torch.tensor([min(len(self._weight), columns)] * len(rows))
        savings = torch.stack(spectra) / (rows + columns)[:, None]  # (K, D), decreasing along a row

        def ranks_at(price: float) -> torch.Tensor:
            return torch.minimum((savings > price).sum(dim=1).clamp_min(1), most)

        def cost_at(price: float) -> int:
            return int((ranks_at(price) * (rows + columns)).sum()) + len(rows) * columns

        low, high = 0.0, float(savings.max())
        if cost_at(low) <= budget:
            high = low
        for _ in range(_NUM_BISECTIONS if high else 0):
            middle = math.sqrt(low * high) if low else high * _SMALLEST_PRICE
            low, high = (middle, high) if cost_at(middle) > budget else (low, middle)
        ranks = ranks_at(high).tolist()
        error = sum(float(values[rank:].sum()) for values, rank in zip(spectra, ranks, strict=True))
        fits = cost_at(high) <= budget or len(rows) == 1
        return _Layout(list(zip(rows.tolist(), ranks, strict=True)), error if fits else math.inf)


def _row_weights(weight: torch.Tensor, frequencies: torch.Tensor | None, objective: TableObjective) -> torch.Tensor:
    """`w_v` of `TableObjective`, float64, (V)."""
    counts = torch.ones(len(weight)) if frequencies is None else frequencies
    shares = counts.to(weight.device, torch.float64)
    shares = (1 - _UNSEEN_SHARE) * shares / shares.sum() + _UNSEEN_SHARE / len(shares)
    weights = shares**objective.frequency_power
    if objective.is_relative:
        squares = weight.double().square().sum(dim=1)
        weights = weights / squares.clamp_min(torch.finfo(torch.float32).tiny * squares.max())
    return weights / weights.sum()
