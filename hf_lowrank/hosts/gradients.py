"""Gradients where they are needed, whatever mode the caller is in."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

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
    """Take new tensors in place of those that were made inside `torch.inference_mode()`, which cannot learn."""
    known: dict[torch.Tensor, Any] = {}  # a tied one stays one
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    known.setdefault(tensor, copy.deepcopy(tensor))
                    tensors[name] = known[tensor]
