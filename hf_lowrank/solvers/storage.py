"""How each structure stores the factors a solver has found: one function and one row of `ENCODERS` a structure."""

from collections.abc import Callable
from typing import Any

import torch

from hf_lowrank.solvers.factors import Factors

StateDict = dict[str, torch.Tensor]

# Rows are exchanged until no coefficient is larger: each exchange grows the volume of the kept rows by that factor.
_LARGEST_COEFFICIENT = 1.1
_MOST_EXCHANGES = 2000
# Coefficients beyond this come from rows that are dependent to the precision of float64.
_SINGULAR = 1e6


def encode_pair(factors: Factors, bias: torch.Tensor | None, dtype: torch.dtype) -> StateDict:
    """State of a `LowRankLinear`."""
    state = {"up.weight": factors.up.to(dtype), "down.weight": factors.down.to(dtype)}
    return state if bias is None else {**state, "up.bias": bias.to(dtype)}


def encode_member(factors: Factors, bias: torch.Tensor | None, dtype: torch.dtype) -> StateDict:
    """State of a `JointLinear`, whose first factor is elsewhere."""
    state = encode_pair(factors, bias, dtype)
    del state["down.weight"]
    return state


def encode_embedding(factors: Factors, bias: torch.Tensor | None, dtype: torch.dtype) -> StateDict:
    """State of a `LowRankEmbedding`."""
    return {"codes.weight": factors.up.to(dtype), "basis": factors.down.to(dtype)}


def encode_pivoted(factors: Factors, bias: torch.Tensor | None, dtype: torch.dtype) -> StateDict:
    """State of a `PivotedLinear`: the same matrix from `R` of its rows.

    The rows are chosen for the largest volume, so that every coefficient is about 1 at most and 16-bit types lose
    nothing more than elsewhere. The coefficients are fitted to the kept rows as they are after rounding.
    """
    up, down = factors.up.double(), factors.down.double()
    rank = up.shape[1]
    basis, mixing = torch.linalg.qr(down.T)  # (I, R), (R, R): orthonormal rows make distances in R^R those in R^I
    rows = up @ mixing.T  # (O, R)
    order = _row_order(rows)
    kept = (up[order[:rank]] @ down).to(dtype)  # (R, I)
    target = rows[order[rank:]]  # (O - R, R)
    coefficients = _least_squares(kept.double() @ basis, target).to(dtype)
    state = {"pivots.weight": kept, "coefficients.weight": coefficients, "order": order}
    if bias is not None:
        kept_bias, other_bias = bias[order[:rank]], bias[order[rank:]]
        moved = coefficients.double() @ kept_bias.double()
        state |= {"pivots.bias": kept_bias.to(dtype), "coefficients.bias": (other_bias.double() - moved).to(dtype)}
    return state


ENCODERS: dict[str, Callable[[Factors, torch.Tensor | None, torch.dtype], StateDict]] = {
    "low_rank": encode_pair,
    "low_rank_embedding": encode_embedding,
    "pivoted": encode_pivoted,
    "joint_low_rank": encode_member,
}


def decode_pair(structure: Any) -> Factors:
    """Factors of a `LowRankLinear`."""
    return Factors(structure.up.weight.detach(), structure.down.weight.detach())


def decode_pivoted(structure: Any) -> Factors:
    """Factors of a `PivotedLinear`: its kept rows, and the coefficients below an identity, in the rows' order."""
    coefficients = structure.coefficients.weight.detach()
    rows = torch.cat([torch.eye(structure.rank).to(coefficients), coefficients])
    return Factors(torch.empty_like(rows).index_copy(0, structure.order, rows), structure.pivots.weight.detach())


# The linear structures that can hold any factors, and so be turned into one another without loss.
DECODERS: dict[str, Callable[[Any], Factors]] = {
    "low_rank": decode_pair,
    "pivoted": decode_pivoted,
}


def _row_order(rows: torch.Tensor) -> torch.Tensor:
    """Indices of all rows, first `R` of them that span (O, R) `rows` with small coefficients, then the others.

    Partial pivoting of an LU decomposition gives the start; then, while some coefficient is large, its row takes the
    place of the kept row it belongs to (maxvol: Goreinov et al., 2010).
    """
    rank = rows.shape[1]
    order = _partial_pivots(rows)
    kept, others = order[:rank], order[rank:]
    coefficients = _least_squares(rows[kept], rows[others])  # (O - R, R)
    for _ in range(_MOST_EXCHANGES if len(others) else 0):
        other, pivot = divmod(int(coefficients.abs().argmax()), rank)
        value = coefficients[other, pivot].clone()
        if not value.abs() > _LARGEST_COEFFICIENT:
            break
        kept[pivot], others[other] = others[other].clone(), kept[pivot].clone()
        # The rank-one change of `rows[others] @ inv(rows[kept])` under the exchange.
        column, row = coefficients[:, pivot].clone(), coefficients[other].clone()
        column[other] += 1
        row[pivot] -= 1
        coefficients -= torch.outer(column, row / value)
    return torch.cat([kept.sort().values, others.sort().values])


def _partial_pivots(rows: torch.Tensor) -> torch.Tensor:
    exchanges = torch.linalg.lu_factor_ex(rows).pivots.tolist()  # 1-based, applied in sequence
    order = list(range(len(rows)))
    for position, exchange in enumerate(exchanges):
        order[position], order[exchange - 1] = order[exchange - 1], order[position]
    return torch.tensor(order, device=rows.device)


def _least_squares(kept: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`argmin_C ||C kept - target||_F` for square `kept`; the shortest such `C` where that is singular."""
    solution: torch.Tensor
    solution, info = torch.linalg.solve_ex(kept.T, target.T)
    if bool(info) or not bool((solution.abs() < _SINGULAR).all()):
        solution = torch.linalg.lstsq(kept.T.cpu(), target.T.cpu(), driver="gelsd").solution.to(kept.device)
    return solution.T
