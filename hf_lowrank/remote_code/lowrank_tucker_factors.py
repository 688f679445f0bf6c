"""Factors that the weights of many layers share: what a tensor decomposition of all of them has in common."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .lowrank_dense import dense_shape
from .lowrank_products import InputProduct


def _check(name: str, value: int, bound: int, of: str) -> None:
    if not 1 <= value <= bound:
        raise ValueError(f"{name} must be between 1 and {bound} for {of}, got {value}.")


class TuckerBasis(nn.Module):
    """The left and right factors of blocks `W_i = left C_i right^T`, held once for all of them (format III).

    Shapes:
        left   (N, L)
        right  (N, R)

    Args:
        width: Rows and columns of a block, N: the hidden size of the model.
        left_rank: L, between 1 and `width`.
        right_rank: R, between 1 and `width`.

    Raises:
        ValueError: If a rank is outside that range.
    """

    SIZES: tuple[str, ...] = ("width", "left_rank", "right_rank")

    def __init__(
        self,
        width: int,
        left_rank: int,
        right_rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check("left_rank", left_rank, width, f"blocks {width} wide")
        _check("right_rank", right_rank, width, f"blocks {width} wide")
        self.width, self.left_rank, self.right_rank = width, left_rank, right_rank
        self._last = InputProduct()
        self.left = nn.Parameter(torch.empty(width, left_rank, device=device, dtype=dtype))
        self.right = nn.Parameter(torch.empty(width, right_rank, device=device, dtype=dtype))

    @classmethod
    def like(
        cls, members: Sequence[nn.Module], device: torch.device | str | None = None, *, width: int, **sizes: int
    ) -> Any:
        """Factors for dense `members`, of the dtype and on the device of the first."""
        first: Any = members[0]
        _check("width", width, max(max(dense_shape(member)) for member in members), "these matrices")
        return cls(width, **sizes, device=device or first.weight.device, dtype=first.weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, N)`, the shape of a block, for reports."""
        return self.width, self.width

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Its parameters: a call, so that hooks which move weights about see it."""
        return self.left, self.right

    def product(self, hidden_states: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """`x factor`, once for all members that are called one after the other with the very same `x`."""
        return self._last(hidden_states, [factor], lambda: hidden_states @ factor)

    def multiply_adds(self) -> int:
        """None of its own: its members multiply by it."""
        return 0

    def reset_parameters(self, std: float) -> None:
        """Draw the factors so that blocks have the deviation of what stands between them."""
        init.normal_(self.left, std=self.left_rank**-0.5)
        init.normal_(self.right, std=self.right_rank**-0.5)

    def extra_repr(self) -> str:
        return ", ".join(f"{size}={getattr(self, size)}" for size in self.SIZES)


class TuckerBank(TuckerBasis):
    """A basis with a bank of small matrices that every block mixes its own from (format IV).

    Shapes:
        left   (N, L)
        right  (N, R)
        core   (K, L, R)

    Args:
        bank_size: K, at least 1.
    """

    SIZES = ("width", "left_rank", "right_rank", "bank_size")

    def __init__(
        self,
        width: int,
        left_rank: int,
        right_rank: int,
        bank_size: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, left_rank, right_rank, device, dtype)
        _check("bank_size", bank_size, width**2, f"blocks {width} wide")
        self.bank_size = bank_size
        self.core = nn.Parameter(torch.empty(bank_size, left_rank, right_rank, device=device, dtype=dtype))

    def forward(self) -> tuple[torch.Tensor, ...]:
        return self.left, self.right, self.core

    def reset_parameters(self, std: float) -> None:
        """Draw the factors and the bank so that a mix of weights of unit length has deviation `std`."""
        super().reset_parameters(std)
        init.normal_(self.core, std=std)
