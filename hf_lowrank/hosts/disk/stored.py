"""Parameters whose numbers are in a file: one NaN, spread over the shape without room, stands for them meanwhile.

Type, shape and identity are those of the parameter, so that a model is looked at, changed and counted as any other,
and what computes with a weight that nobody brought gives NaN.
"""

from typing import Any

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.files.tensors import StoredTensor

_SOURCE = "stored_in"  # where a parameter says which file it is in


def is_away(parameter: torch.Tensor) -> bool:
    """Whether the numbers of a parameter are not in memory."""
    return parameter.dim() > 0 and not any(parameter.stride())


def can_leave(parameter: torch.Tensor) -> bool:
    """Whether the numbers of a parameter are in a file too."""
    return hasattr(parameter, _SOURCE)


def source_of(parameter: torch.Tensor) -> StoredTensor:
    """Which file the numbers of a parameter that `can_leave` are in."""
    found: StoredTensor = getattr(parameter, _SOURCE)
    return found


def numbers_of(parameter: torch.Tensor, index: int | None = None) -> torch.Tensor:
    """The numbers of a parameter, wherever they are; or one of its first dimension.

    Raises:
        InputError: If one of those that are read is not finite.
    """
    if not is_away(parameter):
        return parameter.detach() if index is None else parameter.detach()[index]
    source = source_of(parameter)
    found = source.read(index)
    if found.is_floating_point() and found.numel() and not bool(torch.stack(found.aminmax()).isfinite().all()):
        raise InputError(f"{source.key!r} of {source.path} holds NaN or Inf. Repair it, or load another copy.")
    return found.to(parameter.device)


def bring_(parameter: torch.Tensor) -> None:
    """Have the numbers of a parameter in memory."""
    if is_away(parameter):
        parameter.data = numbers_of(parameter)


def let_go_(parameter: torch.Tensor) -> None:
    """Leave the numbers of a parameter to its file, if it has one."""
    if can_leave(parameter) and not is_away(parameter) and parameter.dim():
        parameter.data = nothing(parameter.shape, parameter.dtype, parameter.device)


def keep_in_(parameter: torch.Tensor, source: StoredTensor) -> None:
    """Say in which file the numbers of a parameter are from now on, and leave them there."""
    setattr(parameter, _SOURCE, source)
    if parameter.dim():
        parameter.data = nothing(parameter.shape, source.dtype, parameter.device)
    else:
        parameter.data = source.read().to(parameter.device)


def nothing(shape: torch.Size, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """What stands for numbers that are away."""
    value: Any = float("nan") if dtype.is_floating_point else 0
    return torch.full((), value, dtype=dtype, device=device).expand(shape)
