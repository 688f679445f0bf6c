"""Giving a structure the numbers a solver has found, and how far they are from the dense weight."""

from typing import Any

import torch
from torch import nn

from hf_lowrank.solvers.storage import StateDict


def load_numbers_(structure: nn.Module, state: StateDict, dense: Any) -> None:
    """Give a structure its numbers, where the dense module's are, and train of it what was trained there."""
    placed = {name: value.to(dense.weight.device).contiguous() for name, value in state.items()}
    structure.load_state_dict(placed, strict=True, assign=True)
    for name, parameter in structure.named_parameters():
        host = dense.bias if name.endswith("bias") else dense.weight
        parameter.requires_grad_(host.requires_grad)


def relative_error(weight: torch.Tensor, structure: Any) -> float:
    """`||W - W'||_F / ||W||_F` of the weight (O, I) and what stands for it; 0 for a weight of zeros."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.norm(weight.to(wide))
    with torch.no_grad():
        difference = torch.linalg.norm(structure.to_dense().to(wide).sub_(weight))
    return float(difference / norm) if norm > 0 else 0.0
