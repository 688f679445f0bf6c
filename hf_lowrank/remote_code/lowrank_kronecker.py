"""A weight as a sum of Kronecker products of two small matrices each."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_dense import LinearStructure
from .lowrank_linear import factor_std
from .lowrank_products import HeldProducts, cheapest_route

_LARGEST_RATIO = 2

Pair = tuple[int, int]


def factor_pairs(out_features: int, in_features: int) -> tuple[Pair, Pair]:
    """`(o_1, o_2)` and `(i_1, i_2)`: two factors of either size, as equal as can be.

    A size whose larger factor were more than twice the smaller is filled up to the next that has better ones: 768 =
    32 * 24, and 97, a prime, becomes 98 = 14 * 7. Outputs have their larger factor first and inputs their smaller one,
    so that both sides of a product hold about as many numbers, which is the fewest they can.
    """
    large_out, small_out = _balanced_factors(out_features)
    large_in, small_in = _balanced_factors(in_features)
    return (large_out, small_out), (small_in, large_in)


def _balanced_factors(size: int) -> Pair:
    while True:
        small = next(factor for factor in range(math.isqrt(size), 0, -1) if size % factor == 0)
        if size // small <= _LARGEST_RATIO * small:
            return size // small, small
        size += 1


def largest_kronecker_rank(out_features: int, in_features: int) -> int:
    """The most products that a sum of that shape can need: `min(o_1 i_1, o_2 i_2)`."""
    outputs, inputs = factor_pairs(out_features, in_features)
    return min(outputs[0] * inputs[0], outputs[1] * inputs[1])


def check_kronecker_rank(rank: int, out_features: int, in_features: int) -> None:
    """Raise `ValueError` unless the rank is between 1 and the most products such a sum can need."""
    bound = largest_kronecker_rank(out_features, in_features)
    if not 1 <= rank <= bound:
        raise ValueError(
            f"rank must be between 1 and {bound} for a sum of Kronecker products of a {out_features} x {in_features} "
            f"matrix, got {rank}."
        )


class KroneckerLinear(LinearStructure, HeldProducts):
    """Linear layer whose weight is a sum of Kronecker products, its outputs and inputs counted in mixed radix.

        W[(o_1, o_2), (i_1, i_2)] = sum_r left[r, o_1, i_1] right[r, o_2, i_2]

    The factors of `O` and `I` are those of `factor_pairs`; a size without good ones is filled up. A token goes through
    the left matrices first or through the right ones, or through the weight itself, whichever is cheapest for the
    call: only sums of very few products are cheaper than their weight, so that nearly always it is formed. A sum
    therefore makes a model smaller to store and not faster; what is formed is kept in evaluation mode (see
    `HeldProducts`), so that a running model then takes the memory of the dense one.

    Shapes:
        input   (..., I)
        left    (R, o_1, i_1)
        right   (R, o_2, i_2)
        bias    (O)
        output  (..., O)

    Args:
        rank: R, the number of products, between 1 and `min(o_1 i_1, o_2 i_2)`; not the rank of the weight.

    Raises:
        ValueError: If the rank is outside that range.
    """

    SIZES = ("rank",)
    largest_rank = staticmethod(largest_kronecker_rank)

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
        check_kronecker_rank(rank, out_features, in_features)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.outputs, self.inputs = factor_pairs(out_features, in_features)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.left = nn.Parameter(torch.empty(rank, self.outputs[0], self.inputs[0], **kind))
        self.right = nn.Parameter(torch.empty(rank, self.outputs[1], self.inputs[1], **kind))
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else None
        self._routes = self._costs()

    @staticmethod
    def num_weights(out_features: int, in_features: int, *, rank: int) -> int:
        """Stored numbers, bias not counted: `R (o_1 i_1 + o_2 i_2)`."""
        outputs, inputs = factor_pairs(out_features, in_features)
        return rank * (outputs[0] * inputs[0] + outputs[1] * inputs[1])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weights = self.left, self.right
        left, right = (weight.to(hidden_states.device) for weight in weights)
        route = cheapest_route(self._routes, hidden_states.numel() // self.in_features, self.keeps_products())
        if route == "dense":
            whole = self.held("dense", weights, lambda: self._formed(left, right))
            return F.linear(hidden_states, whole, self.bias)
        padded = F.pad(hidden_states, (0, math.prod(self.inputs) - self.in_features))
        states = padded.reshape(-1, *self.inputs)
        output = _through(states, left, right) if route == "left" else _through(states.mT, right, left).mT
        output = output.reshape(*hidden_states.shape[:-1], math.prod(self.outputs))[..., : self.out_features]
        return output if self.bias is None else output + self.bias

    def _costs(self) -> dict[str, tuple[int, int]]:
        """Of each route the multiply-adds for one token, and those of what no token changes."""
        (o1, o2), (i1, i2) = self.outputs, self.inputs
        return {
            "dense": (self.in_features * self.out_features, self.rank * o1 * i1 * o2 * i2),
            "left": (self.rank * o1 * i2 * (i1 + o2), 0),
            "right": (self.rank * o2 * i1 * (i2 + o1), 0),
        }

    def _formed(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The weight (O, I)."""
        (o1, o2), (i1, i2) = self.outputs, self.inputs
        whole = (left.flatten(1).T @ right.flatten(1)).reshape(o1, i1, o2, i2).transpose(1, 2)
        return whole.reshape(o1 * o2, i1 * i2)[: self.out_features, : self.in_features]

    def multiply_adds(self) -> int:
        """Multiply-adds for one token by the cheapest route, what no token changes not counted."""
        return min(token for token, _ in self._routes.values())

    def to_dense(self) -> torch.Tensor:
        """The weight this layer stands for, (O, I)."""
        wide = torch.promote_types(self.left.dtype, torch.float32)
        return self._formed(self.left.to(wide), self.right.to(wide)).to(self.left.dtype)

    def reset_parameters(self, std: float) -> None:
        """Draw both sides so that the weight has standard deviation `std`; zero the bias."""
        init.normal_(self.left, std=factor_std(std, self.rank))
        init.normal_(self.right, std=factor_std(std, self.rank))
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def _through(states: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """States (N, i_1, i_2) through the matrices of the first index, then those of the second, (N, o_1, o_2)."""
    rank, o1, i1 = first.shape
    states = first.transpose(0, 1).reshape(o1 * rank, i1) @ states  # (N, o_1 R, i_2)
    return states.unflatten(1, (o1, rank)).flatten(2) @ second.mT.flatten(0, 1)  # (N, o_1, R i_2) @ (R i_2, o_2)
