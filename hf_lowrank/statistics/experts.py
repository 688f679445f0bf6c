"""Watching the experts of mixtures, each on the tokens that are routed to it."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, Protocol

import torch

from hf_lowrank.hosts.matrices import DenseMatrix, ExpertMatrices
from hf_lowrank.remote_code.lowrank_experts import ChosenExperts, ExpertProducts, Multiply
from hf_lowrank.remote_code.lowrank_structures import replace_

# Rows of values by the matrix of the expert they belong to.
Split = Callable[[torch.Tensor], list[tuple[DenseMatrix, torch.Tensor]]]


class Watcher(Protocol):
    """What is told of what experts do."""

    def real_rows(self, values: torch.Tensor) -> torch.Tensor:
        """Those of (N, n) rows, one a token, that are of no padding."""
        ...

    def see_routing(self, matrix: ExpertMatrices, num_tokens: int) -> None:
        """So many tokens are about to be routed to experts."""
        ...

    def see_experts(self, split: Split, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What takes the place of what one product with matrices of experts gives; its rows are split as told."""
        ...


@contextmanager
def experts_watched(matrices: Iterable[DenseMatrix], watcher: Watcher) -> Iterator[None]:
    """Within, a watcher is told of every product with matrices of experts, and no padding is routed to them.

    The host goes expert by expert meanwhile, whichever way it takes otherwise.
    """
    chosen = [matrix for matrix in matrices if isinstance(matrix, ExpertMatrices)]
    with ExitStack() as stack:
        for experts in {id(matrix.experts): matrix.experts for matrix in chosen}.values():
            theirs = [matrix for matrix in chosen if matrix.experts is experts]
            stack.enter_context(_one_by_one(experts, theirs, watcher))
        for matrix in chosen:
            replace_(matrix.experts, matrix.name.rpartition(".")[2], _Watched(matrix, watcher))
        yield


@contextmanager
def _one_by_one(experts: Any, matrices: Sequence[ExpertMatrices], watcher: Watcher) -> Iterator[None]:
    """Within, a host's experts are called one by one and without padding; afterwards they are as they were."""
    forward, before, parameters = experts.forward, dict(vars(experts)), dict(experts._parameters)

    def without_padding(hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(hidden_states), device=hidden_states.device)
        places = watcher.real_rows(rows[:, None])[:, 0].long()
        for matrix in matrices:  # Llama 4 gives every expert a row of each token
            watcher.see_routing(matrix, len(places) // (1 if routing else len(matrix.parts)))
        found = forward(hidden_states[places], *(each[places] for each in routing))
        return torch.zeros_like(hidden_states).index_copy(0, places, found)

    vars(experts).update(forward=without_padding, config=SimpleNamespace(_experts_implementation="eager"))
    try:
        yield
    finally:
        for name in parameters.keys() & experts._modules.keys():
            delattr(experts, name)
        experts._parameters.clear()
        experts._parameters.update(parameters)
        vars(experts).clear()
        vars(experts).update(before)


class _Watched(ExpertProducts):
    """The dense matrices of experts, which tell of their products."""

    def __init__(self, matrix: ExpertMatrices, watcher: Watcher) -> None:
        super().__init__()
        self._matrix = matrix
        self._watcher = watcher

    def stored(self) -> tuple[torch.Tensor, ...]:
        """See `ExpertProducts`."""
        weight: Any = self._matrix.module.weight
        return (weight,)

    def forward(self, values: torch.Tensor, chosen: ChosenExperts, multiply: Multiply, order: Any) -> torch.Tensor:
        """See `ExpertProducts`."""
        output = super().forward(values, chosen, multiply, order)
        return self._watcher.see_experts(self._split(chosen.index, values), values, output)

    def _split(self, index: Any, values: torch.Tensor) -> Split:
        parts = self._matrix.parts
        if index is not None:
            return lambda rows: [(parts[int(index)], rows)]
        # All experts at once, (E, T, n): what a token is not routed to is given zeros.
        routed = values.detach().any(dim=-1)
        return lambda rows: [(part, rows[i][routed[i]]) for i, part in enumerate(parts)]
