"""The dense matrices of a host model: what counts as one, its shape as `(O, I)`, and what can stand in its place."""

from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .lowrank_plan import PlanError

DENSE_LINEARS = (nn.Linear, Conv1D)


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """`(O, I)` of a linear layer or `(V, D)` of an embedding; GPT-2's `Conv1D`, stored `(I, O)`, is turned."""
    weight: Any = module.weight
    rows, columns = weight.shape[-2:]
    is_turned = isinstance(module, Conv1D) or getattr(module, "is_turned", False)
    return (columns, rows) if is_turned else (rows, columns)


def dense_kind(module: nn.Module) -> str | None:
    """`"linear"`, `"embedding"` or `"experts"`; None without such a matrix, or of an embedding with its own rules.

    A subclass of `nn.Linear` counts where its weight is one of that shape, which packed numbers are not.
    """
    if isinstance(module, nn.Linear):
        return "linear" if module.weight.shape == (module.out_features, module.in_features) else None
    return {Conv1D: "linear", nn.Embedding: "embedding", DenseExperts: "experts"}.get(type(module))


class DenseExperts(nn.Module):
    """The matrices of a mixture's experts, of which hosts make one parameter: `(E, O, I)` for `E` experts.

    It stands in no model; it says of such a parameter what a linear layer says of its weight.

    Args:
        weight: The host's parameter.
        is_turned: Whether it is `(E, I, O)`.
        num_active: Experts that each token goes to.
    """

    bias = None

    def __init__(self, weight: nn.Parameter, is_turned: bool, num_active: int) -> None:
        super().__init__()
        self.weight = weight
        self.is_turned = is_turned
        self.num_active = num_active


def dense_experts(holder: nn.Module) -> dict[str, DenseExperts]:
    """The parameters of a module that are experts' matrices, by name: those with a gate or without, and their outputs.

    Transformers notes on some modules which way their matrices lie; on others their shapes tell, if there is a gate.
    """
    named = {name: getattr(holder, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")}
    found: dict[str, Any] = {name: value for name, value in named.items() if getattr(value, "ndim", 0) == 3}
    if len(found) != 2 or "down_proj" not in found or hasattr(holder, "gate_proj"):
        return {}
    first, last = (tuple(value.shape) for value in found.values())
    is_turned = getattr(holder, "is_transposed", None)
    if is_turned is None and "gate_up_proj" in found:
        is_turned = {first[1] == 2 * last[2]: False, first[2] == 2 * last[1]: True}.get(True)
    if is_turned is None:
        return {}
    active = getattr(getattr(holder, "config", None), "num_experts_per_tok", None)
    num_active = min(active, first[0]) if isinstance(active, int) else first[0]
    dense = {name: value for name, value in found.items() if isinstance(value, nn.Parameter)}
    return {name: DenseExperts(weight, is_turned, num_active) for name, weight in dense.items()}


def named_dense(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a model with its name, and after it what `dense_experts` finds in it."""
    for name, module in root.named_modules():
        yield name, module
        for leaf, experts in dense_experts(module).items():
            yield f"{name}.{leaf}" if name else leaf, experts


def is_exported() -> bool:
    """Whether what is computed now becomes a graph that runs elsewhere, with any number of tokens.

    Nothing may then hang on what was computed before, on a number of tokens or on whether there are gradients. What
    is formed of weights alone is no work: runtimes fold it.
    """
    tracing: Any = torch.jit  # torch says no types of it
    return bool(tracing.is_tracing() or torch.compiler.is_exporting())


_INITIALIZERS = ("uniform_", "normal_", "zero_", "fill_")


class GoneWeight(torch.Tensor):
    """What a host finds that asks a structure for its `weight`: shape, type and device, and no numbers.

    Hosts ask in which type a layer computes; one that computes with the numbers itself gets `PlanError`.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if str(func).split(".")[1] in _INITIALIZERS:  # some hosts reach for it when they are made
            return args[0]
        raise PlanError(
            f"The model itself computes ({func}) with the weight of a layer that is replaced. Leave that layer dense: "
            "compress with exclude_modules."
        )


def gone_weight(structure: nn.Module, rows: int, columns: int) -> torch.Tensor:
    """The answer of a structure that stands for a weight (O, I)."""
    first = next(structure.parameters())
    if torch.compiler.is_compiling():  # where no tensor of a class of ours can be made
        return torch.empty(rows, columns, dtype=first.dtype, device="meta")
    made: torch.Tensor = torch.Tensor._make_wrapper_subclass(
        GoneWeight, (rows, columns), dtype=first.dtype, device=first.device
    )
    return made


class EmbeddingStructure(nn.Module):
    """What structures in the place of a token embedding have in common.

    Their constructors take `num_embeddings`, `embedding_dim`, `padding_idx`, `device`, `dtype` and the sizes of their
    specs.
    """

    HOSTS = "embedding"

    @classmethod
    def like(cls, dense: nn.Embedding, device: torch.device | str | None = None, **sizes: Any) -> Any:
        """A table of the shape, padding and dtype of `dense`, on its device unless one is given."""
        kind: dict[str, Any] = {"device": device or dense.weight.device, "dtype": dense.weight.dtype}
        return cls(*dense_shape(dense), padding_idx=dense.padding_idx, **sizes, **kind)

    @property
    def weight(self: Any) -> torch.Tensor:
        """See `GoneWeight`."""
        return gone_weight(self, self.num_embeddings, self.embedding_dim)


class LinearStructure(nn.Module):
    """What structures in the place of a linear layer have in common.

    Their constructors take `in_features`, `out_features`, `bias`, `device`, `dtype` and the sizes of their specs.
    """

    HOSTS = "linear"
    BIAS = "bias"

    @classmethod
    def like(cls, dense: nn.Module, device: torch.device | str | None = None, **sizes: Any) -> Any:
        """A layer of the shape and dtype of `dense` (`nn.Linear` or `Conv1D`), on its device unless one is given."""
        out_features, in_features = dense_shape(dense)
        weight: Any = dense.weight
        kind: dict[str, Any] = {"device": device or weight.device, "dtype": weight.dtype}
        return cls(in_features, out_features, bias=dense.bias is not None, **sizes, **kind)

    @property
    def weight(self: Any) -> torch.Tensor:
        """See `GoneWeight`."""
        return gone_weight(self, self.out_features, self.in_features)

    def dense_bias(self) -> torch.Tensor | None:
        """The bias of the layer this one stands for, (O)."""
        bias: torch.Tensor | None = attrgetter(self.BIAS)(self)
        return bias


class SharingStructure(LinearStructure):
    """A linear structure that needs a part other layers use too, of the class `SHARES`.

    The part is registered, and saved, where the plan says: a member only refers to it.
    """

    SHARES: type[nn.Module]

    def _refer_to(self, part: nn.Module) -> None:
        self._shared = (part,)  # in a tuple, it is no child of this module

    @property
    def shared(self) -> Any:
        """The part that other layers use too."""
        return self._shared[0]
