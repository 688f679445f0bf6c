"""Which matrices are worth a rank when numbers are rounded: the error of each choice and its bytes, at one price."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hf_lowrank.compression.error_costs import costs_of, scratch_of
from hf_lowrank.compression.rounding import LEAST_NUMBERS, dense_parts
from hf_lowrank.hosts.matrices import DenseMatrix, Matrix
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.rounding.grids import Columns, damage
from hf_lowrank.methods.rounding.levels import Single, guesses
from hf_lowrank.methods.rounding.pairs import Pair
from hf_lowrank.planning.curves import most_useful_weights
from hf_lowrank.planning.plans import as_plan
from hf_lowrank.planning.sizes import entry_bytes, overhead_bytes
from hf_lowrank.remote_code.lowrank_plan import Plan

# Above so many bits a number, rounding a matrix itself was nearer for each that was measured.
_MOST_BITS = 3.0


def mixed_plan(problem: Problem) -> tuple[Plan, list[Matrix]]:
    """Of every matrix a rank, where two rounded factors do less harm at the price of a bit than rounding it does.

    What errors cost falls by `2 ln(2) t` for each bit where `t` is the level of error, which is one for all, so that
    the better choice is the one of the least `damage + 2 ln(2) t bits`.
    """
    parts, num_bytes = dense_parts(problem)
    level = 2.0 ** guesses(parts, 8 * num_bytes)[-1][0]
    price = 16 * math.log(2) * level  # of a byte
    found: dict[DenseMatrix, tuple[int, float]] = {}
    for matrix in problem.progress(problem.matrices, "choosing structures"):
        if matrix.kind != "experts":
            rank, saved = best_rank(problem, matrix, level)
            saved -= price * entry_bytes(matrix, _structure(matrix))
            found |= {matrix: (rank, saved)} if saved > 0 else {}
    code = _code_bytes(problem, sorted({_structure(matrix) for matrix in found}))
    fixed = code + sum(entry_bytes(matrix, _structure(matrix)) for matrix in found)
    if fixed > num_bytes / 2 or sum(saved for _, saved in found.values()) <= price * code:
        found = {}
    specs = {m.name: {"structure": _structure(m), "rank": rank} for m, (rank, _) in found.items()}
    kept: dict[str, Any] = {
        m.name: [list(m.dimensions), m.role, "rounded"] for m in problem.matrices if m not in found
    }
    return as_plan(specs, {}, kept), list(found)


def best_rank(problem: Problem, matrix: DenseMatrix, level: float) -> tuple[int, float]:
    """The rank at which two factors, rounded at that level, do least harm, and how much less than the rounded matrix.

    No rank at which the factors would take more multiply-adds than the matrix; 0 where none is better.
    """
    weight, costs = matrix.weight.detach().cpu().float(), costs_of(problem, matrix, partial(getattr, matrix, "weight"))
    dense = Single(matrix.name, lambda: weight, costs)
    if dense.sampled_bits(level) > _MOST_BITS * dense.num_codes:
        return 0, 0.0
    rows, columns = costs()
    largest = int(most_useful_weights(matrix) // sum(matrix.shape))
    up, down = _factors(weight, rows, columns, level, largest)
    pair = Pair(("up", "down"), lambda: (up, down), costs, scratch_of(problem))
    rounded = pair.at(level)
    price = 2 * math.log(2) * level
    rank = int((rounded["up"].codes != 0).any(0).sum())
    product = rounded["up"].weight @ rounded["down"].weight
    whole = dense.at(level)[matrix.name]
    saved = damage(weight, whole.weight, rows, columns) - damage(weight, product, rows, columns)
    saved += price * (whole.bits - sum(one.bits for one in rounded.values()))
    return (rank, saved) if rank * min(matrix.shape) >= LEAST_NUMBERS else (0, 0.0)


def _factors(
    weight: torch.Tensor, rows: torch.Tensor, columns: Columns, level: float, largest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest product of two, of the largest rank that a level of error leaves anything of."""
    roots = rows.sqrt()[:, None]
    rooted = roots * columns.rooted(weight.double())
    is_tall = len(rooted) > rooted.shape[1]
    values, vectors = torch.linalg.eigh(rooted.T @ rooted if is_tall else rooted @ rooted.T)
    rank = max(1, min(largest, int((values > level).sum())))
    leading = vectors.flip(1)[:, :rank]
    left = torch.linalg.qr(rooted @ leading).Q if is_tall else leading
    return left / roots, left.T @ (roots * weight.double())


def _structure(matrix: DenseMatrix) -> str:
    return "low_rank" if matrix.kind == "linear" else f"low_rank_{matrix.kind}"


def _code_bytes(problem: Problem, structures: Sequence[str]) -> int:
    """Of the code that these structures need beside that of rounded weights."""
    return overhead_bytes(problem.model, structures, "grid") - overhead_bytes(problem.model, (), "grid")
