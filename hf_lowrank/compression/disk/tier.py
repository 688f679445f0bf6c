"""Which models are held in memory, and which are compressed a block at a time with their weights in files."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from hf_lowrank.compression.settled import Learning, Settings
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.disk.offloaded import load_offloaded, offloaded, take_over_
from hf_lowrank.hosts.loading import dense_class, load_dense
from hf_lowrank.methods.matrix.method import MatrixMethod
from hf_lowrank.planning.budgets import parse_size
from hf_lowrank.records.machine import free_memory, usable_device
from hf_lowrank.remote_code.lowrank_weights import skeleton

_USABLE = 0.8
_WIDE = 4


def opened(model: PreTrainedModel | str | Path, settings: Settings) -> tuple[PreTrainedModel, Settings]:
    """A dense model, its weights in their files if they would take too much memory, and the settings for it.

    Raises:
        InputError: If it cannot be loaded, or what was asked for needs a model in memory that is not.
    """
    if not _is_too_large(model, settings):
        return load_dense(model), settings
    settings, device = _for_blocks(settings), usable_device(settings.options.device or "cpu")
    if isinstance(model, (str, Path)):
        return load_offloaded(dense_class(model), model, torch.float32, device), settings
    if offloaded(model) is None:
        take_over_(model, model.dtype, device)
    return model, settings


def _is_too_large(model: Any, settings: Settings) -> bool:
    """Whether a model was left on disk, or would take more memory than it may.

    Held whole it takes its weights as they are stored, a copy in float32 if it is run in that, and what they become.
    """
    if not isinstance(model, (str, Path)):
        if not isinstance(model, nn.Module):
            return False  # loading says what it is
        return any(parameter.is_meta for parameter in model.parameters()) or offloaded(model) is not None
    size, itemsize = _stored_size(model)
    copies = 2 + (_WIDE / itemsize if settings.runs_model and itemsize < _WIDE else 0)
    memory = settings.options.memory
    return copies * size > (_USABLE * free_memory() if memory is None else parse_size(memory))


def _stored_size(model: str | Path) -> tuple[int, int]:
    """Bytes of the weights in a folder or Hub id, and of one number; none where there are none to be found."""
    with suppress(Exception):  # a configuration's own code, met with any value; `load_dense` says what is wrong
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        itemsize = (config.dtype or torch.float32).itemsize
        if Path(model).is_dir():
            return sum(path.stat().st_size for path in Path(model).glob("*.safetensors")), itemsize
        host = skeleton(dense_class(model), config)
        return itemsize * sum(parameter.numel() for parameter in host.parameters()), itemsize
    return 0, _WIDE


def _for_blocks(settings: Settings) -> Settings:
    """The settings of a model that is compressed block by block.

    Raises:
        InputError: If something was asked for that looks at more than a block at a time.
    """
    options, method = settings.options, settings.method
    asked = {
        f"method={options.method}": not isinstance(method, MatrixMethod),
        "bits": options.rounds,
        "keep_latency": options.keep_latency is not None,
        "embeddings=autoencoder": options.embeddings == "autoencoder",
        "anchored": bool(options.anchored),
        "refine_block_passes": bool(options.refine_block_passes),
        "refine_passes": bool(options.refine_passes),
        "allocation=measured": options.allocation == "measured",
    }
    if wrong := next((name for name, is_asked in asked.items() if is_asked), None):
        raise InputError(
            f"{wrong} needs the whole model in memory, and this one is compressed block by block. Leave it out, or "
            "raise memory."
        )
    allocation = "first_order" if settings.allocation == "measured" else settings.allocation
    learning = Learning(anchors=False, block_passes=0, passes=0, rate=settings.learning.rate)
    storage = replace(settings.storage, tables="low_rank")
    runs_model = bool(settings.kinds)
    return replace(settings, allocation=allocation, storage=storage, learning=learning, runs_model=runs_model)
