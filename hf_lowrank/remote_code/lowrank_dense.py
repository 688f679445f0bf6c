"""The dense matrices of a host model: what counts as one, its shape as `(O, I)`, and what can stand in its place."""

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
    rows, columns = weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def dense_kind(module: nn.Module) -> str | None:
    """`"linear"` or `"embedding"`, or None for a module without such a matrix, or an embedding with its own rules.

    A subclass of `nn.Linear` counts where its weight is one of that shape, which packed numbers are not.
    """
    if isinstance(module, nn.Linear):
        return "linear" if module.weight.shape == (module.out_features, module.in_features) else None
    if type(module) is Conv1D:
        return "linear"
    return "embedding" if type(module) is nn.Embedding else None


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
