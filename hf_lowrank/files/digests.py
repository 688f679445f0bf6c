"""Short hashes of what a result depends on: a model, a text."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

# Of a configuration: where it came from, and by what it was written.
_SAYS_NOTHING = ("_name_or_path", "transformers_version")


def digest_of(about: Any) -> str:
    """SHA-256 of plain values, whatever the order of names in them."""
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(batches: Sequence[Mapping[str, torch.Tensor]]) -> str:
    """SHA-256 of the ids, masks and other tensors of all batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            tensor = batch[name].detach().cpu().clone(memory_format=torch.contiguous_format)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights_digest(model: nn.Module) -> str:
    """A short hash of a model's parameters and buffers, kept in its files or not."""
    return fingerprint([dict(model.named_parameters()), dict(model.named_buffers())])[:16]


def model_digest(model: PreTrainedModel) -> str:
    """A short hash of all that a model's outputs depend on: class, configuration, way of attention, weights."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _SAYS_NOTHING}
    about = [type(model).__name__, config, model.config._attn_implementation, weights_digest(model)]
    return digest_of(about)[:16]
