"""The experts of a mixture, whose matrices a host holds as one parameter, with two thin factors for each expert."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .lowrank_dense import DenseExperts, dense_shape
from .lowrank_linear import check_rank, dense_product, factor_std
from .lowrank_plan import PlanError

# What one matrix is multiplied by, and how.
Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

_GROUPED = ("grouped_mm", "grouped_mm_fallback")
_PRODUCTS = ("matmul", "bmm", *_GROUPED)
# In grouped products, and in those of their gradients, every row and column takes a multiple of so many bytes.
_ALIGNMENT = 16


class ChosenExperts:
    """Matrices that a host has taken from the parameter of its experts, to multiply by.

    Args:
        index: Which, as the host has indexed the parameter; None for all.
        is_turned: Whether the host has exchanged their rows and columns.
        dtype: The type the host wants them in; None is their own.
    """

    def __init__(
        self,
        experts: "ExpertProducts",
        index: Any = None,
        is_turned: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.experts = experts
        self.index = index
        self._is_turned = is_turned
        self.dtype = dtype or experts.dtype

    def factors(self) -> list[torch.Tensor]:
        """Tensors whose product the matrices are."""
        chosen = [factor if self.index is None else factor[self.index] for factor in self.experts.stored()]
        factors = [factor.to(self.dtype) for factor in chosen]
        return [factor.mT for factor in reversed(factors)] if self._is_turned else factors

    def transpose(self, *axes: int) -> "ChosenExperts":
        """Rows and columns exchanged."""
        return ChosenExperts(self.experts, self.index, not self._is_turned, self.dtype)

    def float(self) -> "ChosenExperts":
        """In float32."""
        return ChosenExperts(self.experts, self.index, self._is_turned, torch.float32)

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.experts.device

    def data_ptr(self) -> int:
        """Where the numbers begin; older grouped products ask."""
        return self.experts.stored()[0].data_ptr()

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self, other)  # type: ignore[arg-type]  # taken up below

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> torch.Tensor:
        name, options = func.__name__.strip("_"), dict(kwargs or {})
        if name == "linear":
            values, chosen, bias = (*args, options.get("bias"))[:3]
            product = torch.matmul(values, chosen.transpose())
            return product if bias is None else product + bias
        if name not in _PRODUCTS:
            raise PlanError(
                f"The model itself computes ({name}) with matrices of experts that are replaced. Leave them dense: "
                "compress with exclude_modules."
            )
        is_first = isinstance(args[0], ChosenExperts)
        chosen, values = args if is_first else args[::-1]

        def multiply(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
            if name in _GROUPED and not _is_aligned(factor):
                return _expert_by_expert(values, factor, options["offs"])
            found: torch.Tensor = func(*((factor, values) if is_first else (values, factor)), **options)
            return found

        found: torch.Tensor = chosen.experts(values, chosen, multiply, reversed if is_first else iter)
        return found


def _is_aligned(factor: torch.Tensor) -> bool:
    return all(size * factor.element_size() % _ALIGNMENT == 0 for size in factor.shape[-2:])


def _expert_by_expert(values: torch.Tensor, factor: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows (S, A), sorted by their experts, each with its expert's matrix of (E, A, B) -> (S, B).

    Args:
        ends: Where the rows of each expert end, (E); those after the last belong to none.
    """
    bounds = [0, *ends.tolist()]
    parts = [values[a:b] @ matrix for a, b, matrix in zip(bounds, bounds[1:], factor, strict=False)]
    return torch.cat([*parts, values.new_zeros(len(values) - bounds[-1], factor.shape[-1])])


