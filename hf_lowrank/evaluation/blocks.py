"""Texts as one long row of tokens, from which language models' blocks are cut."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_lowrank.data.batches import any_known, tokenize
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.outputs import longest_input


def joined_ids(texts: Sequence[str], tokenizer: Any, separator: int | None, min_tokens: int) -> torch.Tensor:
    """The token ids of all texts in order, `separator` after each; no special tokens but that.

    Raises:
        InputError: If there are fewer than `min_tokens`.
    """
    end = [] if separator is None else [separator]
    ids: list[int] = []
    for found in tokenize(texts, tokenizer):
        ids += [*found, *end]
    if len(ids) < min_tokens:
        raise InputError(f"The text has {len(ids)} tokens, and at least {min_tokens} are needed. Give more text.")
    joined = torch.tensor(ids)
    if not any_known(joined, tokenizer):
        raise InputError("The text has no token the tokenizer knows. Give other text, or the model's own tokenizer.")
    return joined


def block_length_of(model: Any, wanted: int) -> int:
    """The wanted block length, or what the model can take if that is less."""
    if wanted < 2:
        raise InputError(f"block_length must be at least 2, got {wanted}.")
    return min(wanted, longest_input(model))
