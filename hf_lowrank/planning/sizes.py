"""What a saved model will weigh before it is made."""

import json
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.hosts.matrices import Matrix
from hf_lowrank.remote_code.lowrank_code import code_files
from hf_lowrank.remote_code.lowrank_plan import Plan

# A tensor's entry in the header of a safetensors file, without its name: type, shape and two offsets.
_HEADER_BYTES = 90
# One module in the plan and its record in `config.json`, without its name.
_PLAN_BYTES = 150
# Padding of the safetensors header, generation_config.json, the auto_map, what made the model.
_OTHER_BYTES = 5000
# What a matrix has beside two factors: tensors, and other bytes. Pivoted rows have a second bias, and where the moved
# outputs come from and go to; on average fewer than 16 move. A decoder of its own has an entry in the plan too, unless
# it is part of the structure.
_EXTRA = {
    "pivoted": (3, 2 * 8 * 16),
    "nonlinear_autoencoder_embedding": (6, 0),
    "nonlinear_autoencoder_head": (6, 0),
    "separated_autoencoder": (2, _PLAN_BYTES),
    "separated_nonlinear_autoencoder": (6, _PLAN_BYTES),
}


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def overhead_bytes(model: PreTrainedModel, structures: Iterable[str], code: str | None = None) -> int:
    """Bytes `save_pretrained` writes beside the numbers: shipped code, configuration, the header of the weights.

    Args:
        structures: All that may come into the plan.
        code: How rounded weights are kept; None where there are none.
    """
    plan: Plan = {"modules": {name: {"structure": name} for name in structures}}
    plan |= {"packed": {"code": code}} if code else {}
    shipped = sum(len(text.encode()) for text in code_files(plan).values())
    config = len(json.dumps(model.config.to_dict(), indent=2, default=str))
    header = sum(len(name) + _HEADER_BYTES for name in model.state_dict())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return shipped + config + header + buffers + _OTHER_BYTES


def entry_bytes(matrix: Matrix, structure: str) -> int:
    """Bytes a replaced matrix adds to the header and the configuration, and its numbers that are no weights."""
    num_tensors, numbers = _EXTRA.get(structure, (0, 0))
    return sum(
        numbers + (2 + num_tensors) * (len(member.path) + _HEADER_BYTES) + 2 * len(member.name) + _PLAN_BYTES
        for member in matrix.members
    )
