"""Dense model -> compressed model and back: the only file that knows both sides."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.compression.anchoring import anchor_
from hf_lowrank.compression.block_refinement import refine_blocks_
from hf_lowrank.compression.conversion import convert_storage_
from hf_lowrank.compression.disk.streaming import stream_
from hf_lowrank.compression.filling import become_compressed_, cast_, relative_error, replace_matrices_, retype_
from hf_lowrank.compression.job import Job, prepare
from hf_lowrank.compression.refinement import refine_
from hf_lowrank.compression.rounding import round_
from hf_lowrank.compression.settled import settle_compression
from hf_lowrank.hosts.disk.offloaded import offloaded
from hf_lowrank.hosts.gradients import with_gradients
from hf_lowrank.hosts.loading import held_compressed_model
from hf_lowrank.hosts.matrices import Matrix, turned
from hf_lowrank.hosts.rehearsal import require_same_inputs
from hf_lowrank.methods.encoding import DECODERS
from hf_lowrank.methods.rotation import rotate_
from hf_lowrank.options import checked
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.configuration_lowrank import stock_class
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.remote_code.lowrank_structures import (
    dense_at,
    is_bias,
    named_shared_parts,
    named_structures,
    replace_,
)


@checked
@with_gradients
def compress(
    model: PreTrainedModel | str | Path,
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
        calibration: Text like that the model is for: a file, a list of strings, a data set, its Hub name, or batches.
            None draws synthetic tokens, which is better than no statistics and not as good as text.
        tokenizer: For the text; None takes the one saved with the model.
        inplace: Turn `model` itself into the compressed model, freeing each dense matrix as it is replaced.
        progress: Shows how far the work is; see `hf_lowrank.progress`.
        options: Those of `CompressOptions`, a budget among them.

    Returns:
        A `LowRank...` model with the same head, place and mode, that saves itself with the code it needs.

    Raises:
        InputError: If the model or an option cannot be used; `model` is then unchanged.
    """
    settings = settle_compression(options, has_text=calibration is not None, inplace=inplace)
    about: Any = {"calibration": calibration, "tokenizer": tokenizer, "inplace": inplace, "progress": progress}
    job = prepare(model, settings, **about)
    if offloaded(job.model) is not None:
        return stream_(job)
    settings, dense, dtype = job.settings, job.model, job.problem.dtype
    plan, replaced = job.plan()
    held = [member.held for matrix in replaced for member in matrix.members]
    is_ours = (inplace or job.is_ours) and not settings.learning
    small: Any = dense if is_ours else _copy_sharing(dense, held)
    is_retyped = small.dtype != dtype  # asked now: the first parameter may be a factor soon, already of that type
    if settings.learning:
        _compress_and_learn_(small, plan, replaced, job)
    else:
        replace_matrices_(small, replaced, plan, job, dtype, frees=is_ours)
        become_compressed_(small, plan)
    if is_retyped or settings.learning:
        cast_(small, dtype)
    if job.settings.options.rounds:
        round_(small, job.problem)
    else:
        rotate_(small)  # a grid of our own has steps for each component; those of other quantizers need not
    require_same_inputs(small, job.rehearsal.inputs)
    return small


def _compress_and_learn_(small: PreTrainedModel, plan: Plan, matrices: Sequence[Matrix], job: Job) -> None:
    """Replace the matrices by pairs of factors, better those, and only then store them as the plan says."""
    pairs = copy.deepcopy(plan)
    for spec in pairs["modules"].values():
        if spec["structure"] in DECODERS:
            spec["structure"] = "low_rank"
    replace_matrices_(small, matrices, pairs, job, small.dtype, frees=False)
    become_compressed_(small, pairs)
    plan["provenance"] |= _learn_(small, matrices, job)
    plan["provenance"]["relative_errors"] = {
        member.name: relative_error(member.weight, small.get_submodule(member.path))
        for matrix in matrices
        for member in matrix.members
    }
    small.config.compression = plan
    convert_storage_(small, job.settings.storage.linear, job.problem.dtype)


def _learn_(small: PreTrainedModel, matrices: Sequence[Matrix], job: Job) -> dict[str, Any]:
    """Better pairs of factors by what the dense model does on the text; what each step did."""
    problem, learning, record = job.problem, job.settings.learning, {}
    dense, text, seed, shown = job.model, problem.evidence.calibration, problem.seed, problem.progress
    if learning.anchors:
        kept, metric = problem.checkpoint(small), partial(job.settings.method.output_metric, problem)
        record["anchoring"] = asdict(anchor_(small, dense, matrices, metric, text, checkpoint=kept, progress=shown))
    if passes := learning.block_passes:
        kept = problem.checkpoint(small)
        blocks = refine_blocks_(small, dense, text, passes=passes, seed=seed, checkpoint=kept, progress=shown)
        record["block_refinement"] = {name: asdict(refined) for name, refined in blocks.items()}
    if passes := learning.passes:
        rate, kept = learning.rate, problem.checkpoint(small)
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
    model = held_compressed_model(model, "decompress")
    structures = named_structures(model)
    dense = _copy_sharing(model, [structure for _, structure in structures])
    host_class = stock_class(type(model))
    config = copy.deepcopy(model.config)
    config.__class__ = stock_class(type(model.config))
    for ours in ("compression", "materialize", "auto_map"):
        config.__dict__.pop(ours, None)
    config.dtype = model.dtype  # saving leaves its name there
    with torch.device("meta"):
        skeleton = host_class(config)
    for path, structure in structures:
        replace_(dense, path, _dense_module(dense_at(skeleton, path), structure))
    for path, _ in named_shared_parts(dense):
        parent, _, leaf = path.rpartition(".")
        delattr(dense.get_submodule(parent), leaf)
    for ours in ("_tied_weights_keys", "_weight_conversions"):  # the stock class has its own names, here and on disk
        dense.__dict__.pop(ours, None)
    retype_(dense, host_class, config)
    return dense


def _copy_sharing(model: PreTrainedModel, held: Iterable[nn.Module | nn.Parameter]) -> PreTrainedModel:
    """A deep copy that holds these themselves: they are about to be replaced, so their weights need no copy."""
    return copy.deepcopy(model, {id(part): part for part in held})


def _dense_module(host: Any, structure: Any) -> nn.Module:
    """The host's own kind of layer with the weight and bias a structure stands for."""
    with torch.no_grad():
        weight, bias = structure.to_dense(), structure.dense_bias() if structure.HOSTS == "linear" else None
    state = {"weight": turned(host, weight).contiguous()}
    if bias is not None:
        state["bias"] = bias.detach().clone()
    host.load_state_dict(state, strict=True, assign=True)
    trainable = {is_bias(structure, name): p.requires_grad for name, p in structure.named_parameters()}
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(trainable[name == "bias"])
    return host  # type: ignore[no-any-return]  # any of several classes
