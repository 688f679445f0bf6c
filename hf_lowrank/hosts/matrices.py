"""The dense matrices of a model: what a rank is chosen for."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class DenseMatrix:
    """One matrix of a model that a structure could replace.

    Args:
        name: As in a plan: relative to `model.base_model`, or `output_embeddings` for an untied head.
        path: Full module name in the model.
        role: `block` (a linear layer inside a repeated block), `embedding` or `head`.
        shape: `(O, I)`, or `(V, D)` for an embedding.
    """

    name: str
    path: str
    role: str
    module: nn.Module
    shape: tuple[int, int]

    @property
    def kind(self) -> str:
        """What the matrix is to a structure: `linear` or `embedding`."""
        return "embedding" if self.role == "embedding" else "linear"

    @property
    def num_weights(self) -> int:
        """Stored numbers while dense, bias not counted."""
        return self.shape[0] * self.shape[1]

    @property
    def members(self) -> tuple["DenseMatrix", ...]:
        """The matrix itself; see `JointMatrix`."""
        return (self,)

    @property
    def weight(self) -> torch.Tensor:
        """The weight, (O, I)."""
        return dense_weight(self.module)


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
    def weight(self) -> torch.Tensor:
        """The weights one above the other, (sum of O, I)."""
        return torch.cat([member.weight for member in self.members])


# What a rank is chosen for.
Matrix = DenseMatrix | JointMatrix


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight as `(O, I)`: the one place where GPT-2's `Conv1D`, stored `(I, O)`, is turned."""
    stored: Any = module.weight
    weight: torch.Tensor = stored.detach()
    return weight.T if isinstance(module, Conv1D) else weight
