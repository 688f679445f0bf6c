"""What of a model's blocks nobody looked at, and why."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.hosts.targets import READ_ELSEWHERE, is_in_block
from hf_lowrank.remote_code.lowrank_dense import dense_kind

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NOT_A_TARGET = "not among the targets"
_FEW, _WORTH_NAMING = 3, 0.05


@dataclass(frozen=True)
class Untouched:
    """A parameter of two or more dimensions that is no candidate.

    Args:
        name: Of its module, or its own where the module has others; relative to the base model.
        reason: Why it is none.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def parameters(self) -> int:
        """Stored numbers."""
        return math.prod(self.shape)


def find_untouched(
    model: PreTrainedModel, every: Sequence[DenseMatrix], candidates: Sequence[DenseMatrix], read: frozenset[str]
) -> list[Untouched]:
    """What of two and more dimensions is in the blocks, or a convolution, and not among the candidates.

    Args:
        every: Those of `find_matrices(model)`.
        read: As in `candidate_matrices`.
    """
    reasons = {id(one.module.weight): READ_ELSEWHERE if one.path in read else _NOT_A_TARGET for one in every}
    shapes = {id(one.module.weight): one.dimensions for one in every}
    done = {id(member.module.weight) for one in candidates for member in one.members}
    found = []
    for name, module, parameter in _parameters(model.base_model):
        key = id(parameter)
        if key not in done and (is_in_block(name) or isinstance(module, _CONVOLUTIONS)):
            done.add(key)
            shape = shapes.get(key, tuple(parameter.shape))
            found.append(Untouched(name, shape, reasons.get(key) or _kind(module, parameter)))
    return found


def largest_others(model: PreTrainedModel, matrices: Sequence[DenseMatrix]) -> list[str]:
    """The largest parameters besides those of the matrices, with their share of all; small ones are not worth it."""
    whole = sum(parameter.numel() for parameter in model.parameters())
    reached = {id(member.module.weight) for one in matrices for member in one.members}
    sizes = {name.removesuffix(".weight"): p.numel() for name, p in model.named_parameters() if id(p) not in reached}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_FEW]
    return [f"{name} ({sizes[name] / whole:.0%})" for name in largest if sizes[name] >= _WORTH_NAMING * whole]


def _parameters(base: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for path, module in base.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                yield (path if name == "weight" else f"{path}.{name}", module, parameter)


def _kind(module: Any, parameter: nn.Parameter) -> str:
    if isinstance(module, _CONVOLUTIONS):
        return "a convolution"
    if isinstance(module, nn.Embedding):
        return "a table"
    if dense_kind(module) == "linear":
        return f"{type(module).__name__} computes otherwise than nn.Linear"
    return f"a parameter of {type(module).__name__}, which is no linear layer"
