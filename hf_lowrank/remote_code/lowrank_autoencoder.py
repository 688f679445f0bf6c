"""A token table of which codes and a linear decoder are kept, and the language-model head that shares them."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_banded import BandedAutoencoder
from .lowrank_dense import dense_shape
from .lowrank_linear import resized_rows
from .lowrank_materialize import Materializing, MaterializingHead


class AutoencoderEmbedding(BandedAutoencoder):
    """Token embedding of which codes and a linear decoder with offset are kept; decodes only the tokens of the batch.

        e_t = codes_t @ basis_k + offset_k        for a token t of band k

    Balazy et al. (RepL4NLP 2021) with codes whose length follows the frequency of the token. Row norms need no place
    of their own where the decoder is linear: the codes carry them.

    Shapes:
        input   (...), token ids
        codes   (frequent, frequent_rank), (common, common_rank), (others, rank), each at `codes.<k>.weight`
        basis   (sum of the ranks, D), the decoders of the bands, one below the other
        offset  (K, D), of each band; `K` is 3, or fewer where `frequent` and `common` leave no others
        place   (V), int16 or int32: where in the codes, one band after the other, each token is
        output  (..., D)

    Args:
        sizes: `frequent` and `common`: how many tokens have codes of length `frequent_rank` and `common_rank`; all
            others have `rank`.
        padding_idx: Token whose row gets no gradient and starts at zero, as in `nn.Embedding`.

    Raises:
        ValueError: If a size is out of bounds.
    """

    HOSTS = "embedding"
    TIED_HEAD = "autoencoder_head"

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
        if self.basis.device.type != "meta":
            self.reset_parameters(std=0.02)

    @classmethod
    def like(
        cls, dense: nn.Embedding, device: torch.device | str | None = None, **sizes: int
    ) -> "AutoencoderEmbedding":
        """A table of the shape, padding and dtype of `dense`, on its device unless one is given."""
        weight = dense.weight
        return cls(*dense_shape(dense), sizes, dense.padding_idx, device or weight.device, weight.dtype)

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

    @property
    def TIED_PARAMETERS(self) -> dict[str, str]:
        """Name of each of the head's numbers, and of what it is here."""
        names = ["basis", "offset", *(f"codes.{index}.weight" for index in range(len(self.bands)))]
        return dict(zip(names, names, strict=True))

    def multiply_adds(self) -> int:
        """Multiply-adds for one token, for `K` bands: `(sum of R_k + K) D`; look-ups cost none."""
        return 0 if self.keeps_weight else (sum(self.ranks) + len(self.bands)) * self.row_length

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        table = self.materialized()
        if table is not None:
            return F.embedding(input_ids, table)
        rows = self._decoded(self.places[input_ids].long())
        if self.padding_idx is not None and torch.is_grad_enabled():
            rows = torch.where((input_ids == self.padding_idx)[..., None], rows.detach(), rows)
        return rows

    def _decoded(self, places: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., D). Each band looks up every place, its own or not: no shape depends on the tokens."""
        codes, owners = [], []
        for band, (rows, _) in zip(self.codes, self.bands, strict=True):
            is_owner = ((places >= 0) & (places < rows))[..., None]
            codes.append(band(places.clamp(0, rows - 1)) * is_owner)
            owners.append(is_owner)
            places = places - rows
        # Codes of other bands are zero, so that one product with all decoders gives each token its own.
        return torch.cat([*codes, *(owner.to(codes[0]) for owner in owners)], -1) @ torch.cat(
            [self.basis, self.offset]
        )

    def reset_parameters(self, std: float) -> None:
        super().reset_parameters(std)
        first: Any = self.codes[0]
        if self.padding_idx is not None and not getattr(first.weight, "_is_hf_initialized", False):
            place = self.padding_idx
            band: Any
            for band, (rows, _) in zip(self.codes, self.bands, strict=True):
                if 0 <= place < rows:
                    init.zeros_(band.weight[place])
                place -= rows

    @torch.no_grad()
    def resize_(self, num_embeddings: int) -> None:
        """Drop tokens from the end, or add tokens whose rows are the mean of the present ones."""
        self._resize_codes_(num_embeddings)

    def _band(self, rows: int, rank: int, **kind: Any) -> nn.Module:
        return nn.Embedding(rows, rank, **kind)

    def extra_repr(self) -> str:
        return f"{self.num_rows}, {self.row_length}, {self._described()}, padding_idx={self.padding_idx}"


class AutoencoderHead(MaterializingHead, BandedAutoencoder):
    """Language-model head that works on codes and never decodes the table: `y = codes (basis x) + offset x + bias`.

    The head of a tied `AutoencoderEmbedding`, or an untied one of its own. Bands are computed one after the
    other and their outputs put in the order of the tokens.

    Shapes:
        input   (..., I)
        codes, basis, offset, place, as in `AutoencoderEmbedding`
        bias    (O)
        output  (..., O)

    Raises:
        ValueError: If a size is out of bounds.
    """

    HOSTS = "linear"
    BIAS = "bias"

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
    def like(cls, dense: nn.Module, device: torch.device | str | None = None, **sizes: int) -> "AutoencoderHead":
        """A head of the shape and dtype of `dense`, on its device unless one is given."""
        out_features, in_features = dense_shape(dense)
        weight: Any = dense.weight
        return cls(in_features, out_features, sizes, dense.bias is not None, device or weight.device, weight.dtype)

    def follow_(self, table: Materializing) -> None:
        """Use the order of the tokens of the table this head is tied to, and what it keeps, instead of its own."""
        super().follow_(table)
        self._buffers.pop("place", None)

    @property
    def places(self) -> torch.Tensor:
        return self._table[0].places if self._table else self.place

    @property
    def in_features(self) -> int:
        """`I`."""
        return self.row_length

    @property
    def out_features(self) -> int:
        """`O`."""
        return self.num_rows

    def multiply_adds(self) -> int:
        """Multiply-adds for one token: `(sum of R_k + K) I`, and one for each number of the codes."""
        if self.keeps_weight:
            return self.num_rows * self.row_length
        codes = sum(rows * rank for rows, rank in self.bands)
        return (sum(self.ranks) + len(self.bands)) * self.row_length + codes

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.materialized()
        if weight is not None:
            return F.linear(hidden_states, weight, self.bias)
        seen = F.linear(hidden_states, torch.cat([self.basis, self.offset]))  # (..., I) -> (..., sum of R_k + K)
        *parts, offsets = seen.split([*self.ranks, len(self.bands)], dim=-1)
        bands = [
            band(part) + offsets[..., k, None] for k, (band, part) in enumerate(zip(self.codes, parts, strict=True))
        ]
        output = torch.cat(bands, dim=-1).index_select(-1, self.places.long())  # (..., O)
        return output if self.bias is None else output + self.bias

    def dense_bias(self) -> torch.Tensor | None:
        """The bias of the layer this one stands for, (O)."""
        return self.bias

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
            table: Any = self._table[0]
            codes = [band.weight for band in table.codes]
            self._become_(out_features, None, codes, [table.basis], table.offset)
        else:
            self._resize_codes_(out_features)
        if self.bias is not None:
            self.bias = nn.Parameter(resized_rows(self.bias, out_features), self.bias.requires_grad)

    def _band(self, rows: int, rank: int, **kind: Any) -> nn.Module:
        return nn.Linear(rank, rows, bias=False, **kind)

    def extra_repr(self) -> str:
        return f"{self.row_length}, {self.num_rows}, {self._described()}, bias={self.bias is not None}"
