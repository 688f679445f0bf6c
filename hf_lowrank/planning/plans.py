"""From settings to a resolved plan."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.planning.accounts import Account, make_account
from hf_lowrank.planning.allocation import ALLOCATIONS, settled, uniform
from hf_lowrank.planning.curves import Curve, make_curve, most_useful_weights
from hf_lowrank.planning.prices import FloatArray, Price
from hf_lowrank.progress import Progress
from hf_lowrank.remote_code.lowrank_plan import FORMAT_VERSION, Plan, Spec, sizes_of
from hf_lowrank.remote_code.lowrank_table import STRUCTURES
from hf_lowrank.settings import CompressionSettings
from hf_lowrank.targets import (
    OUTPUT_EMBEDDINGS,
    DenseMatrix,
    JointMatrix,
    Matrix,
    find_matrices,
    matching,
    select_matrices,
)

# Matrices that are replaced, each with its rank.
Ranks = dict[Matrix, int]


class ErrorSource(Protocol):
    """Tells what ranks cost in quality.

    Args:
        progress: Shows how far long work is.
    """

    progress: Progress

    def joint(self, matrices: Sequence[DenseMatrix]) -> Sequence[JointMatrix]:
        """Those that read the same input, together."""
        ...

    def predicted(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        """Loss of each matrix at rank 1, 2, ..., in the solver's own metric."""
        ...

    def errors(self, matrices: Sequence[Matrix]) -> dict[str, FloatArray]:
        """Loss of each matrix at rank 1, 2, ..., as the allocation wants it."""
        ...

    def sizes(self, matrix: Matrix, rank: int) -> dict[str, int]:
        """What a spec says of a matrix of that rank."""
        ...

    def damage(self, matrices: Sequence[Matrix], ranks: dict[str, int]) -> float:
        """What the whole model loses at these ranks; matrices without one stay dense."""
        ...


def candidate_matrices(model: PreTrainedModel, settings: CompressionSettings) -> list[DenseMatrix]:
    """The matrices the settings speak of: those to share the budget, and those whose rank is given by name.

    Raises:
        InputError: If nothing matches.
    """
    every = find_matrices(model)
    chosen = select_matrices(every, settings.roles, settings.target_modules, settings.exclude_modules)
    named = [m for pattern in settings.rank_pattern for m in matching(every, [pattern], "rank_pattern")]
    return [matrix for matrix in every if matrix in chosen or matrix in named]


def make_plan(
    model: PreTrainedModel,
    settings: CompressionSettings,
    source: ErrorSource,
) -> tuple[Plan, list[Matrix]]:
    """The plan for a dense model, and the matrices it replaces.

    Args:
        source: Asked for the errors of ranks where the allocation looks at them.

    Raises:
        InputError: If nothing matches, a weight is not finite, or the budget is out of reach.
    """
    candidates = candidate_matrices(model, settings)
    fixed_specs = _specs_for_pattern(candidates, settings)
    fixed = [matrix for matrix in candidates if matrix.name in fixed_specs]
    free = [matrix for matrix in candidates if matrix.name not in fixed_specs]
    check_finite(candidates)
    if settings.rank is not None:
        chosen = _ranks_for_rank(free, settings.rank, settings)
    else:
        account = make_account(model, settings, candidates, source.progress)
        spent = sum(_cost(m, fixed_specs[m.name], account.price) for m in fixed)
        chosen = _ranks_for_budget(free, account, spent, settings, source)
    replaced: list[Matrix] = sorted([*chosen, *fixed], key=lambda matrix: candidates.index(matrix.members[0]))
    modules, shared = dict(fixed_specs), {}
    for matrix, rank in chosen.items():
        if isinstance(matrix, JointMatrix):
            shared[matrix.name] = {"structure": "shared_down", "rank": rank}
            for member in matrix.members:
                modules[member.name] = {"structure": "joint_low_rank", "shared": matrix.name}
        else:
            modules[matrix.name] = {"structure": _structure(matrix, settings), "rank": rank}
    for matrix in replaced:
        if matrix.name in modules:
            spec = modules[matrix.name]
            modules[matrix.name] = {"structure": spec["structure"], **source.sizes(matrix, spec["rank"])}
    modules = {matrix.name: modules[matrix.name] for matrix in candidates if matrix.name in modules}
    kept = {m.name: [list(m.shape), m.role, _why_dense(m, settings)] for m in free if m.name not in modules}
    return as_plan(modules, shared, kept), replaced


def as_plan(specs: dict[str, Spec], shared: dict[str, Spec], kept_dense: dict[str, Any]) -> Plan:
    """The plan of these specs, with its record of what stays dense and why."""
    plan: Plan = {
        "format_version": FORMAT_VERSION,
        "modules": {name: spec for name, spec in specs.items() if name != OUTPUT_EMBEDDINGS},
        "provenance": {"kept_dense": kept_dense},
    }
    if shared:
        plan["shared"] = shared
    if OUTPUT_EMBEDDINGS in specs:
        plan["output_embeddings"] = specs[OUTPUT_EMBEDDINGS]
    return plan