class ExpertProducts(nn.Module):
    """What stands where a host has the parameter of its experts, and serves the host's own code as that.

    Hosts route tokens in ways of their own: expert by expert, all that were chosen in one batch, tokens sorted by
    their experts. All index the parameter, turn it and multiply by it. Here a product with `A B` is one with `A` and
    one with `B`, and the module is called for each, so that hooks see what goes in and what comes out.
    """

    def stored(self) -> tuple[torch.Tensor, ...]:
        """Tensors (E, ...) whose product is the host's parameter."""
        raise NotImplementedError

    def forward(
        self,
        values: torch.Tensor,
        chosen: ChosenExperts,
        multiply: Multiply,
        order: Callable[[list[torch.Tensor]], Iterable[torch.Tensor]],
    ) -> torch.Tensor:
        """The product of some values with the matrices that were chosen, a factor at a time."""
        for factor in order(chosen.factors()):
            values = multiply(values, factor)
        return values

    @property
    def shape(self) -> torch.Size:
        """That of the host's parameter."""
        factors = self.stored()
        return torch.Size([*factors[0].shape[:-1], factors[-1].shape[-1]])

    @property
    def ndim(self) -> int:
        """Of the host's parameter."""
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers."""
        return self.stored()[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the numbers are."""
        return self.stored()[0].device

    def __getitem__(self, index: Any) -> ChosenExperts:
        return ChosenExperts(self, index)

    def transpose(self, *axes: int) -> ChosenExperts:
        """Rows and columns exchanged."""
        return ChosenExperts(self).transpose(*axes)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(ChosenExperts(a) if isinstance(a, ExpertProducts) else a for a in args), **(kwargs or {}))


class LowRankExperts(ExpertProducts):
    """The matrices of `E` experts, each a product of two thin ones of its own: `W_e = up_e @ down_e`.

    Stores `E R (I + O)` numbers instead of `E I O`, and a token that goes to `k` experts costs `k R (I + O)`
    multiply-adds instead of `k I O`. The host routes, gates and weights as it does with dense experts.

    Shapes:
        down    (E, R, I)
        up      (E, O, R)

    Args:
        num_active: Experts that each token goes to.
        rank: Inner size, between 1 and `min(in_features, out_features)`.
        is_turned: Whether the host's parameter is `(E, I, O)` and not `(E, O, I)`.

    Raises:
        ValueError: If `rank` is outside that range.
    """

    HOSTS = "experts"
    SIZES = ("rank",)

    def __init__(
        self,
        num_experts: int,
        shape: tuple[int, int],
        num_active: int,
        rank: int,
        is_turned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        check_rank(rank, *shape)
        self.num_experts, self.num_active, self.rank, self.is_turned = num_experts, num_active, rank, is_turned
        kind: Any = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(num_experts, rank, self.in_features, **kind))
        self.up = nn.Parameter(torch.empty(num_experts, self.out_features, rank, **kind))

    @classmethod
    def like(cls, dense: DenseExperts, device: torch.device | str | None = None, *, rank: int) -> "LowRankExperts":
        """Factors for matrices of that number, shape and dtype, on their device unless one is given."""
        weight = dense.weight
        kind: Any = {"device": device or weight.device, "dtype": weight.dtype}
        return cls(len(weight), dense_shape(dense), dense.num_active, rank, dense.is_turned, **kind)

    @staticmethod
    def num_weights(out_features: int, in_features: int, *, rank: int) -> int:
        """Stored numbers for each expert: `R (I + O)`."""
        return rank * (in_features + out_features)

    @staticmethod
    def largest_rank(num_experts: int, out_features: int, in_features: int) -> int:
        """Up to which rank more of it can gain."""
        return min(out_features, in_features)

    def multiply_adds(self) -> int:
        """Multiply-adds for one token, of the experts it goes to: `k R (I + O)`."""
        return self.num_active * self.rank * (self.in_features + self.out_features)

    def stored(self) -> tuple[torch.Tensor, ...]:
        """See `ExpertProducts`."""
        return (self.down.mT, self.up.mT) if self.is_turned else (self.up, self.down)

    def to_dense(self) -> torch.Tensor:
        """The matrices they stand for, (E, O, I)."""
        return dense_product(self.up, self.down)

    def reset_parameters(self, std: float) -> None:
        """Draw the factors so that the entries of their products have standard deviation `std`."""
        init.normal_(self.down, std=factor_std(std, self.rank))
        init.normal_(self.up, std=factor_std(std, self.rank))

    def extra_repr(self) -> str:
        sizes = f"{self.num_experts}, {self.in_features}, {self.out_features}"
        return f"{sizes}, rank={self.rank}, num_active={self.num_active}"
