"""Two thin factors in place of one dense matrix.

Letters used in every docstring of this project: `B` batch, `T` tokens, `I` in_features, `O` out_features, `R` rank,
`D` hidden size, `V` vocabulary. Weights are `(O, I)`; an embedding table is `(V, D)`.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init

from .lowrank_dense import EmbeddingStructure, LinearStructure


def check_rank(rank: int, rows: int, columns: int) -> None:
    """Raise `ValueError` unless `1 <= rank <= min(rows, columns)`."""
    bound = min(rows, columns)
    if not 1 <= rank <= bound:
        raise ValueError(f"rank must be between 1 and {bound} for a {rows} x {columns} matrix, got {rank}.")


def factor_std(std: float, rank: int) -> float:
    """Standard deviation of two factors of i.i.d. entries whose product has standard deviation `std`.

    An entry of the product is a sum of `rank` products, so `std**2 = rank * factor_std**4`.
    """
    return float(std**0.5 * rank**-0.25)


def dense_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` of 16-bit factors without 16-bit sums, in their type."""
    wide = torch.promote_types(left.dtype, torch.float32)
    return (left.to(wide) @ right.to(wide)).to(left.dtype)


def resized_rows(values: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The first `num_rows` rows of `values`, filled up with their mean where there are fewer."""
    added = values.mean(dim=0, keepdim=True).expand(max(num_rows - len(values), 0), *values.shape[1:])
    return torch.cat([values[:num_rows], added])


class TiedFactor(nn.Module):
    """A linear layer whose weight is a factor of the token table.

    It is no `nn.Linear`, so that adapters and quantizers leave it alone: what is merged into it, or done to it, would
    be done to the table.

    Args:
        linear: Has its parameters.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias)


class LowRankLinear(LinearStructure):
    """Linear layer whose weight is a product of two thin matrices: `W = up @ down`.

    Costs `R * (I + O)` multiply-adds per token instead of `I * O`, so it pays off when `R < I * O / (I + O)`.
    Both factors are plain `nn.Linear` layers: PEFT, quantizers and accelerate's hooks treat them as they treat any.

    Shapes:
        input   (..., I)
        down    (R, I)
        up      (O, R)
        bias    (O), at `up.bias`
        output  (..., O)

    Args:
        rank: Inner size, between 1 and `min(in_features, out_features)`.

    Raises:
        ValueError: If `rank` is outside that range.
    """

    SIZES = ("rank",)
    BIAS = "up.bias"

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
        check_rank(rank, out_features, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.down: Any = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up: Any = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @staticmethod
    def num_weights(out_features: int, in_features: int, *, rank: int) -> int:
        """Stored numbers, bias not counted: `R (I + O)`."""
        return rank * (in_features + out_features)

    def multiply_adds(self) -> int:
        """Multiply-adds for one token: `R (I + O)`."""
        return self.rank * (self.in_features + self.out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(hidden_states))  # (..., I) -> (..., R) -> (..., O)

    def to_dense(self) -> torch.Tensor:
        """The weight this layer stands for, (O, I)."""
        return dense_product(self.up.weight, self.down.weight)

    def reset_parameters(self, std: float) -> None:
        """Draw the factors so that the entries of their product have standard deviation `std`; zero the bias."""
        init.normal_(self.down.weight, std=factor_std(std, self.rank))
        init.normal_(self.up.weight, std=factor_std(std, self.rank))
        if self.up.bias is not None:
            init.zeros_(self.up.bias)

    def follow_(self, embedding: Any) -> None:
        """Become the head tied to a table, the factors of which are its own."""
        if isinstance(self.up, nn.Linear):
            self.down, self.up = TiedFactor(self.down), TiedFactor(self.up)

    @torch.no_grad()
    def resize_(self, out_features: int) -> None:
        """Drop outputs from the end, or add outputs that equal the mean of the present ones."""
        self.up.weight = nn.Parameter(resized_rows(self.up.weight, out_features), self.up.weight.requires_grad)
        if self.up.bias is not None:
            self.up.bias = nn.Parameter(resized_rows(self.up.bias, out_features), self.up.bias.requires_grad)
        self.up.out_features = self.out_features = out_features

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.up.bias is not None}"


class LowRankEmbedding(EmbeddingStructure):
    """Token embedding whose table is a product of two thin matrices: `E = codes @ basis`.

    Stores `R * (V + D)` numbers instead of `V * D` and decodes only the tokens of the batch. A language-model head
    tied to it is a `LowRankLinear` with `up.weight = codes.weight` and `down.weight = basis`: factor tied to factor,
    nothing stored twice.

    Shapes:
        input   (...), token ids
        codes   (V, R)
        basis   (R, D)
        output  (..., D)

    Args:
        rank: Inner size, between 1 and `min(num_embeddings, embedding_dim)`.
        padding_idx: Row of `codes` that is zero and gets no gradient, as in `nn.Embedding`.

    Raises:
        ValueError: If `rank` is outside that range.
    """

    SIZES = ("rank",)
    TIED_HEAD = "low_rank"
    TIED_PARAMETERS: ClassVar[dict[str, str]] = {"up.weight": "codes.weight", "down.weight": "basis"}

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, num_embeddings, embedding_dim)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.rank = rank
        self.codes = nn.Embedding(num_embeddings, rank, padding_idx, device=device, dtype=dtype)
        self.basis = nn.Parameter(torch.empty(rank, embedding_dim, device=device, dtype=dtype))
        if self.basis.device.type != "meta":
            self.reset_parameters(std=0.02)

    @staticmethod
    def num_weights(num_embeddings: int, embedding_dim: int, *, rank: int) -> int:
        """Stored numbers: `R (V + D)`."""
        return rank * (num_embeddings + embedding_dim)

    def multiply_adds(self) -> int:
        """Multiply-adds for one token: `R D`; the look-up itself costs none."""
        return self.rank * self.embedding_dim

    @property
    def tied_head_sizes(self) -> dict[str, int]:
        """Sizes of the head that shares this table's factors."""
        return {"rank": self.rank}

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.codes(input_ids) @ self.basis  # (...) -> (..., R) -> (..., D)

    def to_dense(self) -> torch.Tensor:
        """The table this embedding stands for, (V, D)."""
        return dense_product(self.codes.weight, self.basis)

    def reset_parameters(self, std: float) -> None:
        """Draw the factors so that the entries of their product have standard deviation `std`."""
        init.normal_(self.codes.weight, std=factor_std(std, self.rank))
        init.normal_(self.basis, std=factor_std(std, self.rank))
        padding_idx = self.codes.padding_idx
        if padding_idx is not None and not getattr(self.codes.weight, "_is_hf_initialized", False):
            init.zeros_(self.codes.weight[padding_idx])

    @torch.no_grad()
    def resize_(self, num_embeddings: int) -> None:
        """Drop rows from the end, or add rows that decode to the mean of the present ones."""
        codes = self.codes.weight
        self.codes.weight = nn.Parameter(resized_rows(codes, num_embeddings), codes.requires_grad)
        self.codes.num_embeddings = self.num_embeddings = num_embeddings

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}, padding_idx={self.codes.padding_idx}"
