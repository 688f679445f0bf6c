"""A low-rank matrix stored by some of its own rows: the same matrix in fewer numbers than two factors."""

import warnings
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .lowrank_dense import dense_shape
from .lowrank_linear import check_rank, dense_product


class PivotedLinear(nn.Module):
    """Linear layer of rank `R` that keeps `R` rows of its weight and the others as combinations of them.

        y[pivots] = W[pivots] x        y[others] = coefficients y[pivots]

    A rank-`R` matrix in two factors has `R^2` numbers too many: an invertible `R x R` block can move between them.
    Here that block is the identity, so the same matrix costs `R (I + O) - R^2` numbers and multiply-adds, never more
    than the dense one at any rank (Zhao et al., PIFA, ICML 2025). Any rank-`R` matrix can be stored so without loss.

    Shapes:
        input         (..., I)
        pivots        (R, I), the kept rows
        coefficients  (O - R, R)
        order         (O), row of the output where each pivot, then each other row, belongs
        bias          (O), as `pivots.bias` and `coefficients.bias`: what the pivots' bias becomes under the
                      coefficients is taken off the latter
        output        (..., O)

    Args:
        rank: Number of kept rows, between 1 and `min(in_features, out_features)`.

    Raises:
        ValueError: If `rank` is outside that range.
    """

    SIZES = ("rank",)
    HOSTS = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, out_features, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.pivots = nn.Linear(in_features, rank, bias=bias, device=device, dtype=dtype)
        with warnings.catch_warnings():  # torch warns of the empty matrix at R = O, where every row is a pivot
            warnings.simplefilter("ignore", UserWarning)
            self.coefficients = nn.Linear(rank, out_features - rank, bias=bias, device=device, dtype=dtype)
        self.order: torch.Tensor
        self.register_buffer("order", torch.arange(out_features, device=device))

    @classmethod
    def like(cls, dense: nn.Module, device: torch.device | str | None = None, *, rank: int) -> "PivotedLinear":
        """A layer of the shape and dtype of `dense` (`nn.Linear` or `Conv1D`), on its device unless one is given."""
        out_features, in_features = dense_shape(dense)
        weight: Any = dense.weight
        return cls(in_features, out_features, rank, dense.bias is not None, device or weight.device, weight.dtype)

    @staticmethod
    def num_weights(out_features: int, in_features: int, *, rank: int) -> int:
        """Stored numbers, bias and row order not counted: `R (I + O) - R^2`."""
        return rank * (in_features + out_features - rank)

    def multiply_adds(self) -> int:
        """Multiply-adds for one token: `R (I + O) - R^2`."""
        return self.rank * (self.in_features + self.out_features - self.rank)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        kept = self.pivots(hidden_states)  # (..., R)
        others = self.coefficients(kept)  # (..., O - R)
        # Two writes into place cost half of joining the parts and sorting them.
        output = kept.new_empty(*kept.shape[:-1], self.out_features)
        output.index_copy_(-1, self.order[: self.rank], kept)
        return output.index_copy_(-1, self.order[self.rank :], others)

    def to_dense(self) -> torch.Tensor:
        """The weight this layer stands for, (O, I)."""
        kept = self.pivots.weight
        rows = torch.cat([kept, dense_product(self.coefficients.weight, kept)])
        return torch.empty_like(rows).index_copy(0, self.order, rows)

    def dense_bias(self) -> torch.Tensor | None:
        """The bias of the layer this one stands for, (O)."""
        if self.pivots.bias is None:
            return None
        moved = dense_product(self.coefficients.weight, self.pivots.bias[:, None])[:, 0]
        parts = torch.cat([self.pivots.bias, self.coefficients.bias + moved])
        return torch.empty_like(parts).index_copy(0, self.order, parts)

    def reset_parameters(self, std: float) -> None:
        """Draw the kept rows with that deviation, and coefficients that keep it; zero the bias; rows in order."""
        init.normal_(self.pivots.weight, std=std)
        init.normal_(self.coefficients.weight, std=self.rank**-0.5)
        for part in (self.pivots, self.coefficients):
            if part.bias is not None:
                init.zeros_(part.bias)
        init.copy_(self.order, torch.arange(self.out_features, device=self.order.device))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.pivots.bias is not None}"
