"""Structures that can keep the dense weight they stand for: decoded once, or in each forward pass."""

from typing import Any

import torch
from torch import nn

from .lowrank_dense import is_exported
from .lowrank_products import state_of

MODES = ("each_forward", "once")


class Materializing(nn.Module):
    """A structure whose `to_dense` can be kept from one call to the next.

    With `materialize = "each_forward"`, the default, memory holds what is saved. With `"once"` it also holds the dense
    weight, from the first call without gradients on, and the structure is as fast as a dense layer. What is kept
    is dropped when any of the numbers it comes from changes, is never saved, and is no part of a copy.
    """

    materialize = MODES[0]
    _kept: tuple[tuple[Any, ...], torch.Tensor] | None = None

    def sources(self) -> list[torch.Tensor]:
        """Everything that the dense weight depends on."""
        return [*self.parameters(), *self.buffers()]

    @property
    def keeps_weight(self) -> bool:
        """Whether the dense weight is to be kept."""
        return self.materialize == MODES[1]

    @property
    def materialized_bytes(self) -> int:
        """What keeping the dense weight takes besides the numbers that are saved."""
        rows, columns = self.dense_size
        return rows * columns * next(self.parameters()).element_size()

    @property
    def dense_size(self) -> tuple[int, int]:
        """Shape of the dense weight."""
        raise NotImplementedError

    def to_dense(self) -> torch.Tensor:
        """The weight this module stands for."""
        raise NotImplementedError

    def materialized(self) -> torch.Tensor | None:
        """The dense weight, where it is kept; None where it is to be decoded now."""
        if not self.keeps_weight or torch.compiler.is_compiling() or is_exported():
            self._kept = None
            return None
        sources = self.sources()
        needs_gradients = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
        if needs_gradients or any(source.is_meta for source in sources):  # or offloaded: nothing is here to be decoded
            return None
        state = state_of(sources)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, self.to_dense().detach())
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}


def set_materialize_(model: nn.Module, mode: str | None) -> None:
    """Switch every structure of a model that can keep its dense weight.

    Raises:
        ValueError: If there is no such mode.
    """
    if mode not in (None, *MODES):
        raise ValueError(f"materialize must be one of {', '.join(MODES)}, got {mode!r}.")
    for module in model.modules():
        if isinstance(module, Materializing):
            module.materialize = mode or MODES[0]
            module._kept = None
