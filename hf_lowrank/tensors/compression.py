"""Plans and numbers of the tensor methods: what `compress` asks for in place of one matrix after the other."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.decomposing import Decomposer
from hf_lowrank.errors import InputError
from hf_lowrank.filling import place_part_, replace_matrix_
from hf_lowrank.planning.accounts import make_account
from hf_lowrank.planning.plans import as_plan, candidate_matrices, check_finite, out_of_reach
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.settings import CompressionSettings
from hf_lowrank.solvers.stacking import in_group
from hf_lowrank.solvers.storage import StateDict
from hf_lowrank.solvers.tensor_methods import TensorMethod
from hf_lowrank.statistics.moments import MatrixStatistics
from hf_lowrank.targets import DenseMatrix, Matrix
from hf_lowrank.tensors import KINDS
from hf_lowrank.tensors.problem import Specs, TensorKind, TensorProblem


def make_tensor_plan(
    model: PreTrainedModel, settings: CompressionSettings, decomposer: Decomposer
) -> tuple[Plan, list[DenseMatrix]]:
    """The plan for a dense model by a tensor method, and the matrices it replaces.

    Raises:
        InputError: If nothing matches, a weight is not finite, ranks are out of bounds or the budget is out of reach.
    """
    matrices = in_group(candidate_matrices(model, settings), settings.group)
    check_finite(matrices)
    problem = _problem(model, matrices, decomposer)
    kind = _kind(settings)
    if settings.given_ranks is not None:
        return _planned(kind.specs(problem, settings.given_ranks), matrices)
    account = make_account(model, settings, matrices, decomposer.progress)
    available, whole = account.limit - account.fixed, sum(account.price.of_dense(matrix) for matrix in matrices)
    entries = sum(account.price.of_entry(matrix, _method(settings).kind) for matrix in matrices)
    if available >= whole:
        return _planned(({}, {}), matrices)
    per_weight = whole / sum(matrix.num_weights for matrix in matrices)
    found = kind.specs_within(problem, (available - entries) / per_weight) if available > entries else None
    if found is None:
        raise InputError(out_of_reach(settings, account, entries + per_weight * kind.least(problem)))
    return _planned(found, matrices)


def _planned(specs: tuple[Specs, Specs], matrices: Sequence[DenseMatrix]) -> tuple[Plan, list[DenseMatrix]]:
    """The plan of these specs, and the matrices they are for."""
    kept = {m.name: [list(m.shape), m.role, "worth its full size"] for m in matrices if m.name not in specs[0]}
    return as_plan(*specs, kept), [matrix for matrix in matrices if matrix.name in specs[0]]


def replace_by_tensors_(
    model: PreTrainedModel,
    matrices: Sequence[Matrix],
    plan: Plan,
    decomposer: Decomposer,
    dtype: torch.dtype,
    frees: bool,
) -> None:
    """Solve for all matrices, replace them, and note the relative error of each.

    Args:
        dtype: Type to store the numbers in.
        frees: Whether nobody needs the dense weights any more.
    """
    plan["provenance"]["relative_errors"] = {}
    by_name = {member.name: member for matrix in matrices for member in matrix.members}
    if not by_name:
        return
    for solved in _kind(decomposer.settings).solve(_problem(model, list(by_name.values()), decomposer), plan):
        members = [by_name[name] for name in solved.members]
        part = None
        if solved.part is not None:
            spec, state = plan["shared"][solved.part], _stored(solved.part_state, dtype)
            part = place_part_(model.base_model, solved.part, spec, state, members)
        for matrix in members:
            state = _stored(solved.members[matrix.name], dtype)
            bias: Any = getattr(matrix.module, "bias", None)
            if bias is not None:
                state["bias"] = bias.detach().clone().to(dtype)
            replace_matrix_(model, matrix, plan, plan["modules"][matrix.name], state, part, frees)


def _stored(state: StateDict, dtype: torch.dtype) -> StateDict:
    return {name: value.to(dtype) for name, value in state.items()}


def _problem(model: PreTrainedModel, matrices: Sequence[DenseMatrix], decomposer: Decomposer) -> TensorProblem:
    width = model.config.get_text_config().hidden_size
    device = torch.device(decomposer.settings.device or matrices[0].weight.device)

    def statistics(matrix: DenseMatrix) -> MatrixStatistics:
        found = decomposer.known(matrix, device)
        assert found is not None  # what a method needs is collected for all its matrices
        return found

    settings = decomposer.settings
    looks = statistics if settings.needs else None
    kept = decomposer.checkpoint()
    return TensorProblem(matrices, width, looks, device, decomposer.progress, settings.seed, kept)


def _kind(settings: CompressionSettings) -> TensorKind:
    return KINDS[_method(settings).kind]


def _method(settings: CompressionSettings) -> TensorMethod:
    assert settings.tensor_method is not None  # asked for tensors only
    return settings.tensor_method
