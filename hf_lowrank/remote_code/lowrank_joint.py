"""Matrices that read the same input, such as query, key and value, with their first factor in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .lowrank_dense import SharingStructure, dense_shape
from .lowrank_linear import check_rank, dense_product, factor_std
from .lowrank_products import InputProduct


class SharedDown(nn.Module):
    """The first factor of several matrices that read the same input, `h = down x`, held and computed once.

    Its members call it one after the other with the very same tensor. It hands them one result, which it forgets as
    soon as each has had it, or another tensor, other weights or another mode come along.

    Shapes:
        input   (..., I)
        down    (R, I)
        output  (..., R)

    Args:
        num_members: How many matrices ask for each result.

    Raises:
        ValueError: If `rank` is not between 1 and `in_features`.
    """

    SIZES = ("rank",)

    def __init__(
        self,
        in_features: int,
        rank: int,
        num_members: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, in_features, in_features)
        self.in_features = in_features
        self.rank = rank
        self.num_members = num_members
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self._common = InputProduct(num_members)

    @classmethod
    def like(
        cls, members: Sequence[nn.Module], device: torch.device | str | None = None, *, rank: int
    ) -> "SharedDown":
        """The first factor of dense `members` of one input size, of the dtype and on the device of the first."""
        first: Any = members[0]
        in_features = dense_shape(first)[1]
        if any(dense_shape(member)[1] != in_features for member in members):
            raise ValueError(f"its members must all have {in_features} inputs.")
        return cls(in_features, rank, len(members), device or first.weight.device, first.weight.dtype)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self._common(hidden_states, [*self.down.parameters()], lambda: self.down(hidden_states))

    @property
    def shape(self) -> tuple[int, int]:
        """`(R, I)`, for reports."""
        return self.rank, self.in_features

    def multiply_adds(self) -> int:
        """Multiply-adds for one token and all members: `R I`."""
        return self.rank * self.in_features

    def reset_parameters(self, std: float) -> None:
        """Draw the factor so that its product with a member's other factor has standard deviation `std`."""
        init.normal_(self.down.weight, std=factor_std(std, self.rank))

    def extra_repr(self) -> str:
        return f"{self.in_features}, rank={self.rank}, num_members={self.num_members}"


class JointLinear(SharingStructure):
    """Linear layer of rank `R` that shares its first factor with others of the same input: `W = up @ shared.down`.

    `k` matrices of `O` rows cost `R (I + k O)` numbers and multiply-adds together, where pairs of their own cost
    `k R (I + O)`.

    Shapes:
        input   (..., I)
        up      (O, R)
        bias    (O), at `up.bias`
        output  (..., O)

    Args:
        shared: The common factor.

    Raises:
        ValueError: If the common factor has other inputs.
    """

    SIZES: tuple[str, ...] = ()
    SHARES = SharedDown
    BIAS = "up.bias"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shared: SharedDown,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_features != shared.in_features:
            raise ValueError(f"the shared factor has {shared.in_features} inputs, the matrix {in_features}.")
        self._refer_to(shared)
        self.in_features, self.out_features = in_features, out_features
        self.up = nn.Linear(shared.rank, out_features, bias=bias, device=device, dtype=dtype)

    @property
    def rank(self) -> int:
        """Inner size."""
        return self.shared.rank

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(self.shared(hidden_states))  # (..., I) -> (..., R) -> (..., O)

    def multiply_adds(self) -> int:
        """Multiply-adds for one token beside those of the shared factor: `R O`."""
        return self.rank * self.out_features

    def to_dense(self) -> torch.Tensor:
        """The weight this layer stands for, (O, I)."""
        return dense_product(self.up.weight, self.shared.down.weight)

    def reset_parameters(self, std: float) -> None:
        """Draw the layer's own factor so that the product has standard deviation `std`; zero the bias."""
        init.normal_(self.up.weight, std=factor_std(std, self.rank))
        if self.up.bias is not None:
            init.zeros_(self.up.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.up.bias is not None}"
