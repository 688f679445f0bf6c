"""What a saved model will weigh before it is made."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from hf_lowrank import remote_code
from hf_lowrank.targets import DenseMatrix

# A tensor's entry in the header of a safetensors file, without its name: type, shape and two offsets.
_HEADER_BYTES = 90
# One module in the plan and its record in `config.json`, without its name.
_PLAN_BYTES = 150
# Padding of the safetensors header, generation_config.json, the auto_map, what made the model.
_OTHER_BYTES = 5000
# What a pivoted matrix has beside its weights: a second bias, and where its moved outputs come from and go to. On
# average fewer than 16 move.
_EXTRA_TENSORS = 3
_MOVED_BYTES = 2 * 8 * 16


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, tied ones once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def overhead_bytes(model: PreTrainedModel, matrices: Sequence[DenseMatrix], storage: str) -> int:
    """Bytes `save_pretrained` writes beside the numbers: shipped code, configuration, the header of the weights."""
    code = sum(path.stat().st_size for path in Path(remote_code.__path__[0]).glob("*.py"))
    config = len(json.dumps(model.config.to_dict(), indent=2, default=str))
    header = sum(len(name) + _HEADER_BYTES for name in model.state_dict())
    longest = max(len(name) for name, _ in model.named_modules())
    replaced = len(matrices) * (2 * (longest + _HEADER_BYTES) + 2 * longest + _PLAN_BYTES)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if storage == "pivoted":
        extra = _MOVED_BYTES + _EXTRA_TENSORS * (longest + _HEADER_BYTES)
        buffers += extra * sum(matrix.kind == "linear" for matrix in matrices)
    return code + config + header + replaced + buffers + _OTHER_BYTES
