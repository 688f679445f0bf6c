"""Products of weights that no batch changes: formed once where they can be kept, never stale and never saved."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def cheapest_route(costs: dict[str, tuple[int, int]], num_tokens: int, is_kept: bool) -> str:
    """The way of contracting that takes the fewest multiply-adds for a call.

    Args:
        costs: Of each way the multiply-adds for one token, and those of what no token changes.
        is_kept: Whether the latter is kept between calls, so that it costs nothing.
    """
    totals = {route: num_tokens * token + (0 if is_kept else once) for route, (token, once) in costs.items()}
    return min(totals, key=totals.__getitem__)


def state_of(tensors: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """What changes whenever one of the tensors does: their places, types and counts of changes.

    Tensors made in inference mode keep no such count.
    """
    return tuple((one.data_ptr(), one.dtype, 0 if one.is_inference() else one._version) for one in tensors)


class InputProduct:
    """A product of an input with a weight, held for whoever asks for the same one next.

    Query, key and value call with the very same tensor, one after the other. Held without gradients only (the graph
    would keep both), and no longer than the input lives.
    """

    def __init__(self) -> None:
        self._known: tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor], tuple[Any, ...], torch.Tensor] | None
        self._known = None

    def __call__(self, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """`x @ weight`."""
        # The compiler finds common products by itself; weights made in inference mode keep no count of their changes.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or weight.is_inference():
            return hidden_states @ weight
        known = self._known
        state = torch.is_autocast_enabled(hidden_states.device.type), state_of([hidden_states, weight])
        if known is None or known[0]() is not hidden_states or known[1]() is not weight or known[2] != state:
            held = weakref.ref(hidden_states, self._forget), weakref.ref(weight)
            known = self._known = (*held, state, hidden_states @ weight)
        return known[3]

    def _forget(self, _: Any) -> None:
        self._known = None


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
        return not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())

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
    """A product and all it depends on."""

    def __init__(self, name: str, weights: Sequence[torch.Tensor], value: torch.Tensor) -> None:
        self._objects = [weakref.ref(weight) for weight in weights]
        self._state = _state(name, weights)
        self.value = value

    def is_of(self, name: str, weights: Sequence[torch.Tensor]) -> bool:
        same = len(weights) == len(self._objects) and all(
            known() is weight for known, weight in zip(self._objects, weights, strict=True)
        )
        return same and self._state == _state(name, weights)


def _state(name: str, weights: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    kind = weights[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return name, autocast, state_of(weights)
