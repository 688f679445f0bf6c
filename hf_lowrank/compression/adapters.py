"""Adapters merged into factors: a low-rank change of a low-rank matrix is one of the sum of their ranks."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.compression.conversion import put_factors_
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.loading import held_compressed_model
from hf_lowrank.methods.encoding import DECODERS
from hf_lowrank.methods.factors import Factors, truncated
from hf_lowrank.options import checked
from hf_lowrank.remote_code.lowrank_structures import structure_name

_PREFIX, _FIRST, _SECOND = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# What changes a weight otherwise than by `s B A`.
_OTHERWISE = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters")


@dataclass(frozen=True)
class _Change:
    """`s B A` of a weight (O, I): `up` is `s B`, (O, r), and `down` is `A`, (r, I)."""

    name: str
    up: torch.Tensor
    down: torch.Tensor


@checked
def merge_adapter_(model: PreTrainedModel, adapter: str | Path, keep_ranks: bool = False) -> dict[str, float]:
    """Merge a LoRA into a compressed model: one that PEFT saved, trained on the dense model or on this one.

    A compressed layer `W = up down` becomes `[up, s B] [down; A]`, of a rank that is `r` larger, exactly; a dense one
    becomes `W + s B A`. Adapters of the factors themselves (`up`, `down`) PEFT merges by itself.

    Args:
        adapter: The folder PEFT wrote.
        keep_ranks: Whether the sum is cut to the rank there was, to the nearest matrix of it: nothing grows.

    Returns:
        What that lost, `||W' - W''|| / ||W'||` of each compressed layer; 0 where nothing was cut.

    Raises:
        InputError: If the adapter is none of LoRA's, or changes what is neither two factors, pivoted rows nor dense.
    """
    model, lost = held_compressed_model(model, "merge into"), {}
    changes = {_name_in_base(model, change): change for change in _changes(Path(adapter))}  # all, before any is made
    for name, change in changes.items():
        module: Any = model.base_model.get_submodule(name)
        device = next(module.parameters()).device
        delta = Factors(change.up.to(device), change.down.to(device))
        if structure_name(module) in DECODERS:
            lost[name] = _merge_(model, name, delta, keep_ranks)
        else:
            _add_(module, delta)
    return lost


def _merge_(model: Any, name: str, delta: Factors, keep_ranks: bool) -> float:
    structure = model.base_model.get_submodule(name)
    storage = str(structure_name(structure))
    factors = DECODERS[storage](structure)
    up = torch.cat([factors.up.double(), delta.up.double()], dim=1)
    down = torch.cat([factors.down.double(), delta.down.double()])
    most = min(len(up), down.shape[1])
    rank = structure.rank if keep_ranks else min(up.shape[1], most)
    found = truncated(up, down, rank)
    put_factors_(model, name, found, storage, factors.up.dtype)
    whole = up @ down
    return float((whole - found.product).norm() / whole.norm()) if keep_ranks else 0.0


def _add_(module: Any, delta: Factors) -> None:
    weight = delta.product
    with torch.no_grad():
        module.weight += (weight.T if isinstance(module, Conv1D) else weight).to(module.weight)


def _name_in_base(model: Any, change: _Change) -> str:
    """The name relative to the base model of a layer that an adapter names relative to the whole one it was made for.

    Raises:
        InputError: If nothing can be merged into what has it, or it is of another shape.
    """
    prefix, held = f"{model.base_model_prefix}.", dict(model.base_model.named_modules())
    name = change.name if change.name in held else change.name.removeprefix(prefix)
    kind = structure_name(held[name]) if name in held else None
    if kind in DECODERS or isinstance(held.get(name), (nn.Linear, Conv1D)):
        module: Any = held[name]
        shape = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
        if (given := (len(change.up), change.down.shape[1])) == shape:
            return name
        raise InputError(f"The adapter changes {name} as a matrix of {given}, and it is of {shape} here.")
    what = kind or (type(held[name]).__name__ if name in held else "not among the layers")
    raise InputError(
        f"The adapter changes {name}, which is {what} here: it can be merged into two factors, pivoted rows and dense "
        "layers of the base model. Leave it out of the adapter, or compress with another storage."
    )


def _changes(folder: Path) -> Iterator[_Change]:
    """What an adapter changes, layer after layer.

    Raises:
        InputError: If it is none of LoRA's, or does more than that.
    """
    try:
        about = dict(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{folder} holds no readable adapter ({error}). Give the folder that PEFT's save_pretrained wrote."
        ) from error
    more = [name for name in _OTHERWISE if about.get(name)]
    if about.get("peft_type") != "LORA" or more:
        what = f"LoRA with {more[0]}" if more else about.get("peft_type")
        raise InputError(
            f"Only a plain LoRA can be merged into factors, got {what}. Merge it into the dense model first."
        )
    names = [key.removesuffix(_FIRST) for key in weights if key.endswith(_FIRST)]
    if odd := sorted({name + end for name in names for end in (_FIRST, _SECOND)} ^ weights.keys()):
        raise InputError(
            f"Only changes of matrices can be merged, each of two tensors, and {odd[0]} is none of those or lacks its "
            "other. Leave it out of the adapter, or merge it into the dense model first."
        )
    for name in names:
        first, short = weights[name + _FIRST], name.removeprefix(_PREFIX)
        yield _Change(short, weights[name + _SECOND] * _scale(about, short, len(first)), first)


def _scale(about: Any, name: str, rank: int) -> float:
    """`s`: alpha over the rank, or over its root."""
    alpha = float(about["lora_alpha"])
    for pattern, other in (about.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith(f".{pattern}"):
            alpha = float(other)
    return alpha / (rank**0.5 if about.get("use_rslora") else rank)
