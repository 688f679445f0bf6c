"""A weight as a train of three small tensors (a matrix product operator), its middle one shared if wanted."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_dense import LinearStructure, SharingStructure, dense_shape
from .lowrank_products import HeldProducts, cheapest_route

_NUM_CORES = 3
_LARGEST_RATIO = 2.0


def factor_shape(size: int) -> tuple[int, int, int]:
    """Three factors, as equal as can be, whose product is `size` or the next number that has such factors.

    768 = 8 * 12 * 8, 3072 = 16 * 12 * 16, and 97, a prime, is filled up to 100 = 5 * 4 * 5. The middle one, which two
    ranks meet at, is the odd one out.
    """
    while True:
        found = _balanced_factors(size)
        if found is not None:
            return found
        size += 1


def _balanced_factors(size: int) -> tuple[int, int, int] | None:
    """Ordered so that the outer two are alike; None if the largest is more than twice the smallest."""
    best = None
    for small in range(round(size ** (1 / _NUM_CORES)) + 1, 0, -1):
        if size % small:
            continue
        rest = size // small
        middle = next(factor for factor in range(math.isqrt(rest), 0, -1) if rest % factor == 0)
        low, mid, high = sorted((small, middle, rest // middle))
        if best is None or high / low < best[2] / best[0]:
            best = low, mid, high
    if best is None or best[2] > _LARGEST_RATIO * best[0]:
        return None
    low, mid, high = best
    return (low, high, mid) if high - mid > mid - low else (mid, low, high)


def check_train_ranks(left_rank: int, right_rank: int, out_features: int, in_features: int) -> None:
    """Raise `ValueError` unless both ranks are between 1 and what a cut of the train can hold."""
    first, central, last = (o * i for o, i in zip(factor_shape(out_features), factor_shape(in_features), strict=True))
    bounds = {"left_rank": min(first, central * last), "right_rank": min(last, first * central)}
    for (name, bound), rank in zip(bounds.items(), (left_rank, right_rank), strict=True):
        if not 1 <= rank <= bound:
            raise ValueError(
                f"{name} must be between 1 and {bound} for a train of a {out_features} x {in_features} matrix, "
                f"got {rank}."
            )


class TensorTrainLinear(LinearStructure, HeldProducts):
    """Linear layer whose weight is a train of three cores, its outputs and inputs counted in mixed radix.

        W[(o_1, o_2, o_3), (i_1, i_2, i_3)] = first[o_1, i_1, :] central[:, o_2, i_2, :] last[:, o_3, i_3]

    The factors of `O` and `I` are those of `factor_shape`; a size without good ones is filled up. A token goes through
    the cores from the first or from the last, or through the weight itself, whichever is cheapest for the call: the
    middle step makes the cores dear unless the ranks are very small, so that nearly always the weight is formed. A
    train therefore makes a model smaller to store and not faster; what is formed is kept in evaluation mode (see
    `HeldProducts`), so that a running model then takes the memory of the dense one.

    Shapes:
        input    (..., I)
        first    (o_1, i_1, L)
        central  (L, o_2, i_2, R)
        last     (R, o_3, i_3)
        bias     (O)
        output   (..., O)

    Args:
        left_rank: L, between 1 and what the first cut can hold, at most `o_1 i_1`.
        right_rank: R, the same for the last.

    Raises:
        ValueError: If a rank is outside that range.
    """

    SIZES: tuple[str, ...] = ("left_rank", "right_rank")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        left_rank: int,
        right_rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_train_ranks(left_rank, right_rank, out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.left_rank, self.right_rank = left_rank, right_rank
        self.outputs, self.inputs = factor_shape(out_features), factor_shape(in_features)
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.first = nn.Parameter(torch.empty(self.outputs[0], self.inputs[0], left_rank, **kind))
        self._make_central(**kind)
        self.last = nn.Parameter(torch.empty(right_rank, self.outputs[2], self.inputs[2], **kind))
        self.bias = nn.Parameter(torch.empty(out_features, **kind)) if bias else None
        self._routes = self._costs()

    def _make_central(self, **kind: Any) -> None:
        shape = self.left_rank, self.outputs[1], self.inputs[1], self.right_rank
        self.central = nn.Parameter(torch.empty(*shape, **kind))

    def _cores(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.first, self.central, self.last

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weights = self._cores()
        first, central, last = (weight.to(hidden_states.device) for weight in weights)
        route = cheapest_route(self._routes, hidden_states.numel() // self.in_features, self.keeps_products())
        if route == "dense":
            whole = self.held("dense", weights, lambda: self._formed(first, central, last))
            return F.linear(hidden_states, whole, self.bias)
        padded = F.pad(hidden_states, (0, math.prod(self.inputs) - self.in_features))
        states = padded.reshape(-1, *self.inputs)
        if route == "forward":
            output = _through(states, first, central, last)
        else:  # the train read from its other end
            turned = last.permute(1, 2, 0), central.permute(3, 1, 2, 0), first.permute(2, 0, 1)
            output = _through(states.permute(0, 3, 2, 1), *turned).permute(0, 3, 2, 1)
        output = output.reshape(*hidden_states.shape[:-1], -1)[..., : self.out_features]
        return output if self.bias is None else output + self.bias

    def _costs(self) -> dict[str, tuple[int, int]]:
        """Of each route the multiply-adds for one token, and those of what no token changes."""
        (o1, o2, o3), (i1, i2, i3), left, right = self.outputs, self.inputs, self.left_rank, self.right_rank
        middle = left * o2 * i2 * right
        formed = o1 * i1 * middle + o1 * i1 * o2 * i2 * right * o3 * i3
        return {
            "dense": (self.in_features * self.out_features, formed),
            "forward": (i1 * i2 * i3 * o1 * left + o1 * i3 * middle + o1 * o2 * right * i3 * o3, 0),
            "backward": (i1 * i2 * i3 * o3 * right + o3 * i1 * middle + o2 * o3 * left * i1 * o1, 0),
        }

    def _formed(self, first: torch.Tensor, central: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """The weight (O, I)."""
        half = first.flatten(0, 1) @ central.flatten(1)  # (o_1 i_1, o_2 i_2 R)
        whole = half.reshape(-1, self.right_rank) @ last.flatten(1)
        sizes = zip(self.outputs, self.inputs, strict=True)
        whole = whole.reshape(*(size for pair in sizes for size in pair)).permute(0, 2, 4, 1, 3, 5)
        return whole.reshape(math.prod(self.outputs), -1)[: self.out_features, : self.in_features]

    def multiply_adds(self) -> int:
        """Multiply-adds for one token by the cheapest route, what no token changes not counted."""
        return min(token for token, _ in self._routes.values())

    def to_dense(self) -> torch.Tensor:
        """The weight this layer stands for, (O, I)."""
        wide = torch.promote_types(self.first.dtype, torch.float32)
        return self._formed(*(core.to(self.first.device, wide) for core in self._cores())).to(self.first.dtype)

    def reset_parameters(self, std: float) -> None:
        """Draw the cores so that the weight has standard deviation `std`; zero the bias."""
        init.normal_(self.first, std=self.left_rank**-0.5)
        init.normal_(self.last, std=self.right_rank**-0.5)
        if "central" in self._parameters:
            init.normal_(self.central, std=std)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        sizes = f"left_rank={self.left_rank}, right_rank={self.right_rank}"
        return f"{self.in_features}, {self.out_features}, {sizes}, bias={self.bias is not None}"


class CentralCore(nn.Module):
    """The central core of the trains of several matrices of one shape, held once.

    Shapes:
        central  (L, o_2, i_2, R)

    Args:
        left_rank: L, as in `TensorTrainLinear`.
        right_rank: R.
    """

    SIZES: tuple[str, ...] = ("left_rank", "right_rank")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        left_rank: int,
        right_rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_train_ranks(left_rank, right_rank, out_features, in_features)
        self.in_features, self.out_features = in_features, out_features
        self.left_rank, self.right_rank = left_rank, right_rank
        shape = left_rank, factor_shape(out_features)[1], factor_shape(in_features)[1], right_rank
        self.central = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

    @classmethod
    def like(cls, members: Sequence[nn.Module], device: torch.device | str | None = None, **sizes: Any) -> Any:
        """The core for dense `members` of one shape, of the dtype and on the device of the first."""
        first: Any = members[0]
        out_features, in_features = dense_shape(first)
        if any(dense_shape(member) != (out_features, in_features) for member in members):
            raise ValueError(f"its members must all be {out_features} x {in_features} matrices.")
        kind = {"device": device or first.weight.device, "dtype": first.weight.dtype}
        return cls(in_features, out_features, **sizes, **kind)

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)` of its members, for reports."""
        return self.out_features, self.in_features

    def forward(self) -> torch.Tensor:
        """The core: a call, so that hooks which move weights about see it."""
        return self.central

    def multiply_adds(self) -> int:
        """None of its own: its members multiply by it."""
        return 0

    def reset_parameters(self, std: float) -> None:
        """Draw the core so that its members have standard deviation `std`."""
        init.normal_(self.central, std=std)

    def extra_repr(self) -> str:
        return ", ".join(f"{size}={getattr(self, size)}" for size in self.SIZES)


