"""The dense matrices of a model: what a rank is chosen for."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank.hosts.disk.stored import numbers_of


@dataclass(frozen=True)
class DenseMatrix:
    """One matrix of a model that a structure could replace.

    Args:
        name: As in a plan: relative to `model.base_model`, or `output_embeddings` for an untied head.
        path: Full module name in the model.
        role: `block` (a linear layer inside a repeated block), `experts` (those of a mixture in one), `embedding` or
            `head`.
        shape: `(O, I)`, or `(V, D)` for an embedding.
    """

    name: str
    path: str
    role: str
    module: nn.Module
    shape: tuple[int, int]

    @property
    def kind(self) -> str:
        """What the matrix is to a structure: `linear`, `embedding` or `experts`."""
        return self.role if self.role in ("embedding", "experts") else "linear"

    @property
    def num_weights(self) -> int:
        """Stored numbers while dense, bias not counted."""
        return self.shape[0] * self.shape[1]

    @property
    def members(self) -> tuple["DenseMatrix", ...]:
        """The matrix itself; see `JointMatrix`."""
        return (self,)

    @property
    def parts(self) -> tuple["DenseMatrix", ...]:
        """The matrix itself; see `ExpertMatrices`."""
        return (self,)

    @property
    def dimensions(self) -> tuple[int, ...]:
        """The shape of all there is of it: that of its weight."""
        return self.shape

    @property
    def held(self) -> nn.Module | nn.Parameter:
        """What the model holds it as."""
        return self.module

    @property
    def caller(self) -> nn.Module:
        """The host's module that computes with it."""
        return self.module

    @property
    def weight(self) -> torch.Tensor:
        """The weight, (O, I)."""
        return dense_weight(self.module)


@dataclass(frozen=True)
class Expert(DenseMatrix):
    """The matrix of one expert.

    Args:
        index: Which it is.
    """

    module: nn.Module = field(compare=False)  # made anew whenever matrices are looked for
    index: int

    @property
    def weight(self) -> torch.Tensor:
        """The weight, (O, I)."""
        return dense_weight(self.module, self.index)


@dataclass(frozen=True)
class ExpertMatrices(DenseMatrix):
    """The matrices of a mixture's experts that are one parameter: each has factors of its own, all of one rank.

    Args:
        path: Full name of the parameter.
        module: Its `DenseExperts`.
        shape: `(O, I)` of each.
        experts: The host's module that has the parameter.
    """

    module: nn.Module = field(compare=False)
    experts: nn.Module

    @property
    def num_weights(self) -> int:
        """Stored numbers while dense, biases not counted."""
        return math.prod(self.dimensions)

    @property
    def dimensions(self) -> tuple[int, ...]:
        """`(E, O, I)`."""
        return len(self.parts), *self.shape

    @cached_property
    def parts(self) -> tuple[DenseMatrix, ...]:
        """The matrix of each expert."""
        held: Any = self.module.weight
        names = [f"{self.name}.{index}" for index in range(len(held))]
        return tuple(Expert(n, self.path, "block", self.module, self.shape, i) for i, n in enumerate(names))

    @property
    def held(self) -> nn.Module | nn.Parameter:
        """The parameter."""
        held: Any = self.module.weight
        return held  # type: ignore[no-any-return]

    @property
    def caller(self) -> nn.Module:
        """The host's module that has the parameter."""
        return self.experts


@dataclass(frozen=True)
class JointMatrix:
    """Matrices that read the same input, one above the other: what a common first factor is found for.

    Args:
        name: Of the part they would share, as in a plan.
        path: Full module name of that part.
    """

    name: str
    path: str
    members: tuple[DenseMatrix, ...]
    role: str = "block"
    kind: str = "linear"

    @property
    def shape(self) -> tuple[int, int]:
        """`(sum of O, I)`."""
        return sum(member.shape[0] for member in self.members), self.members[0].shape[1]

    @property
    def num_weights(self) -> int:
        """Stored numbers while dense, biases not counted."""
        return self.shape[0] * self.shape[1]

    @property
    def parts(self) -> tuple["JointMatrix", ...]:
        """Itself; see `ExpertMatrices`."""
        return (self,)

    @property
    def weight(self) -> torch.Tensor:
        """The weights one above the other, (sum of O, I)."""
        return torch.cat([member.weight for member in self.members])


# What a rank is chosen for.
Matrix = DenseMatrix | JointMatrix


def dense_weight(module: nn.Module, index: int | None = None) -> torch.Tensor:
    """The weight as `(O, I)`, or `(E, O, I)` of experts, of which `index` takes one; wherever its numbers are."""
    stored: Any = module.weight
    return turned(module, numbers_of(stored, index))


def turned(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A weight in the host's layout as `(O, I)`, or back: GPT-2's `Conv1D` and some experts have `(I, O)`."""
    return weight.mT if isinstance(module, Conv1D) or getattr(module, "is_turned", False) else weight
