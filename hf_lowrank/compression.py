"""Dense model -> compressed model and back: the only file that knows both sides."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.anchoring import anchor_
from hf_lowrank.block_refinement import refine_blocks_
from hf_lowrank.conversion import convert_storage_
from hf_lowrank.decomposing import Decomposer
from hf_lowrank.errors import InputError
from hf_lowrank.filling import place_part_, relative_error, replace_matrix_
from hf_lowrank.loading import find_tokenizer, held_model, load_dense
from hf_lowrank.machine import versions
from hf_lowrank.origin import find_origin
from hf_lowrank.planning.plans import make_plan
from hf_lowrank.planning.sizes import parameter_bytes
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.refinement import refine_
from hf_lowrank.remote_code.configuration_lowrank import compressed_config_class, dense_config_class
from hf_lowrank.remote_code.lowrank_model import LowRankMixin
from hf_lowrank.remote_code.lowrank_plan import Plan, Spec
from hf_lowrank.remote_code.lowrank_structures import (
    install_plan_,
    is_bias,
    named_shared_parts,
    named_structures,
    replace_,
)
from hf_lowrank.remote_code.modeling_lowrank import compressed_model_class, dense_model_class
from hf_lowrank.settings import CompressionSettings, make_settings
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.storage import DECODERS, ENCODERS, sizes_beside_rank
from hf_lowrank.targets import OUTPUT_EMBEDDINGS, JointMatrix, Matrix
from hf_lowrank.tensors.compression import make_tensor_plan, replace_by_tensors_
from hf_lowrank.version import __version__

_NARROW = (torch.float16, torch.bfloat16)


def compress(
    model: PreTrainedModel | str | Path,
    settings: CompressionSettings | None = None,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    inplace: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> Any:
    """A smaller copy of a dense model: `compress("my-bert", keep_params=0.6, calibration=texts)`.

    Args:
        model: A transformers model, a Hub id or a folder.
        settings: How to compress; or give the fields of `CompressionSettings` as keyword arguments.
        calibration: Text like that the model is for: a file, a list of strings, a data set, its Hub name, or batches.
            None draws synthetic tokens, which is better than no statistics and not as good as text.
        tokenizer: For the text; None takes the one saved with the model.
        inplace: Turn `model` itself into the compressed model, freeing each dense matrix as it is replaced.
        progress: Shows how far the work is; see `hf_lowrank.progress`.

    Returns:
        A `LowRank...` model with the same head, place and mode, that saves itself with the code it needs.

    Raises:
        InputError: If the model or an option cannot be used; `model` is then unchanged.
    """
    settings = settings or make_settings(options)
    for option in ("anchored", "refine_block_passes", "refine_passes"):
        if inplace and getattr(settings, option):  # None is no request
            raise InputError(f"{option} needs the dense model to learn from. Leave inplace out, or {option}.")
    dense = load_dense(model)
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(dense)
    dtype, dense_bytes = settings.torch_dtype or dense.dtype, parameter_bytes(dense)
    if settings.looks_at_text and dense.dtype in _NARROW and not inplace:
        dense = copy.deepcopy(dense).float()  # gradients leave the range of 16 bits
        settings = replace(settings, dtype=str(dtype).removeprefix("torch."))
    decomposer = Decomposer(dense, settings, calibration, tokenizer, progress)
    plan, replaced = plan_model(dense, settings, decomposer)
    plan["provenance"] |= _provenance(dense, settings, decomposer) | {"dense_size_bytes": dense_bytes}
    modules = [member.module for matrix in replaced for member in matrix.members]
    anchors = settings.anchors(has_text=calibration is not None, inplace=inplace)
    passes = settings.passes(has_text=calibration is not None, inplace=inplace)
    if anchors or passes or settings.refine_block_passes:
        copied = _copy_sharing(dense, modules)
        return _compress_and_learn_(copied, dense, plan, replaced, decomposer, anchors, passes).to(dtype)
    is_ours = inplace or dense is not model
    small: Any = dense if is_ours else _copy_sharing(dense, modules)
    is_retyped = small.dtype != dtype  # asked now: the first parameter may be a factor soon, already of that type
    _replacer(settings)(small, replaced, plan, decomposer, dtype, frees=is_ours)
    _become_compressed_(small, plan)
    return small.to(dtype) if is_retyped else small


def _provenance(dense: PreTrainedModel, settings: CompressionSettings, decomposer: Decomposer) -> dict[str, Any]:
    """What made a model: kept in its `config.json`, and shown on its card."""
    config: Any = dense.config
    return {
        "settings": settings.to_dict(),
        "hf_lowrank": __version__,
        "text": decomposer.described_text(),
        "versions": versions(),
        "origin": find_origin(getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None)).to_dict(),
    }


def plan_model(
    model: PreTrainedModel, settings: CompressionSettings, decomposer: Decomposer
) -> tuple[Plan, Sequence[Matrix]]:
    """The plan for a dense model by any method, and the matrices it replaces.

    Raises:
        InputError: If nothing matches, a weight is not finite, or the budget is out of reach.
    """
    if settings.tensor_method is None:
        return make_plan(model, settings, decomposer)
    return make_tensor_plan(model, settings, decomposer)


def _replacer(settings: CompressionSettings) -> Callable[..., None]:
    return _replace_matrices_ if settings.tensor_method is None else replace_by_tensors_


def _compress_and_learn_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    plan: Plan,
    matrices: Sequence[Matrix],
    decomposer: Decomposer,
    anchors: bool,
    passes: int,
) -> Any:
    """Replace the matrices by pairs of factors, better those, and only then store them as the plan says."""
    pairs = copy.deepcopy(plan)
    for spec in pairs["modules"].values():
        if spec["structure"] in DECODERS:
            spec["structure"] = "low_rank"
    _replace_matrices_(small, matrices, pairs, decomposer, small.dtype, frees=False)
    _become_compressed_(small, pairs)
    plan["provenance"] |= _learn_(small, dense, matrices, decomposer, anchors, passes)
    plan["provenance"]["relative_errors"] = {
        member.name: relative_error(member.weight, small.get_submodule(member.path))
        for matrix in matrices
        for member in matrix.members
    }
    small.config.compression = plan
    convert_storage_(small, decomposer.settings.chosen_storage, decomposer.settings.torch_dtype)
    return small


def _learn_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    matrices: Sequence[Matrix],
    decomposer: Decomposer,
    anchors: bool,
    passes: int,
) -> dict[str, Any]:
    """Better pairs of factors by what the dense model does on the text; what each step did."""
    settings, text, record = decomposer.settings, decomposer.calibration, {}
    seed, shown = settings.seed, decomposer.progress
    if anchors:
        kept = decomposer.checkpoint(small)
        anchored = anchor_(small, dense, matrices, decomposer.output_metric, text, checkpoint=kept, progress=shown)
        record["anchoring"] = asdict(anchored)
    if (block_passes := settings.refine_block_passes) > 0:
        kept = decomposer.checkpoint(small)
        blocks = refine_blocks_(small, dense, text, passes=block_passes, seed=seed, checkpoint=kept, progress=shown)
        record["block_refinement"] = {name: asdict(refined) for name, refined in blocks.items()}
    if passes:
        rate, kept = settings.refine_learning_rate, decomposer.checkpoint(small)
        refined = refine_(
            small, dense, text, passes=passes, learning_rate=rate, seed=seed, checkpoint=kept, progress=shown
        )
        record["refinement"] = asdict(refined)
    return record


def decompress(model: PreTrainedModel) -> Any:
    """The stock transformers model a compressed one stands for: each structure becomes the dense layer it replaced.

    Raises:
        InputError: If `model` is not a compressed model, or a weight is not finite.
    """
    model = held_model(model)
    if not isinstance(model, LowRankMixin):
        raise InputError(f"{type(model).__name__} is not a compressed model; there is nothing to decompress.")
    structures = named_structures(model)
    dense = _copy_sharing(model, [structure for _, structure in structures])
    host_class = dense_model_class(type(model))
    config = copy.deepcopy(model.config)
    config.__class__ = dense_config_class(type(model.config))
    for ours in ("compression", "materialize", "auto_map"):
        config.__dict__.pop(ours, None)
    with torch.device("meta"):
        skeleton = host_class(config)
    for path, structure in structures:
        replace_(dense, path, _dense_module(skeleton.get_submodule(path), structure))
    for path, _ in named_shared_parts(dense):
        parent, _, leaf = path.rpartition(".")
        delattr(dense.get_submodule(parent), leaf)
    for ours in ("_tied_weights_keys", "_weight_conversions"):  # the stock class has its own names, here and on disk
        dense.__dict__.pop(ours, None)
    _retype_(dense, host_class, config)
    return dense


def _copy_sharing(model: PreTrainedModel, modules: Iterable[nn.Module]) -> PreTrainedModel:
    """A deep copy that holds `modules` themselves: they are about to be replaced, so their weights need no copy."""
    return copy.deepcopy(model, {id(module): module for module in modules})


def _replace_matrices_(
    model: PreTrainedModel,
    matrices: Sequence[Matrix],
    plan: Plan,
    decomposer: Decomposer,
    dtype: torch.dtype,
    frees: bool,
) -> None:
    """Solve and replace one matrix after the other, and note the relative error of each.

    Args:
        dtype: Type to store the factors in.
        frees: Whether nobody needs the dense weights any more.
    """
    plan["provenance"]["relative_errors"] = {}
    for matrix in decomposer.progress(matrices, "decomposing"):
        if isinstance(matrix, JointMatrix):
            spec = plan["shared"][matrix.name]
            factors = decomposer(matrix).factors(spec["rank"])
            down = {"down.weight": factors.down.to(dtype)}
            part = place_part_(model, matrix.path, spec, down, matrix.members)
            parts = factors.up.split([member.shape[0] for member in matrix.members])
            solved: list[Any] = [Factors(up, factors.down) for up in parts]
        else:
            part, solved = None, [decomposer.solution(matrix, _specs(plan)[matrix.name])]
        for member, factors in zip(matrix.members, solved, strict=True):
            spec = _specs(plan)[member.name]
            state = ENCODERS[spec["structure"]](factors, decomposer.bias(member, factors), dtype)
            spec |= sizes_beside_rank(state)
            replace_matrix_(model, member, plan, spec, state, part, frees)
        del factors, solved


def _specs(plan: Plan) -> dict[str, Spec]:
    """The spec of every replaced matrix by its name."""
    return {**plan["modules"], OUTPUT_EMBEDDINGS: plan.get("output_embeddings")}


def _become_compressed_(model: PreTrainedModel, plan: Plan) -> None:
    """Give a model whose matrices are replaced the class, the configuration and the tied head it is loaded with."""
    config = copy.deepcopy(model.config)
    config.__class__ = compressed_config_class(type(model.config))
    config.compression = plan
    dense_head = model.get_output_embeddings()
    install_plan_(model, plan)
    head: Any = model.get_output_embeddings()
    if head is not dense_head and getattr(dense_head, "bias", None) is not None:
        head.get_submodule(head.BIAS.rpartition(".")[0]).bias = dense_head.bias
    _retype_(model, compressed_model_class(type(model)), config)


def _dense_module(host: Any, structure: Any) -> nn.Module:
    """The host's own kind of layer with the weight and bias a structure stands for."""
    with torch.no_grad():
        weight, bias = structure.to_dense(), structure.dense_bias() if structure.HOSTS == "linear" else None
    state = {"weight": (weight.T if isinstance(host, Conv1D) else weight).contiguous()}
    if bias is not None:
        state["bias"] = bias.detach().clone()
    host.load_state_dict(state, strict=True, assign=True)
    trainable = {is_bias(structure, name): p.requires_grad for name, p in structure.named_parameters()}
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(trainable[name == "bias"])
    return host  # type: ignore[no-any-return]  # any of several classes


def _retype_(model: PreTrainedModel, model_class: type, config: PreTrainedConfig) -> None:
    """Make `model` an instance of another class of the same fields, with that configuration everywhere in it."""
    old = model.config
    for module in model.modules():
        for name, value in vars(module).items():
            if value is old:
                setattr(module, name, config)
    model.__class__ = model_class
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.tie_weights()
