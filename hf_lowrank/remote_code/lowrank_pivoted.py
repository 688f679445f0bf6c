"""A low-rank matrix stored by some of its own rows: the same matrix in fewer numbers than two factors."""

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import initialization as init

from .lowrank_dense import LinearStructure, is_exported
from .lowrank_linear import check_rank, dense_product


class PivotedLinear(LinearStructure):
    """Linear layer of rank `R` that keeps `R` rows of its weight and the others as combinations of them.

        z[:R] = pivots x        z[R:] = coefficients z[:R]        y = z, but y[moved_to] = z[moved_from]

    A rank-`R` matrix in two factors has `R^2` numbers too many: an invertible `R x R` block can move between them.
    Here that block is the identity, so the same matrix costs `R (I + O) - R^2` numbers and multiply-adds, never more
    than the dense one at any rank (Zhao et al., PIFA, ICML 2025). Any rank-`R` matrix can be stored so without loss.

    The kept rows are the first `R` but for a few, exchanged for others so that no coefficient is large. Both products
    then write into the output where it belongs, and only the exchanged outputs move: putting a free choice of rows in
    order can take a third of the time of the products.

    Every output hangs on the kept rows, and so on every rounding of them: in 8 bits of one scale nothing is left of
    a model. Quantizers of torch and torchao that look for linear layers pass these by; two factors (`low_rank`) are
    what to quantize.

    Shapes:
        input         (..., I)
        pivots        (R, I), the kept rows
        coefficients  (O - R, R)
        moved_from    (M), indices of `z`; none of this and the next without exchanges
        moved_to      (M), a permutation of `moved_from`
        bias          (O), as `pivots.bias` and `coefficients.bias`: what the pivots' bias becomes under the
                      coefficients is taken off the latter
        output        (..., O)

    Args:
        rank: Number of kept rows, between 1 and `min(in_features, out_features)`.
        moved: Number of outputs that change place, at most `out_features`.

    Raises:
        ValueError: If a size is outside its range.
    """

    SIZES = ("rank",)
    OPTIONAL_SIZES = ("moved",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        moved: int = 0,
    ) -> None:
        super().__init__()
        check_rank(rank, out_features, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.moved = moved
        if not 0 <= moved <= out_features:
            raise ValueError(f"moved must be between 0 and {out_features} for as many outputs, got {moved}.")
        self.pivots = NonDynamicallyQuantizableLinear(in_features, rank, bias=bias, device=device, dtype=dtype)
        with warnings.catch_warnings():  # torch warns of the empty matrix at R = O, where every row is a pivot
            warnings.simplefilter("ignore", UserWarning)
            self.coefficients = NonDynamicallyQuantizableLinear(rank, out_features - rank, bias, device, dtype)
        for places in ("moved_from", "moved_to") if moved else ():
            self.register_buffer(places, torch.arange(moved, device=device))

    @staticmethod
    def num_weights(out_features: int, in_features: int, *, rank: int) -> int:
        """Stored numbers, bias and places of moved outputs not counted: `R (I + O) - R^2`."""
        return rank * (in_features + out_features - rank)

    def multiply_adds(self) -> int:
        """Multiply-adds for one token: `R (I + O) - R^2`."""
        return self.rank * (self.in_features + self.out_features - self.rank)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self._written_in_place(hidden_states)
        if output is None:
            kept = self.pivots(hidden_states)  # (..., R)
            if is_exported() and _plain_weights(self._modules["coefficients"]) is not None:
                # Where the outputs belong is then folded into the weight: runtimes are slower at moving numbers about.
                return F.linear(kept, self.combinations(), self._bias_after_pivots())
            output = torch.cat([kept, self.coefficients(kept)], dim=-1)  # (..., O)
        return self.put_in_order_(output, dim=-1)

    def combinations(self) -> torch.Tensor:
        """What makes every row of the kept ones, (O, R), in the rows' order."""
        coefficients = self.coefficients.weight
        return self.put_in_order_(torch.cat([torch.eye(self.rank).to(coefficients), coefficients]), dim=0)

    def _bias_after_pivots(self) -> torch.Tensor | None:
        if self.coefficients.bias is None:
            return None
        return self.put_in_order_(torch.cat([torch.zeros_like(self.pivots.bias), self.coefficients.bias]), dim=0)

    def put_in_order_(self, computed: torch.Tensor, dim: int) -> torch.Tensor:
        """Bring what was exchanged in (..., O, ...) `computed`, kept ones first along `dim`, to where it belongs."""
        if not self.moved:
            return computed
        places: dict[str, Any] = self._buffers
        return computed.index_copy_(dim, places["moved_to"], computed.index_select(dim, places["moved_from"]))

    def _written_in_place(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Both products, each written into its part of one output: joining two results takes a copy of both.

        Only where the result is all that is asked for; None if there is a gradient, a graph, another type, a hook, an
        adapter or a quantizer that only calling the children serves. Nor on processors in 16 bits, whose products take
        numbers in pairs: of an odd rank they would read one column further, into memory nobody has written.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_exported():
            return None
        if hidden_states.dtype.itemsize < 4 and hidden_states.device.type == "cpu":
            return None
        parts = self._modules
        pivots, coefficients = _plain_weights(parts["pivots"]), _plain_weights(parts["coefficients"])
        if pivots is None or coefficients is None or torch.is_autocast_enabled(hidden_states.device.type):
            return None
        tokens = hidden_states.reshape(-1, self.in_features)  # (T, I)
        output = tokens.new_empty(len(tokens), self.out_features)
        kept = _linear_into(output[:, : self.rank], tokens, *pivots)
        _linear_into(output[:, self.rank :], kept, *coefficients)
        return output.view(*hidden_states.shape[:-1], self.out_features)

    def to_dense(self) -> torch.Tensor:
        """The weight this layer stands for, (O, I)."""
        kept = self.pivots.weight
        return self.put_in_order_(torch.cat([kept, dense_product(self.coefficients.weight, kept)]), dim=0)

    def dense_bias(self) -> torch.Tensor | None:
        """The bias of the layer this one stands for, (O)."""
        if self.pivots.bias is None:
            return None
        added = dense_product(self.coefficients.weight, self.pivots.bias[:, None])[:, 0]
        return self.put_in_order_(torch.cat([self.pivots.bias, self.coefficients.bias + added]), dim=0)

    def reset_parameters(self, std: float) -> None:
        """Draw the kept rows with that deviation, and coefficients that keep it; zero the bias; move nothing."""
        init.normal_(self.pivots.weight, std=std)
        init.normal_(self.coefficients.weight, std=self.rank**-0.5)
        for part in (self.pivots, self.coefficients):
            if part.bias is not None:
                init.zeros_(part.bias)
        for places in self.buffers():
            init.copy_(places, torch.arange(self.moved, device=places.device))

    def extra_repr(self) -> str:
        has_bias = self.pivots.bias is not None
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={has_bias}, moved={self.moved}"


def _plain_weights(linear: Any) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias of a linear layer that does nothing but multiply by them, else None.

    Looks into the tables of the module: asking it for each of its members costs more than copying the outputs would.
    """
    members = linear.__dict__
    weight = members["_parameters"].get("weight")
    # In `torch.export` weights are of a class without numbers.
    is_plain = type(weight) is nn.Parameter or (is_exported() and not hasattr(weight, "__tensor_flatten__"))
    if type(linear) is not NonDynamicallyQuantizableLinear or not is_plain or "forward" in members:
        return None
    if members["_forward_hooks"] or members["_forward_pre_hooks"]:
        return None
    return weight, members["_parameters"]["bias"]


def _linear_into(
    output: torch.Tensor, tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if bias is None:
        return torch.mm(tokens, weight.t(), out=output)
    return torch.addmm(bias, tokens, weight.t(), out=output)
