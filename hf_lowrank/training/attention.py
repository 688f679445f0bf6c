"""The attention scores of a model's last layer, before the softmax."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_lowrank.errors import InputError

_NAME = "hf_lowrank_recorded"


class AttentionRecord:
    """Queries and keys of the last attention that was run, (B, H, T, D) each; scores are computed when asked for."""

    def __init__(self) -> None:
        self._last: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def keep(self, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """Hold these instead of those of the layer before."""
        self._last = (query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)

    def scores(self) -> torch.Tensor:
        """`Q K^T` times the scaling, (B, H, T, T), in float32; masked places are not marked."""
        if self._last is None:
            raise InputError("The model runs no attention that can be watched. Set the weight of 'attention' to 0.")
        query, key, scaling = self._last
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # heads that share keys
        return query.float() @ key.float().transpose(-1, -2) * scaling


_record: ContextVar[AttentionRecord | None] = ContextVar("record", default=None)


def _recorded_attention(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    record = _record.get()
    if record is not None:
        record.keep(query, key, kwargs.get("scaling"))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, *args, **kwargs)


AttentionInterface.register(_NAME, _recorded_attention)
AttentionMaskInterface.register(_NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def recorded_attention(model: PreTrainedModel, wanted: bool = True) -> Iterator[AttentionRecord]:
    """Within, runs of `model` leave the queries and keys of its last attention in the record.

    The model attends as it does with `attn_implementation="sdpa"`; dropout of attention, which comes after the
    softmax, does not touch the scores.

    Args:
        wanted: Whether anything is recorded at all.

    Raises:
        InputError: If the architecture has no exchangeable attention.
    """
    record = AttentionRecord()
    if not wanted:
        yield record
        return
    if not model._supports_sdpa:
        raise InputError(f"The attention of {type(model).__name__} cannot be watched. Leave out the loss 'attention'.")
    own = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    token = _record.set(record)
    try:
        yield record
    finally:
        _record.reset(token)
        model.config._attn_implementation = own