def _ranks_for_budget(
    matrices: Sequence[DenseMatrix],
    account: Account,
    spent: float,
    settings: CompressionSettings,
    source: ErrorSource,
) -> Ranks:
    allocation = ALLOCATIONS[settings.chosen_allocation]
    available = account.limit - account.fixed - spent
    if available >= sum(account.price.of_dense(matrix) for matrix in matrices):
        return {}
    curves_of = partial(_curves, settings, account.price)
    curves = curves_of(matrices)
    least = sum(float(curve.costs.min()) for curve in curves)
    if available < least:
        raise InputError(out_of_reach(settings, account, spent + least))
    if allocation.errors == "none":
        return _chosen_ranks(curves, allocation.choose(curves, available))
    units = _joint_or_separate(matrices, available, curves_of, source)
    curves = curves_of(units, source.errors(units))
    ranks = _chosen_ranks(curves, allocation.choose(curves, available))
    if allocation.errors == "probes":
        # Probes see one matrix at a time; only the whole model tells whether the sum of what they saw holds.
        return min((ranks, _chosen_ranks(curves, uniform(curves, available))), key=partial(_damage, source))
    return ranks


def _joint_or_separate(
    matrices: Sequence[DenseMatrix],
    available: float,
    curves_of: Callable[..., list[Curve]],
    source: ErrorSource,
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
    settings: CompressionSettings,
    price: Price,
    matrices: Sequence[Matrix],
    errors: dict[str, FloatArray] | None = None,
) -> list[Curve]:
    return [
        make_curve(
            matrix,
            "low_rank" if isinstance(matrix, JointMatrix) else _structure(matrix, settings),
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


def _damage(source: ErrorSource, ranks: Ranks) -> float:
    return source.damage(list(ranks), {matrix.name: rank for matrix, rank in ranks.items()})


def _structure(matrix: DenseMatrix, settings: CompressionSettings) -> str:
    """The structure that takes the place of `matrix`.

    A low-rank head has two factors in any case: new tokens are added at its end, and pivots save less than 1 % of so
    tall one.
    """
    if matrix.role != "block" and settings.embeddings == "autoencoder":
        kind = "nonlinear_autoencoder" if settings.embedding_objective == "nonlinear" else "autoencoder"
        return f"{kind}_{matrix.role}"
    if matrix.kind == "embedding":
        return "low_rank_embedding"
    return "low_rank" if matrix.role == "head" else settings.chosen_storage


def out_of_reach(settings: CompressionSettings, account: Account, least: float) -> str:
    """What to say where not even the smallest replacement, of cost `least`, fits the budget."""
    budget = settings.budget
    smallest = account.fixed + least
    if budget.kind == "target_size":
        reachable, asked = f"{math.ceil(smallest / 1e4) / 100:.2f}MB", f"{budget.value / 1e6:.2f}MB"
    else:
        reachable, asked = f"{math.ceil(smallest / account.whole * 1e4) / 1e4:.4f}", f"{budget.value:g}"
    return (
        f"{budget.kind}={asked} is out of reach: the smallest model with these targets is {reachable}. "
        "Raise the budget, or let more modules be compressed."
    )


def _ranks_for_rank(matrices: Sequence[DenseMatrix], rank: int, settings: CompressionSettings) -> Ranks:
    """The same rank everywhere; a matrix that would not gain stays dense."""
    for matrix in matrices:
        _check_rank(matrix, rank)
    sizes = {m: _num_weights(m, {"structure": _structure(m, settings), "rank": rank}) for m in matrices}
    return {matrix: rank for matrix in matrices if sizes[matrix] <= most_useful_weights(matrix)}


def _specs_for_pattern(matrices: Sequence[DenseMatrix], settings: CompressionSettings) -> dict[str, Spec]:
    """Specs of the matrices whose rank is given by name; a later key wins over an earlier one."""
    specs: dict[str, Spec] = {}
    for pattern, rank in settings.rank_pattern.items():
        for matrix in matching(matrices, [pattern], "rank_pattern"):
            _check_rank(matrix, rank)
            specs[matrix.name] = {"structure": _structure(matrix, settings), "rank": rank}
    return specs


def _check_rank(matrix: DenseMatrix, rank: int) -> None:
    bound = min(matrix.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= bound:
        raise InputError(
            f"rank of {matrix.name!r} must be between 1 and {bound}, got {rank!r}. "
            "Choose one within, or exclude the module."
        )


def check_finite(matrices: Sequence[DenseMatrix]) -> None:
    """Raise `InputError` at a weight that is not in memory, or not finite."""
    for matrix in matrices:
        weight: Any = matrix.module.weight
        if weight.device.type == "meta":
            raise InputError(f"The weight of {matrix.path!r} is not in memory. Load the model without offloading.")
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"The weight of {matrix.path!r} holds NaN or Inf. Repair it, or exclude the module.")


def _why_dense(matrix: DenseMatrix, settings: CompressionSettings) -> str:
    if settings.rank is not None:
        return f"rank {settings.rank} would not make it smaller and faster"
    return "worth its full size at this budget"


def _num_weights(matrix: DenseMatrix, spec: Spec) -> int:
    return int(STRUCTURES[spec["structure"]].num_weights(*matrix.shape, **sizes_of(spec)))


def _cost(matrix: DenseMatrix, spec: Spec, price: Price) -> float:
    return float(price.of_ranks(matrix, spec["structure"], np.array([spec["rank"]]))[0])