class SharedTensorTrainLinear(SharingStructure, TensorTrainLinear):
    """A `TensorTrainLinear` that shares its central core with other layers' (MPOBERT: Liu et al., EMNLP 2023).

    Args:
        shared: The core.
    """

    SIZES: tuple[str, ...] = ()
    SHARES = CentralCore

    def __init__(
        self, in_features: int, out_features: int, shared: CentralCore, bias: bool = True, **kind: Any
    ) -> None:
        self._refer_to(shared)
        super().__init__(in_features, out_features, shared.left_rank, shared.right_rank, bias, **kind)

    def _make_central(self, **kind: Any) -> None:
        pass

    def _cores(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.first, self.shared(), self.last


def _through(states: torch.Tensor, first: torch.Tensor, central: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """States (N, i_1, i_2, i_3) through the cores, one after the other, (N, o_1, o_2, o_3)."""
    num, _, i2, i3 = states.shape
    (o1, i1, left), (_, o2, _, right), o3 = first.shape, central.shape, last.shape[1]
    states = first.transpose(1, 2).reshape(o1 * left, i1) @ states.reshape(num, i1, i2 * i3)
    states = states.reshape(num, o1, left * i2, i3).transpose(2, 3)
    states = states @ central.transpose(1, 2).reshape(left * i2, o2 * right)  # (N, o_1, i_3, o_2 R)
    states = states.reshape(num, o1, i3, o2, right).permute(0, 1, 3, 4, 2).reshape(num, o1, o2, right * i3)
    return states @ last.transpose(1, 2).reshape(right * i3, o3)
