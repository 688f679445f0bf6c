"""Products of weights that no batch changes: formed once where they can be kept, never stale and never saved."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .lowrank_dense import is_exported


def cheapest_route(costs: dict[str, tuple[int, int]], num_tokens: int, is_kept: bool) -> str:
    """The way of contracting that takes the fewest multiply-adds for a call.

    In a graph that is exported, the dense weight, where that is a way: small products move the states about between
    them, which runtimes are slow at.

    Args:
        costs: Of each way the multiply-adds for one token, and those of what no token changes.
        is_kept: Whether the latter is kept between calls, so that it costs nothing.
    """
    if is_exported():
        costs, num_tokens, is_kept = {"dense": costs["dense"]} if "dense" in costs else costs, 1, True
    best, least = "", float("inf")
    for route, (token, once) in costs.items():  # the compiler breaks its graph at `min` with a key
        total = num_tokens * token + (0 if is_kept else once)
        if total < least:
            best, least = route, total
    return best


def state_of(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What changes whenever one of the tensors does: their places, types and counts of changes.

    Tensors made in inference mode keep no such count.
    """
    return tuple((one.data_ptr(), one.dtype, 0 if one.is_inference() else one._version) for one in tensors)


class InputProduct:
    """What several callers compute of the very same input, one after the other: formed once.

    Query, key and value call so. A result is forgotten with its input, after its last use, and when anything it
    depends on has changed; a copy has none.

    Args:
        num_uses: Callers that ask for each result. Where that is not known, nothing is held with gradients: its graph
            would keep the input, and the input the result.
    """

    def __init__(self, num_uses: int | None = None) -> None:
        self._num_uses = num_uses
        self._known: _Product | None = None

    def __call__(
        self, hidden_states: torch.Tensor, weights: Sequence[torch.Tensor], form: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """`form()`, which depends on the input, the weights and the mode alone, or what it gave for the same."""
        is_unbounded = self._num_uses is None and torch.is_grad_enabled()
        is_graph = torch.compiler.is_compiling() or is_exported()  # there common products are found without us
        if is_unbounded or is_graph or any(weight.is_inference() for weight in weights):  # these count no changes
            return form()
        tensors, known = [hidden_states, *weights], self._known
        if known is None or not known.is_of("", tensors):
            known = _Product("", tensors, form(), self._forget)
        known.num_uses += 1
        self._known = None if known.num_uses == self._num_uses else known
        return known.value

    def _forget(self, _: Any) -> None:
        self._known = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}


class HeldProducts(nn.Module):
    """A module that keeps a product of weights between calls.

    Kept only in evaluation mode and without gradients; formed anew whenever a weight, its type, its device or its
    object has changed, and dropped by `train`, `to` and copying. What is kept is no parameter and no buffer, so no
    state dict holds it. (Writing through a weight's `.data` in evaluation mode is a change nobody can see.)
    """

    def __init__(self) -> None:
        super().__init__()
        self._product: _Product | None = None

    def keeps_products(self) -> bool:
        """Whether a product formed now would be kept, so that forming it costs nothing per call."""
        is_graph = torch.compiler.is_compiling() or is_exported()
        return not (self.training or torch.is_grad_enabled() or is_graph)

    def held(self, name: str, weights: Sequence[torch.Tensor], form: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `form()` gives of these weights, from memory where that still holds.

        Args:
            name: Of the product; only the last one asked for is kept.
        """
        if not self.keeps_products() or any(weight.is_inference() for weight in weights):
            return form()  # tensors made in inference mode keep no count of their changes
        product = self._product
        if product is None or not product.is_of(name, weights):
            product = self._product = _Product(name, weights, form())
        return product.value

    def train(self, mode: bool = True) -> "HeldProducts":
        self._product = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "HeldProducts":
        self._product = None
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]  # torch's

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_product": None}


class _Product:
    """A product and all it depends on.

    Args:
        forget: Called when one of the tensors is no more.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[torch.Tensor],
        value: torch.Tensor,
        forget: Callable[[Any], None] | None = None,
    ) -> None:
        self._objects = [weakref.ref(tensor, forget) for tensor in tensors]
        self._state = _state(name, tensors)
        self.value = value
        self.num_uses = 0

    def is_of(self, name: str, tensors: Sequence[torch.Tensor]) -> bool:
        same = len(tensors) == len(self._objects) and all(
            known() is tensor for known, tensor in zip(self._objects, tensors, strict=True)
        )
        return same and self._state == _state(name, tensors)


def _state(name: str, tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    kind = tensors[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return name, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, state_of(tensors)
