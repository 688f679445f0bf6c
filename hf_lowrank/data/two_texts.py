"""Rows of two texts: a head that judges a pair reads both at once, any other model one after the other."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from hf_lowrank.data.batches import require_padding
from hf_lowrank.data.rows import Row, as_text, require_columns
from hf_lowrank.hosts.outputs import Batch
from hf_lowrank.remote_code.configuration_lowrank import PREFIX

# The two texts of a row, where the columns are called so and none is named.
_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
    ("query", "document"),
)
_JUDGES = {
    *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
    *MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES.values(),
}


def pair_columns(row: Row) -> list[str]:
    """The columns of the two texts of a row; empty where it has no two that are called so."""
    return next((list(pair) for pair in _PAIRS if all(name in row for name in pair)), [])


def judges_pairs(model: PreTrainedModel) -> bool:
    """Whether a model's head says something of two texts together."""
    return type(model).__name__.removeprefix(PREFIX) in _JUDGES


def every_text(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """The texts of several columns, row by row."""
    require_columns(rows, columns)
    return [as_text(row[column], column) for row in rows for column in columns]


def text_batches(
    rows: Sequence[Row], columns: Sequence[str], tokenizer: Any, max_seq_length: int, batch_size: int
) -> Iterator[Batch]:
    """Batches of one text a row or of two, cut to so many tokens.

    Raises:
        InputError: If a row lacks a text, or the tokenizer cannot pad.
    """
    require_columns(rows, columns)
    require_padding(tokenizer)
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        texts = [[as_text(row[column], column) for row in some] for column in columns]
        found = tokenizer(*texts, truncation=True, max_length=max_seq_length, padding=True, return_tensors="pt")
        yield dict(found)
