"""The dense matrices of a host model: what counts as one, and its shape as `(O, I)` whatever the host stores."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

DENSE_LINEARS = (nn.Linear, Conv1D)


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """`(O, I)` of a linear layer or `(V, D)` of an embedding; GPT-2's `Conv1D`, stored `(I, O)`, is turned."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_kind(module: nn.Module) -> str | None:
    """`"linear"` or `"embedding"`, or None for a module without such a matrix, or a subclass with its own rules."""
    if type(module) in DENSE_LINEARS:
        return "linear"
    return "embedding" if type(module) is nn.Embedding else None
