"""Gradients where they are needed, whatever mode the caller is in."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


def with_gradients(verb: Callable[P, R]) -> Callable[P, R]:
    """A verb that learns, which works inside `torch.no_grad()` and `torch.inference_mode()` too."""

    @wraps(verb)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            return verb(*args, **kwargs)

    return called


def leave_inference_mode_(model: nn.Module) -> None:
    """Let tensors that were made inside `torch.inference_mode()` be learned."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_inference():
            tensor.data = tensor.data.clone()
