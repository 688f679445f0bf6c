"""Putting structures with the numbers a solver has found in the place of matrices, and what the model becomes then."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_lowrank.compression.job import Job
from hf_lowrank.hosts.matrices import DenseMatrix, Matrix
from hf_lowrank.methods.encoding import StateDict, sizes_beside_rank
from hf_lowrank.planning.plans import specs_of
from hf_lowrank.remote_code.configuration_lowrank import compressed_config_class
from hf_lowrank.remote_code.lowrank_plan import Plan, Spec
from hf_lowrank.remote_code.lowrank_structures import (
    build_shared_part,
    build_structure,
    install_plan_,
    is_bias,
    replace_,
)
from hf_lowrank.remote_code.lowrank_weights import skeleton
from hf_lowrank.remote_code.modeling_lowrank import compressed_model_class


def replace_matrices_(
    model: PreTrainedModel, matrices: Sequence[Matrix], plan: Plan, job: Job, dtype: torch.dtype, frees: bool
) -> None:
    """Solve and replace one group after the other, and note the relative error of each matrix.

    Args:
        matrices: Those that the plan replaces.
        dtype: Type to store the numbers in.
        frees: Whether nobody needs the dense weights any more.
    """
    plan["provenance"].setdefault("relative_errors", {})
    specs, by_name = specs_of(plan), {member.name: member for matrix in matrices for member in matrix.members}
    for solved in job.settings.method.solve(replace(job.problem, dtype=dtype), matrices, plan):
        members, part = [by_name[name] for name in solved.members], None
        if solved.part is not None:
            state = _stored(solved.part_state, dtype)
            part = _place_part_(model.base_model, solved.part, plan["shared"][solved.part], state, members)
        for matrix in members:
            state, spec = _stored(solved.members[matrix.name], dtype), specs[matrix.name]
            spec |= sizes_beside_rank(state)
            _replace_matrix_(model, matrix, plan, spec, state, part, frees)
        del solved


def _stored(state: StateDict, dtype: torch.dtype) -> StateDict:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def _place_part_(
    model: nn.Module, path: str, spec: Spec, state: StateDict, members: Sequence[DenseMatrix]
) -> nn.Module:
    """Put what several matrices will share where `path` of the model says, with its numbers, and return it."""
    part = build_shared_part([matrix.module for matrix in members], spec, device="meta")
    _load_numbers_(part, state, members[0].module)
    parent, _, leaf = path.rpartition(".")
    model.get_submodule(parent).add_module(leaf, part.train(model.training))
    return part


def _replace_matrix_(
    model: nn.Module,
    matrix: DenseMatrix,
    plan: Plan,
    spec: Spec,
    state: StateDict,
    part: nn.Module | None,
    frees: bool,
) -> None:
    """Put the structure of `spec` in the place of a matrix, and note its relative error in the plan.

    Args:
        part: What the structure shares with others, already in its place.
        frees: Whether nobody needs the dense weight any more.
    """
    structure = build_structure(matrix.module, spec, device="meta", shared=part)
    bias: Any = getattr(matrix.module, "bias", None)
    if bias is not None and "bias" in dict(structure.named_parameters()) and "bias" not in state:
        state["bias"] = bias.detach().clone().to(next(iter(state.values())).dtype)
    _load_numbers_(structure, state, matrix.module)
    plan["provenance"]["relative_errors"][matrix.name] = relative_error(matrix.weight, structure)
    replace_(model, matrix.path, structure)
    if frees:
        matrix.module.register_parameter("weight", None)


def _load_numbers_(structure: nn.Module, state: StateDict, dense: Any) -> None:
    """Give a structure its numbers, where the dense module's are, and train of it what was trained there."""
    placed = {name: value.to(dense.weight.device).contiguous() for name, value in state.items()}
    structure.load_state_dict(placed, strict=True, assign=True)
    for name, parameter in structure.named_parameters():
        host = dense.bias if is_bias(structure, name) and dense.bias is not None else dense.weight
        parameter.requires_grad_(host.requires_grad)


def relative_error(weight: torch.Tensor, structure: Any) -> float:
    """`||W - W'||_F / ||W||_F` of the weight (O, I) and what stands for it; 0 for a weight of zeros."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.norm(weight.to(wide))
    with torch.no_grad():
        difference = torch.linalg.norm(structure.to_dense().to(wide).sub_(weight))
    return float(difference / norm) if norm > 0 else 0.0


def become_compressed_(model: PreTrainedModel, plan: Plan) -> None:
    """Give a model whose matrices are replaced the class, the configuration and the tied head it is loaded with."""
    config = copy.deepcopy(model.config)
    config.__class__ = compressed_config_class(type(model.config))
    config.compression = plan
    dense_head = model.get_output_embeddings()
    install_plan_(model, plan)
    head: Any = model.get_output_embeddings()
    if head is not dense_head and getattr(dense_head, "bias", None) is not None:
        head.get_submodule(head.BIAS.rpartition(".")[0]).bias = dense_head.bias
    retype_(model, compressed_model_class(type(model)), config)


def retype_(model: PreTrainedModel, model_class: type, config: PreTrainedConfig) -> None:
    """Make `model` an instance of another class of the same fields, with that configuration everywhere in it."""
    old = model.config
    for module in model.modules():
        for name, value in vars(module).items():
            if value is old:
                setattr(module, name, config)
    model.__class__ = model_class
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()


def cast_(small: Any, dtype: torch.dtype) -> None:
    """Make it what it would be loaded as in that type: what a constructor makes keeps the type it is made in."""
    before = dict(small.named_buffers())
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        made = dict(skeleton(type(small), small.config).named_buffers())
    finally:
        torch.set_default_dtype(usual)
    small.to(dtype)
    saved = small.state_dict(keep_vars=True)
    for name, buffer in before.items():
        if name in made and name not in saved:
            parent, _, leaf = name.rpartition(".")
            setattr(small.get_submodule(parent), leaf, buffer.to(made[name].dtype))
