"""What token tables of coded rows, and the language-model heads that share them, have in common."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_dense import EmbeddingStructure, LinearStructure, is_exported
from .lowrank_linear import resized_rows
from .lowrank_materialize import Materializing


class CodedRows(Materializing):
    """Rows of which codes are kept: `V` of length `D`, of the sizes a plan calls them by."""

    num_rows: int
    row_length: int
    sizes: dict[str, int]

    @property
    def dense_size(self) -> tuple[int, int]:
        """`(V, D)`."""
        return self.num_rows, self.row_length

    def reset_parameters(self, std: float) -> None:
        """Draw what is kept so that the rows' entries have standard deviation `std`."""
        raise NotImplementedError

    def _resize_rows_(self, num_rows: int) -> None:
        """Drop rows from the end, or add rows that equal the mean of the present ones."""
        raise NotImplementedError

    def _described(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


class CodedEmbedding(EmbeddingStructure, CodedRows):
    """A token embedding; to be joined with a kind of rows, which then looks them up (`_looked_up`)."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        sizes: dict[str, int],
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, sizes, device=device, dtype=dtype)
        self.padding_idx = padding_idx
        if next(self.parameters()).device.type != "meta":
            self.reset_parameters(std=0.02)

    @classmethod
    def like(cls, dense: nn.Embedding, device: torch.device | str | None = None, **sizes: int) -> Any:
        """A table of the shape, padding and dtype of `dense`, on its device unless one is given."""
        return super().like(dense, device, sizes=sizes)

    @property
    def num_embeddings(self) -> int:
        """`V`."""
        return self.num_rows

    @property
    def embedding_dim(self) -> int:
        """`D`."""
        return self.row_length

    @property
    def tied_head_sizes(self) -> dict[str, int]:
        """Sizes of the head that shares this table's numbers."""
        return self.sizes

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        table = self.materialized()
        if table is not None:
            return F.embedding(input_ids, table)
        rows = self._looked_up(input_ids)
        if self.padding_idx is not None and torch.is_grad_enabled() and not is_exported():
            rows = torch.where((input_ids == self.padding_idx)[..., None], rows.detach(), rows)
        return rows

    def _looked_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., D)."""
        raise NotImplementedError

    @torch.no_grad()
    def resize_(self, num_embeddings: int) -> None:
        """Drop tokens from the end, or add tokens whose rows are the mean of the present ones."""
        self._resize_rows_(num_embeddings)

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.row_length}, {self._described()}, padding_idx={self.padding_idx}"


class CodedHead(LinearStructure, CodedRows):
    """A language-model head; to be joined with a kind of rows, which then takes over those of a table (`_share_`).

    One tied to a table has no dense weight beside the table's.
    """

    _table: tuple[Any, ...] = ()  # in a tuple, it is no child of this module

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sizes: dict[str, int],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(out_features, in_features, sizes, device=device, dtype=dtype)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def like(cls, dense: nn.Module, device: torch.device | str | None = None, **sizes: int) -> Any:
        """A head of the shape and dtype of `dense`, on its device unless one is given."""
        return super().like(dense, device, sizes=sizes)

    @property
    def in_features(self) -> int:
        """`I`."""
        return self.row_length

    @property
    def out_features(self) -> int:
        """`O`."""
        return self.num_rows

    def follow_(self, table: CodedRows) -> None:
        """Use what the table this head is tied to keeps, instead of something of its own."""
        self._table = (table,)

    def materialized(self) -> torch.Tensor | None:
        """The dense weight, where it is kept; a tied head has none beside its table's."""
        return self._table[0].materialized() if self._table else super().materialized()

    @property
    def keeps_weight(self) -> bool:
        """Whether the dense weight is to be kept, by the table where there is one."""
        return self._table[0].keeps_weight if self._table else super().keeps_weight

    @property
    def materialized_bytes(self) -> int:
        """What keeping the dense weight takes besides the numbers that are saved."""
        return 0 if self._table else super().materialized_bytes

    def reset_parameters(self, std: float) -> None:
        super().reset_parameters(std)
        if self.bias is not None:
            init.zeros_(self.bias)

    @torch.no_grad()
    def resize_(self, out_features: int) -> None:
        """Drop outputs from the end, or add outputs that equal the mean of the present ones.

        A tied head takes over what its table, resized before, has become.
        """
        if self._table:
            self._share_(self._table[0])
        else:
            self._resize_rows_(out_features)
        if self.bias is not None:
            self.bias = nn.Parameter(resized_rows(self.bias, out_features), self.bias.requires_grad)

    def _share_(self, table: Any) -> None:
        """Have the rows of the table."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.row_length}, {self.num_rows}, {self._described()}, bias={self.bias is not None}"
