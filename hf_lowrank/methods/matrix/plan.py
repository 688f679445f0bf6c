"""The plan for matrices that are replaced one by one, or with those of the same input."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix, JointMatrix, Matrix
from hf_lowrank.hosts.targets import matching
from hf_lowrank.methods.matrix.ranks import RankErrors
from hf_lowrank.methods.problem import Problem
from hf_lowrank.planning.accounts import Account
from hf_lowrank.planning.allocation import ALLOCATIONS, settled, uniform
from hf_lowrank.planning.curves import Curve, make_curve, most_useful_weights, never_dense
from hf_lowrank.planning.plans import as_plan, out_of_reach, require_in_memory
from hf_lowrank.planning.prices import FloatArray, Price, stored_numbers
from hf_lowrank.remote_code.lowrank_plan import Plan, Spec

# Matrices that are replaced, each with its rank.
Ranks = dict[Matrix, int]


def make_plan(problem: Problem, source: RankErrors) -> tuple[Plan, list[Matrix]]:
    """The plan for a dense model, and the matrices it replaces.

    Args:
        source: Asked for the errors of ranks where the allocation looks at them.

    Raises:
        InputError: If a weight is not in memory, or the budget is out of reach.
    """
    fixed_specs = _specs_for_pattern(problem)
    fixed = [matrix for matrix in problem.matrices if matrix.name in fixed_specs]
    free = [matrix for matrix in problem.matrices if matrix.name not in fixed_specs]
    require_in_memory(problem.matrices)
    if problem.budget.kind == "rank":
        chosen = _ranks_for_rank(free, problem)
    else:
        linear = problem.storage.linear
        others = {problem.storage.structure(matrix) for matrix in problem.matrices}
        others |= {"joint_low_rank"} if problem.evidence.kinds else set()  # only who looks sees what reads one input
        account = problem.account(problem.matrices, [linear, *sorted(others - {linear})])
        spent = sum(_cost(m, fixed_specs[m.name], account.price) for m in fixed)
        chosen = _ranks_for_budget(free, account, spent, problem, source)
    position = {matrix.name: index for index, matrix in enumerate(problem.matrices)}
    replaced: list[Matrix] = sorted([*chosen, *fixed], key=lambda matrix: position[matrix.members[0].name])
    spec_of = partial(source.spec, itemsize=problem.dtype.itemsize)
    modules = {matrix.name: spec_of(matrix, fixed_specs[matrix.name]["rank"]) for matrix in fixed}
    shared = {}
    for matrix, rank in chosen.items():
        spec = spec_of(matrix, rank)
        if isinstance(matrix, JointMatrix):
            shared[matrix.name] = spec
            modules |= {m.name: {"structure": "joint_low_rank", "shared": matrix.name} for m in matrix.members}
        else:
            modules[matrix.name] = spec
    modules = {matrix.name: modules[matrix.name] for matrix in problem.matrices if matrix.name in modules}
    kept = {m.name: [list(m.dimensions), m.role, _why_dense(problem)] for m in free if m.name not in modules}
    return as_plan(modules, shared, kept), replaced


def _ranks_for_budget(
    matrices: Sequence[DenseMatrix], account: Account, spent: float, problem: Problem, source: RankErrors
) -> Ranks:
    allocation = ALLOCATIONS[problem.allocation]
    # Beside experts the other matrices of blocks are few of the parameters and much of what a token runs through: left
    # dense they would take little of the budget and most of the speed.
    is_mixture = any(matrix.kind == "experts" for matrix in matrices)
    available = account.limit - account.fixed - spent
    if available >= sum(account.price.of_dense(matrix) for matrix in matrices):
        return {}
    curves_of = partial(_curves, problem, account.price)
    curves = curves_of(matrices)
    least = sum(float(curve.costs.min()) for curve in curves)
    if available < least:
        raise InputError(out_of_reach(problem.budget, account, spent + least, problem.model, problem.matrices))
    if allocation.errors == "none":
        return _chosen_ranks(curves, allocation.choose(curves, available))
    units = _joint_or_separate(matrices, available, curves_of, source)
    curves = curves_of(units, source.errors(units))
    ways = [curves]
    if allocation.errors == "probes":
        ways.append(curves_of(units, source.predicted(units)))
    if is_mixture and available < sum(float(curve.costs[max(curve.dense - 1, 0)]) for curve in curves):
        ways = [never_dense(way) for way in ways]
    choices = [allocation.choose(way, available) for way in ways]
    if allocation.errors != "probes":
        return _chosen_ranks(curves, *choices)
    # Probes see one matrix at a time; only the whole model tells whether the sum of what they saw holds.
    tried = [_chosen_ranks(curves, choice) for choice in [*choices, uniform(curves, available)]]
    return min(tried, key=partial(_damage, source))


def _joint_or_separate(
    matrices: Sequence[DenseMatrix], available: float, curves_of: Callable[..., list[Curve]], source: RankErrors
) -> list[Matrix]:
    """Each matrix by itself, or with those of the same input where a common factor is predicted to lose less."""
    groups = source.joint(matrices)
    if not groups:
        return list(matrices)
    units: list[Matrix] = [*matrices, *groups]
    by_name = {curve.matrix.name: curve for curve in curves_of(units, source.predicted(units))}
    grouped = {member.name for group in groups for member in group.members}
    options = [[[by_name[matrix.name]]] for matrix in matrices if matrix.name not in grouped]
    options += [[[by_name[m.name] for m in group.members], [by_name[group.name]]] for group in groups]
    return [curve.matrix for curve in settled(options, available)]


def _curves(
    problem: Problem, price: Price, matrices: Sequence[Matrix], errors: dict[str, FloatArray] | None = None
) -> list[Curve]:
    return [
        make_curve(
            matrix,
            "low_rank" if isinstance(matrix, JointMatrix) else problem.storage.structure(matrix),
            price,
            None if errors is None else errors[matrix.name],
        )
        for matrix in matrices
    ]


def _chosen_ranks(curves: Sequence[Curve], choices: Sequence[int]) -> Ranks:
    return {
        curve.matrix: int(curve.ranks[choice])
        for curve, choice in zip(curves, choices, strict=True)
        if choice < curve.dense
    }


def _damage(source: RankErrors, ranks: Ranks) -> float:
    return source.damage(list(ranks), {matrix.name: source.spec(matrix, rank) for matrix, rank in ranks.items()})


def _ranks_for_rank(matrices: Sequence[DenseMatrix], problem: Problem) -> Ranks:
    """The same rank everywhere; a matrix that would not gain stays dense."""
    rank = int(problem.budget.value)
    for matrix in matrices:
        _check_rank(matrix, rank)
    sizes = {m: stored_numbers(m, problem.storage.structure(m), np.array([rank]))[0] for m in matrices}
    return {matrix: rank for matrix in matrices if sizes[matrix] <= most_useful_weights(matrix)}


def _specs_for_pattern(problem: Problem) -> dict[str, Spec]:
    """Specs of the matrices whose rank is given by name; a later key wins over an earlier one."""
    specs: dict[str, Spec] = {}
    for pattern, rank in problem.targets.rank_pattern.items():
        for matrix in matching(problem.matrices, [pattern], "rank_pattern"):
            _check_rank(matrix, rank)
            specs[matrix.name] = {"structure": problem.storage.structure(matrix), "rank": rank}
    return specs


def _check_rank(matrix: DenseMatrix, rank: int) -> None:
    bound = min(matrix.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= bound:
        raise InputError(
            f"rank of {matrix.name!r} must be between 1 and {bound}, got {rank!r}. "
            "Choose one within, or exclude the module."
        )


def _why_dense(problem: Problem) -> str:
    if problem.budget.kind == "rank":
        return f"rank {problem.budget.value} would not make it smaller and faster"
    return "worth its full size at this budget"


def _cost(matrix: DenseMatrix, spec: Spec, price: Price) -> float:
    return float(price.of_ranks(matrix, spec["structure"], np.array([spec["rank"]]))[0])
