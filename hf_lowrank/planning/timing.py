"""How long linear layers take, dense and in a structure of any rank, on the machine at hand."""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_lowrank.hosts.matrices import DenseMatrix, Matrix
from hf_lowrank.planning.prices import FloatArray
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_structures import build_structure
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

# One timed call is of 8 x 128 tokens, as everywhere.
NUM_TOKENS = 1024
_WARM_UP_ROUNDS, _ROUNDS = 2, 7
# Ranks to time, as fractions of the largest one that stores no more than the dense matrix.
_FRACTIONS = (0.25, 0.5, 0.75, 1.0)
# Below the smallest rank that was timed, time falls towards this part of it: calls have a cost of their own.
_LEAST = 0.25

_PAIR = "low_rank"

# Shape of a weight, and what it is in.
Key = tuple[tuple[int, int], str]
# Layers by the number of their weights, which is that of their multiply-adds for one token.
Layers = list[tuple[int, nn.Module]]


class LayerTimes:
    """Seconds of one call on so many tokens, for every shape among some matrices: a price in the sense of `Price`.

    All layers take turns, so that whatever else the machine does meets them alike; of each the median counts. Between
    the ranks that were timed, time is a straight line in the multiply-adds, and more of them are never faster.

    Args:
        storages: What may hold a low-rank linear matrix; two factors are timed in any case, for members of one input.
        num_tokens: In one call.
    """

    def __init__(
        self,
        matrices: Sequence[DenseMatrix],
        storages: Iterable[str],
        num_tokens: int = NUM_TOKENS,
        progress: Progress = no_progress,
    ) -> None:
        first = {matrix.shape: matrix for matrix in matrices if matrix.kind == "linear"}
        layers = {(shape, "dense"): [(m.num_weights, _dense_layer(m))] for shape, m in first.items()}
        for structure in {_PAIR, *storages}:
            layers |= {(shape, structure): _timed_layers(matrix, structure) for shape, matrix in first.items()}
        medians = _take_turns(layers, num_tokens, progress)
        self._dense = {shape: medians[shape, "dense"][0] for shape in first}
        self._lines: dict[Key, tuple[FloatArray, FloatArray]] = {}
        for key, group in layers.items():
            work = np.array([0.0, *(num_weights for num_weights, _ in group)])
            seconds = np.array([_LEAST * medians[key][0], *medians[key]])
            self._lines[key] = work, np.maximum.accumulate(seconds)

    def of_entry(self, matrix: Matrix, structure: str) -> float:
        """Nothing: what a call costs however small the rank is part of the times."""
        return 0.0

    def of_dense(self, matrix: Matrix) -> float:
        """Seconds while dense; a look-up takes none, and experts are not timed."""
        return sum(self._dense.get(member.shape, 0.0) for member in matrix.members if member.kind == "linear")

    def of_ranks(self, matrix: Matrix, structure: str, ranks: NDArray[np.int64]) -> FloatArray:
        """Seconds at each rank. Members of one input share the first product; embeddings and experts never gain."""
        if matrix.kind != "linear":
            return np.full(len(ranks), np.inf)
        own = structure if isinstance(matrix, DenseMatrix) else _PAIR
        counted = STRUCTURES[own].num_weights
        total = np.zeros(len(ranks))
        for member in matrix.members:
            work = [counted(*member.shape, rank=int(rank)) for rank in ranks]
            total += np.interp(work, *self._lines[member.shape, own])
        rows, columns = matrix.members[0].shape
        shared = (len(matrix.members) - 1) * columns / (len(matrix.members) * (rows + columns))
        return total * (1 - shared)


def _take_turns(layers: Mapping[Key, Layers], num_tokens: int, progress: Progress) -> dict[Key, list[float]]:
    seconds: dict[Key, list[list[float]]] = {key: [[] for _ in group] for key, group in layers.items()}
    with torch.inference_mode():
        for turn in progress(range(_WARM_UP_ROUNDS + _ROUNDS), "timing layers"):
            for key, group in layers.items():
                for (_, layer), times in zip(group, seconds[key], strict=True):
                    spent = _time_call(layer, key[0][1], num_tokens)
                    if turn >= _WARM_UP_ROUNDS:
                        times.append(spent)
    return {key: [statistics.median(times) for times in group] for key, group in seconds.items()}


def _dense_layer(matrix: DenseMatrix) -> nn.Module:
    weight = matrix.weight
    with torch.random.fork_rng():
        return nn.Linear(matrix.shape[1], matrix.shape[0], device=weight.device, dtype=weight.dtype)


def _timed_layers(matrix: DenseMatrix, structure: str) -> Layers:
    counted = STRUCTURES[structure].num_weights
    sizes = {rank: int(counted(*matrix.shape, rank=rank)) for rank in range(1, min(matrix.shape) + 1)}
    largest = max(rank for rank, size in sizes.items() if size <= matrix.num_weights)
    dense, found = _dense_layer(matrix), []
    with torch.random.fork_rng():
        for rank in sorted({max(1, int(fraction * largest)) for fraction in _FRACTIONS}):
            layer: Any = build_structure(dense, {"structure": structure, "rank": rank})
            layer.reset_parameters(0.02)
            found.append((sizes[rank], layer))
    return found


def _time_call(layer: nn.Module, in_features: int, num_tokens: int) -> float:
    parameter = next(layer.parameters())
    hidden_states = torch.ones(num_tokens, in_features, device=parameter.device, dtype=parameter.dtype)
    if parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)
    start = time.perf_counter()
    outputs = layer(hidden_states)
    if outputs.is_cuda:
        torch.cuda.synchronize(outputs.device)
    return time.perf_counter() - start
