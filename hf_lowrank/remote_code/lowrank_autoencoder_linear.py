"""Weights of which codes and lengths of the rows are kept, with a decoder for the rows of one or of many layers."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_dense import SharingStructure, dense_shape
from .lowrank_linear import check_rank
from .lowrank_materialize import Materializing

# Which neurons a row is the weights of: those of the outputs, (O) rows of length I, or of the inputs, the columns.
ROWS = ("output", "input")
_HIDDEN_GAIN = 2**0.5
# What serves all tokens of a call is counted for calls of the size that latency is measured at, 8 x 128.
_TOKENS_OF_A_CALL = 1024


def row_shape(dense: nn.Module, rows: str) -> tuple[int, int]:
    """How many rows a dense module has, and their length."""
    outputs, inputs = dense_shape(dense)
    return (outputs, inputs) if rows == ROWS[0] else (inputs, outputs)


class LinearDecoder(nn.Module):
    """Linear map with offset from codes to rows, `row = code @ basis + offset`, held once for all that use it.

    Shapes:
        basis   (R, D)
        offset  (D)

    Args:
        width: Length of a row, D.
        rank: Length of a code, R, between 1 and D.
        rows: `output` or `input`: which neurons of its members' matrices have a row.

    Raises:
        ValueError: If `rank` is outside that range.
    """

    SIZES: tuple[str, ...] = ("rank",)
    OPTIONS: ClassVar[dict[str, tuple[str, ...]]] = {"rows": ROWS}

    def __init__(
        self,
        width: int,
        rank: int,
        rows: str = ROWS[0],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, width, width)
        self.width, self.rank, self.rows = width, rank, rows
        self._build(device=device, dtype=dtype)

    def _build(self, **kind: Any) -> None:
        self.basis = nn.Parameter(torch.empty(self.rank, self.width, **kind))
        self.offset = nn.Parameter(torch.empty(self.width, **kind))

    @classmethod
    def like(
        cls, members: Sequence[nn.Module], device: torch.device | str | None = None, *, rank: int, rows: str = ROWS[0]
    ) -> Any:
        """A decoder for dense `members` with rows of one length, of the dtype and on the device of the first."""
        first: Any = members[0]
        widths = {row_shape(member, rows)[1] for member in members}
        if len(widths) > 1:
            raise ValueError(f"the rows of its members must have one length, got {sorted(widths)}.")
        return cls(widths.pop(), rank, rows, device or first.weight.device, first.weight.dtype)

    @staticmethod
    def num_numbers(width: int, rank: int) -> int:
        """Stored numbers: `R D + D`."""
        return rank * width + width

    @property
    def shape(self) -> tuple[int, int]:
        """`(R, D)`, for reports."""
        return self.rank, self.width

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Its parameters: a call, so that hooks which move weights about see it."""
        return self.basis, self.offset

    def multiply_adds(self) -> int:
        """None of its own: its members multiply by it."""
        return 0

    def reset_parameters(self, std: float) -> None:
        """Draw the map so that codes of deviation 1 give rows of length 1 on average."""
        init.normal_(self.basis, std=(self.rank * self.width) ** -0.5)
        init.zeros_(self.offset)

    def extra_repr(self) -> str:
        return f"{self.width}, rank={self.rank}, rows={self.rows}"


