"""How each structure stores the factors a solver has found: one function and one row of `ENCODERS` a structure."""

from collections.abc import Callable
from typing import Any

import torch

from hf_lowrank.methods.factors import BandedSolution, Factors
from hf_lowrank.methods.rows.nonlinear_autoencoder import NonlinearCodes
from hf_lowrank.remote_code.lowrank_banded import no_order

StateDict = dict[str, torch.Tensor]

# Rows are exchanged while one grows the volume of the kept rows by more than this factor.
_LEAST_GROWTH = 1.1
_MOST_EXCHANGES = 2000
# Where a coefficient is still larger, more outputs change place: the rounding of a matrix grows with its coefficients.
_LARGEST_COEFFICIENT = 8.0
_LARGEST_IN_16_BITS = 2.0
# A row that would have to move is taken at first only where the others are this much shorter beside the rows taken.
_LAST_RESORT = 1e-3
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


def encode_experts(factors: Factors, bias: torch.Tensor | None, dtype: torch.dtype) -> StateDict:
    """State of `LowRankExperts`, from factors (E, O, R) and (E, R, I)."""
    return {"up": factors.up.to(dtype), "down": factors.down.to(dtype)}


def encode_pivoted(factors: Factors, bias: torch.Tensor | None, dtype: torch.dtype) -> StateDict:
    """State of a `PivotedLinear`: the same matrix from `R` of its rows, the first but for a few.

    The rows are chosen for a large volume, and as many of them exchanged as it takes for no coefficient to pass 8, or
    2 in a 16-bit type. On real matrices that moves a few outputs; the first rows alone would need coefficients in the
    hundreds. The coefficients are fitted to the kept rows as they are after rounding.
    """
    up, down = factors.up.double(), factors.down.double()
    rank = up.shape[1]
    basis, mixing = torch.linalg.qr(down.T)  # (I, R), (R, R): orthonormal rows make distances in R^R those in R^I
    rows = up @ mixing.T  # (O, R)
    order = _row_order(rows, _LARGEST_IN_16_BITS if dtype.itemsize == 2 else _LARGEST_COEFFICIENT)
    moved = (order != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
    kept = (up[order[:rank]] @ down).to(dtype)  # (R, I)
    coefficients = _least_squares(kept.double() @ basis, rows[order[rank:]]).to(dtype)  # (O - R, R)
    state = {"pivots.weight": kept, "coefficients.weight": coefficients}
    if len(moved):
        state |= {"moved_from": moved, "moved_to": order[moved]}
    if bias is not None:
        kept_bias, other_bias = bias[order[:rank]], bias[order[rank:]]
        added = coefficients.double() @ kept_bias.double()
        state |= {"pivots.bias": kept_bias.to(dtype), "coefficients.bias": (other_bias.double() - added).to(dtype)}
    return state


def encode_banded(solution: BandedSolution, bias: torch.Tensor | None, dtype: torch.dtype) -> StateDict:
    """State of an `AutoencoderEmbedding` or an `AutoencoderHead`."""
    places = no_order(len(solution.order), solution.order.device)
    state = {f"codes.{index}.weight": codes.to(dtype) for index, codes in enumerate(solution.codes)}
    state |= {"basis": torch.cat(solution.bases).to(dtype), "offset": solution.offset.to(dtype)}
    state["place"] = torch.empty_like(places).index_copy(0, solution.order, places)
    return state if bias is None else {**state, "bias": bias.to(dtype)}


def encode_nonlinear(solution: NonlinearCodes, bias: torch.Tensor | None, dtype: torch.dtype) -> StateDict:
    """State of a `NonlinearAutoencoderEmbedding` or a `NonlinearAutoencoderHead`."""
    state = {"codes": solution.codes[0].to(dtype), "norms": solution.norms[0].to(dtype)}
    state |= {f"decoder.{name}": value.to(dtype) for name, value in solution.decoder.items()}
    return state if bias is None else {**state, "bias": bias.to(dtype)}


ENCODERS: dict[str, Callable[[Any, torch.Tensor | None, torch.dtype], StateDict]] = {
    "low_rank": encode_pair,
    "low_rank_embedding": encode_embedding,
    "low_rank_experts": encode_experts,
    "pivoted": encode_pivoted,
    "joint_low_rank": encode_member,
    "autoencoder_embedding": encode_banded,
    "autoencoder_head": encode_banded,
    "nonlinear_autoencoder_embedding": encode_nonlinear,
    "nonlinear_autoencoder_head": encode_nonlinear,
}


def decode_pair(structure: Any) -> Factors:
    """Factors of a `LowRankLinear`."""
    return Factors(structure.up.weight.detach(), structure.down.weight.detach())


def decode_pivoted(structure: Any) -> Factors:
    """Factors of a `PivotedLinear`: its kept rows, and the coefficients below an identity, in the rows' order."""
    return Factors(structure.combinations().detach(), structure.pivots.weight.detach())


# The linear structures that can hold any factors, and so be turned into one another without loss.
DECODERS: dict[str, Callable[[Any], Factors]] = {
    "low_rank": decode_pair,
    "pivoted": decode_pivoted,
}


def sizes_beside_rank(state: StateDict) -> dict[str, int]:
    """The sizes a spec needs beside the rank to hold that state, which the encoder has found."""
    return {"moved": len(state["moved_from"])} if "moved_from" in state else {}


def _row_order(rows: torch.Tensor, bound: float) -> torch.Tensor:
    """Which row stands where, (O): first `R` of which all of (O, R) `rows` are made with no coefficient past `bound`.

    Each is at its own index but for those exchanged between the first `R` and the others.
    """
    num_rows, rank = rows.shape
    most, limit = 0, min(rank, num_rows - rank)
    kept, largest = _exchanged(rows, _independent_rows(rows), most)
    while most < limit and (largest > bound or int((kept >= rank).sum()) > most):
        most = min(max(2 * most, 1), limit)
        kept, largest = _exchanged(rows, kept, most)
    order = torch.arange(num_rows, device=rows.device)
    is_kept = torch.zeros_like(order, dtype=torch.bool).index_fill(0, kept, True)
    leaving, coming = (~is_kept[:rank]).nonzero()[:, 0], is_kept[rank:].nonzero()[:, 0] + rank
    order[leaving], order[coming] = coming, leaving
    return order


def _exchanged(rows: torch.Tensor, kept: torch.Tensor, most_moved: int) -> tuple[torch.Tensor, float]:
    """Kept rows of larger volume, at most `most_moved` of them not among the first `R`; and the largest coefficient.

    While some coefficient is large, its row takes the place of the kept row it belongs to (maxvol: Goreinov et al.,
    2010), unless that would move one row too many.
    """
    num_rows, rank = rows.shape
    kept = kept.clone()
    is_kept = torch.zeros(num_rows, dtype=torch.bool, device=rows.device).index_fill(0, kept, True)
    others = (~is_kept).nonzero()[:, 0]
    coefficients = _least_squares(rows[kept], rows[others])  # (O - R, R)
    for _ in range(_MOST_EXCHANGES if len(others) else 0):
        sizes = coefficients.abs()
        if int((kept >= rank).sum()) >= most_moved:
            sizes[torch.outer(others >= rank, kept < rank)] = 0
        other, pivot = divmod(int(sizes.argmax()), rank)
        if not sizes[other, pivot] > _LEAST_GROWTH:
            break
        kept[pivot], others[other] = others[other].clone(), kept[pivot].clone()
        # The rank-one change of `rows[others] @ inv(rows[kept])` under the exchange.
        column, row = coefficients[:, pivot].clone(), coefficients[other].clone()
        value = row[pivot].clone()
        column[other] += 1
        row[pivot] -= 1
        coefficients -= torch.outer(column, row / value)
    return kept, float(coefficients.abs().max()) if len(others) else 0.0


def _independent_rows(rows: torch.Tensor) -> torch.Tensor:
    """Indices of `R` independent rows of (O, R) `rows`, the first of them where those will do."""
    rank = rows.shape[1]
    preferred = rows.clone()
    preferred[rank:] *= _LAST_RESORT
    exchanges = torch.linalg.lu_factor_ex(preferred).pivots.tolist()  # 1-based, applied in sequence
    order = list(range(len(rows)))
    for position, exchange in enumerate(exchanges):
        order[position], order[exchange - 1] = order[exchange - 1], order[position]
    return torch.tensor(order[:rank], device=rows.device)


def _least_squares(kept: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """`argmin_C ||C kept - target||_F` for square `kept`; the shortest such `C` where that is singular."""
    solution: torch.Tensor
    solution, info = torch.linalg.solve_ex(kept.T, target.T)
    if bool(info) or not bool((solution.abs() < _SINGULAR).all()):
        solution = torch.linalg.lstsq(kept.T.cpu(), target.T.cpu(), driver="gelsd").solution.to(kept.device)
    return solution.T
