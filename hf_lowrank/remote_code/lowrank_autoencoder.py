"""A token table of which codes and a linear decoder are kept, and the language-model head that shares them."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_banded import BandedAutoencoder
from .lowrank_tables import CodedEmbedding, CodedHead, CodedRows


class AutoencoderEmbedding(CodedEmbedding, BandedAutoencoder):
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

    TIED_HEAD = "autoencoder_head"

    @property
    def TIED_PARAMETERS(self) -> dict[str, str]:
        """Name of each of the head's numbers, and of what it is here."""
        names = ["basis", "offset", *(f"codes.{index}.weight" for index in range(len(self.bands)))]
        return dict(zip(names, names, strict=True))

    def multiply_adds(self) -> int:
        """Multiply-adds for one token, for `K` bands: `(sum of R_k + K) D`; look-ups cost none."""
        return 0 if self.keeps_weight else (sum(self.ranks) + len(self.bands)) * self.row_length

    def _looked_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._decoded(self.places[input_ids].long())

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

    def _band(self, rows: int, rank: int, **kind: Any) -> nn.Module:
        return nn.Embedding(rows, rank, **kind)


class AutoencoderHead(CodedHead, BandedAutoencoder):
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

    def follow_(self, table: CodedRows) -> None:
        """Use the order of the tokens of the table this head is tied to, and what it keeps, instead of its own."""
        super().follow_(table)
        self._buffers.pop("place", None)

    @property
    def places(self) -> torch.Tensor:
        return self._table[0].places if self._table else self.place

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
        decoders = zip(self.basis.split(self.ranks), self.offset.split(1), strict=True)
        seen = F.linear(
            hidden_states, torch.cat([rows for pair in decoders for rows in pair])
        )  # (..., sum of R_k + 1)
        parts = seen.split([size for rank in self.ranks for size in (rank, 1)], dim=-1)
        bands = [band(code) + offset for band, code, offset in zip(self.codes, parts[::2], parts[1::2], strict=True)]
        output = torch.cat(bands, dim=-1).index_select(-1, self.places.long())  # (..., O)
        return output if self.bias is None else output + self.bias

    def _share_(self, table: Any) -> None:
        codes = [band.weight for band in table.codes]
        self._become_(table.num_rows, None, codes, [table.basis], table.offset)

    def _band(self, rows: int, rank: int, **kind: Any) -> nn.Module:
        return nn.Linear(rank, rows, bias=False, **kind)