class NonlinearDecoder(LinearDecoder):
    """The decoder of Banaei et al. (Findings of EACL 2023): `row = tanh(C lrelu(B lrelu(A code)))`, all with offset.

    `A` is (2 R, R), `B` (4 R, 2 R) and `C` (D, 4 R). Of a row only the direction is used.
    """

    def _build(self, **kind: Any) -> None:
        self.first = nn.Linear(self.rank, 2 * self.rank, **kind)
        self.second = nn.Linear(2 * self.rank, 4 * self.rank, **kind)
        self.last = nn.Linear(4 * self.rank, self.width, **kind)

    @staticmethod
    def num_numbers(width: int, rank: int) -> int:
        """Stored numbers: `10 R^2 + 6 R + 4 R D + D`."""
        return 10 * rank**2 + 6 * rank + 4 * rank * width + width

    def forward(self, codes: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # the linear one decodes nothing
        """(N, R) -> (N, D)."""
        hidden = F.leaky_relu(self.second(F.leaky_relu(self.first(codes))))
        return torch.tanh(self.last(hidden))

    def decoding_cost(self) -> int:
        """Multiply-adds for one row."""
        return 10 * self.rank**2 + 4 * self.rank * self.width

    def cost_for_a_token(self, num_rows: int) -> int:
        """Multiply-adds for decoding so many rows once in a call, for each of the call's tokens."""
        return num_rows * self.decoding_cost() // _TOKENS_OF_A_CALL

    def reset_parameters(self, std: float) -> None:
        """Draw the maps so that the signal keeps its size; zero offsets."""
        child: Any
        for child in self.children():
            init.normal_(child.weight, std=_HIDDEN_GAIN * child.in_features**-0.5)
            init.zeros_(child.bias)


class AutoencoderLinear(SharingStructure, Materializing):
    """Linear layer whose weight has rows `norm_i * (code_i @ basis + offset)`, decoded by what other layers share too.

    The offline compression of Banaei et al. (Findings of EACL 2023) with a linear decoder: rows of the output neurons,
    or of the input neurons, where all layers write to one space. The codes and lengths are the layer's own, so that no
    table says which rows of a group are its. With `materialize = "each_forward"` the dense weight is never formed:
    a token costs `(R + 1) I + R O` multiply-adds for rows of outputs, `R I + (R + 1) O` for rows of inputs.

    Shapes:
        input   (..., I)
        codes   (O, R), or (I, R) for rows of inputs
        norms   (O), or (I)
        bias    (O)
        output  (..., O)

    Args:
        shared: The decoder.

    Raises:
        ValueError: If the decoder makes rows of another length.
    """

    SIZES: tuple[str, ...] = ()
    SHARES: type[LinearDecoder] = LinearDecoder

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shared: LinearDecoder,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._refer_to(shared)
        self.in_features, self.out_features = in_features, out_features
        num_rows, width = (out_features, in_features) if shared.rows == ROWS[0] else (in_features, out_features)
        if width != shared.width:
            raise ValueError(f"the decoder makes rows of length {shared.width}, the matrix has rows of {width}.")
        self.codes = nn.Parameter(torch.empty(num_rows, shared.rank, device=device, dtype=dtype))
        self.norms = nn.Parameter(torch.empty(num_rows, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    @property
    def rank(self) -> int:
        """Length of the codes."""
        return int(self.shared.rank)

    @property
    def dense_size(self) -> tuple[int, int]:
        """`(O, I)`."""
        return self.out_features, self.in_features

    def sources(self) -> list[torch.Tensor]:
        """Everything that the dense weight depends on, the decoder's numbers too."""
        return [self.codes, self.norms, *self.shared.parameters()]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.materialized()
        return self._decoding(hidden_states) if weight is None else F.linear(hidden_states, weight, self.bias)

    def _decoding(self, states: torch.Tensor) -> torch.Tensor:
        """The output, by way of the codes and without the dense weight."""
        basis, offset = (weight.to(states.device) for weight in self.shared())
        decoder = torch.cat([basis, offset[None]])  # (R + 1, D)
        if self.shared.rows == ROWS[0]:
            seen, constant = F.linear(states, decoder).split([self.rank, 1], dim=-1)  # (..., R), (..., 1)
            output = (F.linear(seen, self.codes) + constant) * self.norms
        else:
            scaled = states * self.norms
            output = torch.cat([scaled @ self.codes, scaled.sum(dim=-1, keepdim=True)], dim=-1) @ decoder
        return output if self.bias is None else output + self.bias

    def to_dense(self) -> torch.Tensor:
        """The weight this layer stands for, (O, I), from sums in float32 at least."""
        wide = torch.promote_types(self.codes.dtype, torch.float32)
        rows = self._directions(wide) * self.norms.to(wide)[:, None]
        return (rows if self.shared.rows == ROWS[0] else rows.T).to(self.codes.dtype)

    def _directions(self, wide: torch.dtype) -> torch.Tensor:
        """The rows before their lengths, in a wide type."""
        basis, offset = (weight.to(self.codes.device, wide) for weight in self.shared())
        return self.codes.to(wide) @ basis + offset

    def multiply_adds(self) -> int:
        """Multiply-adds for one token, the decoder's counted."""
        if self.keeps_weight:
            return self.in_features * self.out_features
        return self.rank * (self.in_features + self.out_features) + int(self.shared.width)

    def reset_parameters(self, std: float) -> None:
        """Draw the codes so that the weight has standard deviation `std`; zero the bias."""
        init.normal_(self.codes)
        init.constant_(self.norms, std * self.shared.width**0.5)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


class NonlinearAutoencoderLinear(AutoencoderLinear):
    """An `AutoencoderLinear` with a `NonlinearDecoder`: `norm_i * f(code_i) / |f(code_i)|`.

    Nothing can be multiplied by but the decoded weight: with `materialize = "each_forward"` a call costs its decoding
    and memory for one layer, and with `"once"` what a dense layer does.
    """

    SHARES = NonlinearDecoder

    def _decoding(self, states: torch.Tensor) -> torch.Tensor:
        return F.linear(states, self.to_dense(), self.bias)

    def _directions(self, wide: torch.dtype) -> torch.Tensor:
        return F.normalize(self.shared(self.codes).to(self.codes.device, wide), dim=1)

    def multiply_adds(self) -> int:
        """Multiply-adds for one token, and its share of the decoding in a call of 8 x 128."""
        decoding = 0 if self.keeps_weight else int(self.shared.cost_for_a_token(len(self.codes)))
        return self.in_features * self.out_features + decoding
