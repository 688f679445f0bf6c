"""How often each token occurs in a text: cheap to count, so of far more text than a model is run on."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from hf_lowrank.data.batches import reads_media, tokenize
from hf_lowrank.data.rows import is_ready, load_texts
from hf_lowrank.hosts.outputs import IGNORED_LABEL, Batch, real_tokens

_MOST_TEXTS = 20_000


def count_tokens(
    source: Any, tokenizer: Any, vocab_size: int, text_column: str | None = None, seed: int = 0
) -> torch.Tensor | None:
    """Occurrences of each token, float64, (V), in 20 000 texts at most; None where the source is no text.

    Special tokens count as the most frequent one: a text as the model sees it holds them, and masks, more often than
    they are written.

    Args:
        source: See `hf_lowrank.data.rows.load_rows`.
        vocab_size: Rows of the table; tokens beyond it are not counted.
    """
    if source is None or tokenizer is None or isinstance(source, Iterator) or is_ready(source):
        return None
    if reads_media(tokenizer):
        return None
    counts = torch.zeros(max(vocab_size, len(tokenizer)), dtype=torch.float64)
    for ids in tokenize(load_texts(source, text_column, limit=_MOST_TEXTS, seed=seed), tokenizer):
        counts += torch.bincount(torch.tensor(ids), minlength=len(counts))
    counts = counts[:vocab_size]
    special = [index for index in tokenizer.all_special_ids if index < vocab_size]
    counts[special] = counts.max()
    return counts


def occurrences(batches: Iterable[Batch], vocab_size: int) -> torch.Tensor:
    """How often each token occurs in batches, float64, (V); where one is masked, that which its label names."""
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    for batch in batches:
        ids, labels = batch["input_ids"], batch.get("labels")
        if labels is not None and labels.shape == ids.shape and "decoder_input_ids" not in batch:
            ids = torch.where(labels == IGNORED_LABEL, ids, labels)
        real = ids[real_tokens(batch)].cpu()
        counts += torch.bincount(real[real < vocab_size], minlength=vocab_size)
    return counts
