"""A token table of which codes, lengths and a non-linear decoder are kept, and the language-model head tied to it."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_autoencoder_linear import NonlinearDecoder
from .lowrank_dense import is_exported
from .lowrank_linear import resized_rows
from .lowrank_tables import CodedEmbedding, CodedHead, CodedRows


class NonlinearAutoencoderTable(CodedRows):
    """What a token table and a head have in common: rows `W_v = norm_v * f(code_v) / |f(code_v)|`, decoded by one `f`.

    No code stands for the mean of the rows where `f` is not linear. Rows added later are therefore kept as they are,
    after the decoded ones, and are the first to be dropped.

    Args:
        num_rows: `V`.
        row_length: `D`.
        sizes: `code_length`, and `added` where rows are kept as they are.

    Raises:
        ValueError: If a size is out of bounds.
    """

    SIZES = ("code_length",)
    OPTIONAL_SIZES = ("added",)

    def __init__(self, num_rows: int, row_length: int, sizes: dict[str, int], **kind: Any) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.row_length = row_length
        self.sizes = sizes
        self.rank, num_added = sizes["code_length"], sizes.get("added", 0)
        if not 1 <= self.rank <= row_length:
            raise ValueError(
                f"code_length must be between 1 and {row_length} for rows of that length, got {self.rank}."
            )
        if not 0 <= num_added < num_rows:
            raise ValueError(f"added must be between 0 and {num_rows - 1} for {num_rows} rows, got {num_added}.")
        self.codes = nn.Parameter(torch.empty(num_rows - num_added, self.rank, **kind))
        self.norms = nn.Parameter(torch.empty(num_rows - num_added, **kind))
        self.decoder = NonlinearDecoder(row_length, self.rank, **kind)
        self.added = nn.Parameter(torch.empty(num_added, row_length, **kind)) if num_added else None

    @staticmethod
    def num_weights(num_rows: int, row_length: int, *, rank: int = 0, code_length: int = 0) -> int:
        """Stored numbers, bias and added rows not counted: `10 R^2 + (V + 6 + 4 D) R + V + D` at code length `R`.

        `rank` alone counts what a budget pays for: a linear autoencoder of that rank, `rank * (V + D) + D`, but no
        less than codes of one number.
        """
        if code_length:
            return num_rows * (code_length + 1) + NonlinearDecoder.num_numbers(row_length, code_length)
        least = NonlinearAutoencoderTable.num_weights(num_rows, row_length, code_length=1)
        return max(rank * (num_rows + row_length) + row_length, least)

    def to_dense(self) -> torch.Tensor:
        """The weight this module stands for, (V, D)."""
        rows = self._decoded(self.codes, self.norms[:, None])
        return rows if self.added is None else torch.cat([rows, self.added])

    def _decoded(self, codes: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """(N, R), (N, 1) -> (N, D), brought to their lengths in float32 at least."""
        wide = torch.promote_types(codes.dtype, torch.float32)
        directions = F.normalize(self.decoder(codes).to(wide), dim=1)
        return (directions * norms.to(wide)).to(codes.dtype)

    def reset_parameters(self, std: float) -> None:
        """Draw codes, decoder and added rows so that the rows' entries have standard deviation `std`."""
        self.decoder.reset_parameters(std)
        init.normal_(self.codes)
        init.constant_(self.norms, std * self.row_length**0.5)
        if self.added is not None:
            init.normal_(self.added, std=std)

    def _resize_rows_(self, num_rows: int) -> None:
        """Drop rows from the end, or add rows that equal the mean of the present ones."""
        rows = resized_rows(self.to_dense(), num_rows)
        self._become_(self.codes[:num_rows], self.norms[:num_rows], rows[len(self.codes) :])

    def _become_(self, codes: torch.Tensor, norms: torch.Tensor, added: torch.Tensor | None) -> None:
        is_trained = self.codes.requires_grad
        added = added if added is not None and len(added) else None
        self.num_rows = len(codes) + (0 if added is None else len(added))
        self.sizes = {"code_length": self.rank, **({} if added is None else {"added": len(added)})}
        self.codes, self.norms = (nn.Parameter(own.clone(), is_trained) for own in (codes, norms))
        self.added = None if added is None else nn.Parameter(added.clone(), is_trained)


class NonlinearAutoencoderEmbedding(CodedEmbedding, NonlinearAutoencoderTable):
    """Token embedding with a non-linear decoder: each token of the batch is decoded once.

        e_t = norm_t * f(code_t) / |f(code_t)|

    The offline compression of Banaei et al. (Findings of EACL 2023), `f` their decoder; see `NonlinearDecoder`.

    Shapes:
        input   (...), token ids
        codes   (V - N, R)
        norms   (V - N)
        added   (N, D), the last rows of the table as they are; none of this where the table did not grow
        output  (..., D)

    Args:
        sizes: `code_length`, `R`, and `added`, `N`, where the table grew.
        padding_idx: Token whose row gets no gradient and starts at zero, as in `nn.Embedding`.

    Raises:
        ValueError: If a size is out of bounds.
    """

    TIED_HEAD = "nonlinear_autoencoder_head"

    @property
    def TIED_PARAMETERS(self) -> dict[str, str]:
        """Name of each of the head's numbers, and of what it is here."""
        return {name: name for name, _ in self.named_parameters()}

    def multiply_adds(self) -> int:
        """Multiply-adds for one token: `10 R^2 + 4 R D`; look-ups cost none."""
        return 0 if self.keeps_weight else self.decoder.decoding_cost()

    def _looked_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or is_exported():  # no shape may depend on the tokens
            return self._rows(input_ids.flatten()).unflatten(0, input_ids.shape)
        distinct, places = input_ids.unique(return_inverse=True)
        return F.embedding(places, self._rows(distinct))

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        """(N) -> (N, D)."""
        num_decoded = len(self.codes)
        decoded = ids if self.added is None else ids.clamp(max=num_decoded - 1)
        rows = self._decoded(F.embedding(decoded, self.codes), F.embedding(decoded, self.norms[:, None]))
        if self.added is None:
            return rows
        as_they_are = F.embedding((ids - num_decoded).clamp(min=0), self.added)
        return torch.where((ids < num_decoded)[:, None], rows, as_they_are)

    def reset_parameters(self, std: float) -> None:
        super().reset_parameters(std)
        is_drawn = not getattr(self.norms, "_is_hf_initialized", False)
        if self.padding_idx is not None and is_drawn and self.padding_idx < len(self.norms):
            init.zeros_(self.norms[self.padding_idx])


class NonlinearAutoencoderHead(CodedHead, NonlinearAutoencoderTable):
    """Language-model head with a non-linear decoder: `y = W x + bias`, where `W` has the rows of the decoded table.

    The head of a tied `NonlinearAutoencoderEmbedding`, or an untied one of its own. Nothing can be multiplied by but
    the decoded weight: with `materialize = "each_forward"` a call decodes all rows, with `"once"` it is a dense head.

    Shapes:
        input   (..., I)
        codes, norms, added, as in `NonlinearAutoencoderEmbedding`
        bias    (O)
        output  (..., O)

    Raises:
        ValueError: If a size is out of bounds.
    """

    def multiply_adds(self) -> int:
        """Multiply-adds for one token, and its share of the decoding in a call of 8 x 128."""
        decoding = 0 if self.keeps_weight else self.decoder.cost_for_a_token(len(self.codes))
        return self.num_rows * self.row_length + decoding

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.materialized()
        return F.linear(hidden_states, self.to_dense() if weight is None else weight, self.bias)

    def _share_(self, table: Any) -> None:
        self._become_(table.codes, table.norms, table.added)
