"""What every rank of one matrix costs and what it loses: the input of every allocation."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hf_lowrank.hosts.matrices import Matrix
from hf_lowrank.hosts.targets import BLOCK_ROLES
from hf_lowrank.planning.prices import FloatArray, Price, stored_numbers

# A pair of thin matrices is two calls where the dense layer is one. Measured on two CPU cores at 8 x 128 tokens
# (examples/benchmark_speed.py), it stops being faster between 85 and 95 % of the dense multiply-adds.
LARGEST_USEFUL_FRACTION = 0.85

_SMALLEST_STEPPED = 256


@dataclass(frozen=True)
class Curve:
    """The choices for one matrix: ranks in increasing order and, last, dense.

    Args:
        structure: Name of the structure that holds a low-rank matrix.
        ranks: Rank of each choice but the last.
        costs: Cost of each choice in the unit of the budget; increasing up to the last rank.
        errors: Loss of each choice in a unit all matrices share; 0 for dense. Zeros if no spectrum was asked for.
    """

    matrix: Matrix
    structure: str
    ranks: NDArray[np.int64]
    costs: FloatArray
    errors: FloatArray

    @property
    def dense(self) -> int:
        """Index of the choice to leave the matrix dense."""
        return len(self.costs) - 1

    @property
    def dense_cost(self) -> float:
        """Cost of leaving the matrix dense."""
        return float(self.costs[-1])

    def rank_for(self, cost: float) -> int:
        """The choice of the largest rank that costs at most `cost`, at least the smallest there is."""
        affordable = int(np.searchsorted(self.costs[:-1], cost, side="right"))
        return max(min(affordable, self.dense) - 1, 0)


def make_curve(matrix: Matrix, structure: str, price: Price, errors: FloatArray | None = None) -> Curve:
    """The curve of one matrix under one structure: the ranks at which it is worth replacing, and dense.

    Args:
        price: What the budget pays for.
        errors: Loss at rank 1, 2, ..., min(O, I); None when the allocation does not look at errors.
    """
    step = rank_step(matrix)
    every = np.arange(1, min(matrix.shape) + 1)
    ranks = every[(every < step) | (every % step == 0)]
    weights = stored_numbers(matrix, structure, ranks)
    dense_cost, costs = price.of_dense(matrix), price.of_ranks(matrix, structure, ranks)
    is_useful = (weights <= most_useful_weights(matrix)) & (costs < dense_cost)
    useful_ranks = ranks[is_useful]
    losses = np.zeros(len(useful_ranks)) if errors is None else errors[useful_ranks - 1]
    return Curve(matrix, structure, useful_ranks, np.append(costs[is_useful], dense_cost), np.append(losses, 0.0))


def never_dense(curves: Sequence[Curve]) -> list[Curve]:
    """The same, but no matrix of the blocks that can be replaced may stay dense: the error of that is infinite."""
    return [
        replace(curve, errors=np.append(curve.errors[:-1], np.inf))
        if curve.dense and curve.matrix.role in BLOCK_ROLES
        else curve
        for curve in curves
    ]


def most_useful_weights(matrix: Matrix) -> float:
    """How many numbers a replacement may store and still be worth it: smaller, and for a linear layer faster."""
    return matrix.num_weights * (1.0 if matrix.kind == "embedding" else LARGEST_USEFUL_FRACTION)


def rank_step(matrix: Matrix) -> int:
    """Ranks of large matrices come in steps of the processor's vectors: others run up to a fifth slower.

    Those of experts are the same at a quarter of the size: products of all experts at once take nothing else.
    """
    size = min(matrix.shape) * (4 if matrix.kind == "experts" else 1)
    if matrix.kind == "embedding" or size < _SMALLEST_STEPPED:
        return 1
    return 16 if size >= 2 * _SMALLEST_STEPPED else 8


def spectral_errors(singular_values: FloatArray) -> FloatArray:
    """Loss of each rank by the spectrum alone: the energy it discards over the length of the matrix.

    `sum_{i>k} s_i^2 / ||W||_F`. Between the absolute energy (which starves small matrices) and the relative one (which
    starves the embedding), this kept the highest mean cosine of sentence embeddings at every budget tried.
    """
    tail = _tail_energies(singular_values)
    norm = np.sqrt(np.sum(singular_values**2))
    return tail / norm if norm > 0 else tail


def predicted_errors(singular_values: FloatArray) -> FloatArray:
    """Loss of each rank as the solver's own metric predicts it: `sum_{i>k} s_i^2`.

    In the metric of inputs and gradients that is the change of the loss to second order, from the one backward pass
    that the statistics take anyway, and comparable between matrices without running the model again.
    """
    return _tail_energies(singular_values)


def measured_errors(singular_values: FloatArray, rank: int, damage: float) -> FloatArray:
    """Loss of each rank by one measurement: `damage * tail(k) / tail(rank)` with `tail(k) = sum_{i>k} s_i^2`.

    To second order the damage grows with the discarded energy in the solver's metric; the measurement sets the scale
    that makes matrices comparable (LEMS, ICML 2026).
    """
    tail = _tail_energies(singular_values)
    known = tail[rank - 1]
    return max(damage, 0.0) * tail / known if known > 0 else np.zeros_like(tail)


def probe_rank(matrix: Matrix) -> int:
    """The rank to measure at: half the one where a pair of factors is as large as the matrix."""
    rows, columns = matrix.shape
    return max(1, rows * columns // (2 * (rows + columns)))


def _tail_energies(singular_values: FloatArray) -> FloatArray:
    energies: FloatArray = singular_values**2
    return np.append(np.cumsum(energies[::-1])[::-1][1:], 0.0)
