"""The same low-rank matrices in another storage."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.remote_code.lowrank_structures import STRUCTURES, replace_, structure_name
from hf_lowrank.solvers.factors import Factors, balanced
from hf_lowrank.solvers.storage import DECODERS, ENCODERS, sizes_beside_rank


def convert_storage_(model: PreTrainedModel, storage: str, dtype: torch.dtype | None = None) -> None:
    """Turn every low-rank linear layer of a compressed model into another storage of the same matrix and rank.

    Exact to rounding. Two factors are easier to train, pivoted rows are smaller: train as `low_rank`, keep as
    `pivoted`. A head stays as it is.

    Args:
        storage: `low_rank` or `pivoted`.
        dtype: Type to store the numbers in; None keeps each layer's.

    Raises:
        InputError: If there is no such storage.
    """
    if storage not in DECODERS:
        raise InputError(f"storage must be one of {', '.join(DECODERS)}, got {storage!r}.")
    base = model.base_model
    for name, spec in model.config.plan["modules"].items():
        structure = base.get_submodule(name)
        decode = DECODERS.get(str(structure_name(structure)))
        if decode is not None and structure_name(structure) != storage:
            converted, sizes = _converted(structure, decode, storage, dtype)
            replace_(base, name, converted)
            model.config.plan["modules"][name] = {"structure": storage, "rank": spec["rank"], **sizes}


def _converted(
    structure: Any, decode: Callable[[Any], Factors], storage: str, dtype: torch.dtype | None
) -> tuple[Any, dict[str, int]]:
    """The same matrix in another structure, and the sizes that has beside its rank."""
    factors = decode(structure)
    dtype = dtype or factors.up.dtype
    wide = balanced(factors.up.double(), factors.down.double())
    bias = structure.dense_bias()
    state = ENCODERS[storage](wide, None if bias is None else bias.detach(), dtype)
    sizes = sizes_beside_rank(state)
    shape = (structure.in_features, structure.out_features, structure.rank)
    converted = STRUCTURES[storage](*shape, bias is not None, device="meta", dtype=dtype, **sizes)
    placed = {name: value.to(factors.up.device).contiguous() for name, value in state.items()}
    converted.load_state_dict(placed, strict=True, assign=True)
    return converted.requires_grad_(next(structure.parameters()).requires_grad), sizes
