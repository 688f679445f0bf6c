"""Plans and numbers of the tensor methods: what `compress` asks for in place of one matrix after the other."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.decomposing import Decomposer
from hf_lowrank.errors import InputError
from hf_lowrank.filling import load_numbers_, relative_error
from hf_lowrank.planning.accounts import make_account
from hf_lowrank.planning.plans import as_plan, candidate_matrices, check_finite, out_of_reach
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.remote_code.lowrank_structures import build_shared_part, build_structure, replace_
from hf_lowrank.settings import CompressionSettings
from hf_lowrank.solvers.stacking import in_group
from hf_lowrank.targets import DenseMatrix, Matrix
from hf_lowrank.tensors import KINDS
from hf_lowrank.tensors.problem import Solved, TensorKind, TensorProblem


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
        modules, shared = kind.specs(problem, settings.given_ranks)
        return as_plan(modules, shared, {}), matrices
    account = make_account(model, settings, matrices, decomposer.progress)
    available, whole = account.limit - account.fixed, sum(account.price.of_dense(matrix) for matrix in matrices)
    if available >= whole:
        return as_plan({}, {}, {m.name: [list(m.shape), m.role, "worth its full size"] for m in matrices}), []
    per_weight = whole / sum(matrix.num_weights for matrix in matrices)
    found = kind.specs_within(problem, available / per_weight) if available > 0 else None
    if found is None:
        raise InputError(out_of_reach(settings, account, per_weight * kind.least(problem)))
    return as_plan(*found, {}), matrices


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
    errors = plan["provenance"]["relative_errors"] = {}
    by_name = {member.name: member for matrix in matrices for member in matrix.members}
    if not by_name:
        return
    for solved in _kind(decomposer.settings).solve(_problem(model, list(by_name.values()), decomposer), plan):
        members = [by_name[name] for name in solved.members]
        part = _placed_part(model, solved, members, plan, dtype)
        for matrix in members:
            structure: Any = build_structure(matrix.module, plan["modules"][matrix.name], "meta", part)
            bias: Any = getattr(matrix.module, "bias", None)
            state = {name: value.to(dtype) for name, value in solved.members[matrix.name].items()}
            if bias is not None:
                state["bias"] = bias.detach().clone().to(dtype)
            load_numbers_(structure, state, matrix.module)
            errors[matrix.name] = relative_error(matrix.weight, structure)
            replace_(model, matrix.path, structure)
            if frees:
                matrix.module.register_parameter("weight", None)


def _placed_part(
    model: Any, solved: Solved, members: Sequence[DenseMatrix], plan: Plan, dtype: torch.dtype
) -> torch.nn.Module | None:
    if solved.part is None:
        return None
    spec = plan["shared"][solved.part]
    part = build_shared_part([matrix.module for matrix in members], spec, device="meta")
    load_numbers_(part, {name: value.to(dtype) for name, value in solved.part_state.items()}, members[0].module)
    place, _, leaf = solved.part.rpartition(".")
    model.base_model.get_submodule(place).add_module(leaf, part.train(model.training))
    return part


def _problem(model: PreTrainedModel, matrices: Sequence[DenseMatrix], decomposer: Decomposer) -> TensorProblem:
    width = model.config.get_text_config().hidden_size
    device = torch.device(decomposer.settings.device or matrices[0].weight.device)

    def moment(matrix: DenseMatrix) -> tuple[torch.Tensor, int]:
        found = decomposer.known(matrix, device)
        assert found is not None  # what a method needs is collected for all its matrices
        assert found.input_moment is not None
        return found.input_moment, found.num_tokens

    looks = bool(decomposer.settings.needs)
    return TensorProblem(matrices, width, moment if looks else None, device, decomposer.progress)


def _kind(settings: CompressionSettings) -> TensorKind:
    method = settings.tensor_method
    assert method is not None  # asked for tensors only
    return KINDS[method.kind]
