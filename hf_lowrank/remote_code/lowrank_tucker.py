"""Layers whose weights are blocks of one tensor: each its own small matrices between factors that all share."""

import math
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_dense import SharingStructure
from .lowrank_products import HeldProducts, cheapest_route
from .lowrank_tucker_factors import TuckerBank, TuckerBasis


class TuckerLinear(SharingStructure, HeldProducts):
    """Linear layer whose weight is a grid of blocks `left C_i right^T` with shared `left` and `right` (format III).

    Ren et al., "Exploring extreme parameter compression for pre-trained language models" (ICLR 2022). A block is a
    piece of `W^T` with the inputs on the left, or of `W` with the inputs on the right; `W` that does not fill its grid
    stands in its upper left corner. With `a`, `A` and `b`, `B` the width of a block and the rank on the side of the
    inputs and of the outputs, and a grid of `g x h` blocks, a token costs one of

        g a A + g h A B + h B b     input factor, own matrices, output factor
        g a A + g A O               own matrices merged into the output factor
        I h B + h B b               own matrices merged into the input factor

    whichever is cheapest for the call, the merging counted unless its product is kept (see `HeldProducts`). That saves
    multiply-adds where the ranks are below half the width. The dense weight is never formed.

    Shapes:
        input   (..., I)
        own     (g h, L, R), the blocks' own matrices, along the left axis of the grid first
        bias    (O)
        output  (..., O)

    Args:
        shared: The factors. They are registered, and saved, where the plan says; a member only refers to them.
        input_side: `left` or `right`.
    """

    SIZES: tuple[str, ...] = ()
    OPTIONS: ClassVar[dict[str, tuple[str, ...]]] = {"input_side": ("left", "right")}
    SHARES: type[TuckerBasis] = TuckerBasis

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shared: TuckerBasis,
        input_side: str = "left",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._refer_to(shared)
        self.in_features, self.out_features, self.input_side = in_features, out_features, input_side
        self.grid = -(-in_features // shared.width), -(-out_features // shared.width)  # g, h
        self.own = nn.Parameter(torch.empty(*self._own_shape(), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._routes = self._costs()

    def _own_shape(self) -> tuple[int, ...]:
        return math.prod(self.grid), self.shared.left_rank, self.shared.right_rank

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weights = self.shared()
        left, right, *rest = (weight.to(hidden_states.device) for weight in weights)
        factor_in, factor_out = (left, right) if self.input_side == "left" else (right, left)
        route = cheapest_route(self._routes, hidden_states.numel() // self.in_features, self.keeps_products())
        # Kept with the bias as one more column: a pass over the few states then, and none over the many outputs.
        column = self.bias if route == "output" and self.keeps_products() else None
        sources = [self.own, *weights, *([] if column is None else [column])]

        def form() -> torch.Tensor:
            merged = self._formed(route, factor_in, factor_out, *rest)
            return merged if column is None else torch.cat([merged, column[:, None]], dim=1)

        merged = self.held(route, sources, form)
        states = hidden_states if route == "input" else self._projected(hidden_states, factor_in)  # (..., g A)
        if column is not None:
            return F.linear(F.pad(states, (0, 1), value=1.0), merged)
        if route == "output":
            return F.linear(states, merged, self.bias)  # (..., O)
        states = F.linear(states, merged)  # (..., h B)
        if self.grid[1] == 1 and factor_out.shape[0] == self.out_features:
            return F.linear(states, factor_out, self.bias)
        output = (states.unflatten(-1, (self.grid[1], -1)) @ factor_out.T).flatten(-2)[..., : self.out_features]
        return output if self.bias is None else output + self.bias

    def _projected(self, states: torch.Tensor, factor_in: torch.Tensor) -> torch.Tensor:
        """Each piece of the inputs times the factor, (..., I) -> (..., g A)."""
        num_in, width = self.grid[0], self.shared.width
        if num_in * width != self.in_features:
            states = F.pad(states, (0, num_in * width - self.in_features))
        if num_in == 1:
            return self.shared.product(states, factor_in)
        return (states.unflatten(-1, (num_in, width)) @ factor_in).flatten(-2)

    def _costs(self) -> dict[str, tuple[int, int]]:
        """Of each route the multiply-adds for one token, and those of what no token changes."""
        (num_in, num_out), width = self.grid, self.shared.width
        ranks = self.shared.left_rank, self.shared.right_rank
        rank_in, rank_out = ranks if self.input_side == "left" else ranks[::-1]
        expand, project = num_out * rank_out * width, num_in * width * rank_in
        between, mixing = num_in * num_out * rank_in * rank_out, self._mixing_cost()
        return {
            "separate": (project + between + expand, mixing),
            "output": (project + num_in * rank_in * self.out_features, mixing + between * width),
            "input": (self.in_features * num_out * rank_out + expand, mixing + between * width),
        }

    def _mixing_cost(self) -> int:
        return 0

    def _cores(self, *bank: torch.Tensor) -> torch.Tensor:
        """The blocks' own matrices, (g h, L, R)."""
        return self.own

    def _formed(
        self, route: str, factor_in: torch.Tensor, factor_out: torch.Tensor, *bank: torch.Tensor
    ) -> torch.Tensor:
        """What a route multiplies by between or instead of the factors, from the input side to the output side."""
        (num_in, num_out), cores = self.grid, self._cores(*bank)
        if self.input_side == "left":
            cores = cores.unflatten(0, (num_in, num_out))  # (g, h, A, B)
        else:
            cores = cores.unflatten(0, (num_out, num_in)).permute(1, 0, 3, 2)
        if route == "output":  # (O, g A)
            merged = (cores @ factor_out.T).permute(1, 3, 0, 2).flatten(2).flatten(0, 1)
            return merged[: self.out_features]
        if route == "input":  # (h B, I)
            return (factor_in @ cores).permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[:, : self.in_features]
        return cores.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)  # (h B, g A)

    def multiply_adds(self) -> int:
        """Multiply-adds for one token by the cheapest route, what no token changes not counted."""
        return min(token for token, _ in self._routes.values())

    def to_dense(self) -> torch.Tensor:
        """The weight this layer stands for, (O, I)."""
        wide = torch.promote_types(self.own.dtype, torch.float32)
        left, right, *rest = (weight.to(self.own.device, wide) for weight in self.shared())
        blocks = left @ self._cores(*rest).to(wide) @ right.T  # (g h, N, N)
        num_left, num_right = self.grid if self.input_side == "left" else self.grid[::-1]
        whole = blocks.unflatten(0, (num_left, num_right)).transpose(1, 2).flatten(2).flatten(0, 1)
        whole = whole.T if self.input_side == "left" else whole
        return whole[: self.out_features, : self.in_features].to(self.own.dtype)

    def reset_parameters(self, std: float) -> None:
        """Draw the layer's own matrices so that its weight has standard deviation `std`; zero the bias."""
        init.normal_(self.own, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, input_side={self.input_side}, bias={self.bias is not None}"


class BankedTuckerLinear(TuckerLinear):
    """A `TuckerLinear` whose blocks' own matrices are mixed from a bank: `C_i = sum_k own_ik core_k` (format IV).

    Shapes:
        own  (g h, K)
    """

    SHARES = TuckerBank

    def _own_shape(self) -> tuple[int, ...]:
        return math.prod(self.grid), self.shared.bank_size

    def _mixing_cost(self) -> int:
        shared = self.shared
        return math.prod(self.grid) * int(shared.bank_size * shared.left_rank * shared.right_rank)

    def _cores(self, *bank: torch.Tensor) -> torch.Tensor:
        (core,) = bank
        return (self.own @ core.to(self.own.dtype).flatten(1)).unflatten(1, core.shape[1:])

    def reset_parameters(self, std: float) -> None:
        """Draw the mixing weights so that a mix has the deviation of the bank; zero the bias."""
        super().reset_parameters(self.shared.bank_size**-0.5)
