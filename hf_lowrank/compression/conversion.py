"""The same low-rank matrices in another storage."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.loading import held_compressed_model
from hf_lowrank.methods.encoding import DECODERS, ENCODERS, sizes_beside_rank
from hf_lowrank.methods.factors import Factors, truncated
from hf_lowrank.methods.rotation import rotate_
from hf_lowrank.options import checked
from hf_lowrank.remote_code.lowrank_structures import replace_, structure_name
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

_TWO_FACTORS = "low_rank"


@checked
def convert_storage_(model: PreTrainedModel, storage: str, dtype: torch.dtype | None = None) -> None:
    """Turn every low-rank linear layer of a compressed model into another storage of the same matrix and rank.

    Exact to rounding. Two factors are easier to train, pivoted rows are smaller: train as `low_rank`, keep as
    `pivoted`. A head stays as it is.

    Args:
        storage: `low_rank` or `pivoted`.
        dtype: Type to store the numbers in; None keeps each layer's.

    Raises:
        InputError: If there is no such storage, or the model is not compressed.
    """
    model = held_compressed_model(model, "store otherwise")
    if storage not in DECODERS:
        raise InputError(f"storage must be one of {', '.join(DECODERS)}, got {storage!r}.")
    for name in model.config.plan["modules"]:
        if str(structure_name(model.base_model.get_submodule(name))) in {*DECODERS} - {storage}:
            _convert_(model, name, storage, dtype)
            rotate_(model.base_model.get_submodule(name))


@contextmanager
def as_two_factors(model: PreTrainedModel) -> Iterator[None]:
    """Within, every low-rank linear layer is two factors `U sqrt(S)` and `sqrt(S) V^T`; afterwards it is as it was.

    For training: steps of one size for all numbers suit orthogonal columns of like lengths. Every output hangs on
    pivoted rows, and the factors of a data-aware solver lean on each other. A layer that has not changed is afterwards
    the very same one, without a rounding; one that has is stored as it was.
    """
    base, modules = model.base_model, model.config.plan["modules"]
    specs = {name: spec for name, spec in modules.items() if spec["structure"] in DECODERS}
    stored = {name: base.get_submodule(name) for name in specs}
    for name in specs:
        _convert_(model, name, _TWO_FACTORS, None)
    at_first = {name: [p.detach().cpu().clone() for p in base.get_submodule(name).parameters()] for name in specs}
    try:
        yield
    finally:
        for name, spec in specs.items():
            pair: Any = base.get_submodule(name)
            if structure_name(pair) != _TWO_FACTORS:  # an error came through, and what a training put around it stays
                continue
            if all(map(torch.equal, at_first[name], (p.detach().cpu() for p in pair.parameters()))):
                replace_(base, name, stored[name].to(pair.up.weight.device))
                modules[name] = spec
            elif spec["structure"] != _TWO_FACTORS:
                _convert_(model, name, spec["structure"], None)
            else:
                rotate_(pair)


def _convert_(model: PreTrainedModel, name: str, storage: str, dtype: torch.dtype | None) -> None:
    structure: Any = model.base_model.get_submodule(name)
    factors = DECODERS[str(structure_name(structure))](structure)
    wide = truncated(factors.up.double(), factors.down.double(), structure.rank)
    put_factors_(model, name, wide, storage, dtype or factors.up.dtype)


def put_factors_(model: PreTrainedModel, name: str, factors: Factors, storage: str, dtype: torch.dtype) -> None:
    """Put a low-rank matrix in the place of another, in that storage, and write it down in the plan.

    Args:
        factors: In float64.
    """
    base, modules = model.base_model, model.config.plan["modules"]
    structure: Any = base.get_submodule(name)
    bias, rank = structure.dense_bias(), factors.up.shape[1]
    state = ENCODERS[storage](factors, None if bias is None else bias.detach(), dtype)
    sizes = sizes_beside_rank(state)
    shape = (structure.in_features, structure.out_features, rank)
    converted = STRUCTURES[storage](*shape, bias is not None, device="meta", dtype=dtype, **sizes)
    placed = {key: value.to(factors.up.device).contiguous() for key, value in state.items()}
    converted.load_state_dict(placed, strict=True, assign=True)
    replace_(base, name, converted.requires_grad_(next(structure.parameters()).requires_grad))
    modules[name] = {"structure": storage, "rank": rank, **sizes}
