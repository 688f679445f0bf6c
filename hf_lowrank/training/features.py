"""What a model is trained on, from whatever data there are: rows of token ids, with the labels its head can use."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from hf_lowrank.data.batches import (
    as_tensors,
    as_token_ids,
    is_batch,
    make_batches,
    padded,
    reader_of,
    reads_media,
    require_known_tokens,
    require_processor,
    rows_of,
)
from hf_lowrank.data.calibration import is_causal, is_masked_lm, mask_tokens
from hf_lowrank.data.rows import Row, drawn_places, find_text_column, is_ready, load_rows, load_texts, require_columns
from hf_lowrank.data.target_texts import pair_batches, reads_targets, target_column, told_apart, with_targets
from hf_lowrank.data.two_texts import every_text, judges_pairs, pair_columns, text_batches
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.blocks import block_length_of
from hf_lowrank.evaluation.image_classification import IMAGE_CLASSIFIERS
from hf_lowrank.evaluation.question_answering import flat_questions
from hf_lowrank.hosts.heads import says_vectors
from hf_lowrank.hosts.outputs import IGNORED_LABEL, kind_of_head
from hf_lowrank.remote_code.configuration_lowrank import PREFIX

Features = list[dict[str, torch.Tensor]]

_CHUNK = 64
_ALL = 1 << 40
_HELD_OUT = 0.1
_MOST_HELD_OUT = 512
# Where one sentence ends and the next begins, or the line.
_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])|\n")  # noqa: RUF001  # of Chinese and Japanese
_PAIR = ("sentence1", "sentence2")


@dataclass(frozen=True)
class PaddingCollator:
    """Rows of unequal lengths -> one padded batch."""

    padding: int = 0

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad ids with the padding token, masks with 0 and labels of tokens with the one that is ignored."""
        rows = [{name: torch.as_tensor(value) for name, value in row.items()} for row in features]
        return dict(told_apart(padded(rows, self.padding)))


def make_features(
    model: PreTrainedModel,
    tokenizer: Any,
    source: Any,
    *,
    max_seq_length: int = 128,
    max_examples: int | None = None,
    seed: int = 0,
    text_column: str | None = None,
    label_column: str = "label",
) -> Features:
    """Rows to train a model on.

    A sequence head gets a class or a number where the data have `label_column`, a question-answering head the first
    and last token of the answer, a masked language model inputs with 15 % of the tokens masked, a causal one its own
    inputs as labels, an encoder-decoder the text that is to be written, an image classifier a class. Any other head,
    one of several labels or numbers a text, and data without labels, give inputs alone: enough to learn from a
    teacher. A model without a head, which says one vector a text, gets the sentences of the texts one by one.

    Args:
        source: A file, a data set of the Hub, a `datasets.Dataset`, texts or rows (see
            `hf_lowrank.data.rows.load_rows`); rows or batches of what models read are taken as they are.
        max_examples: Rows at most, drawn by `seed`.

    Raises:
        InputError: If the data cannot be read or do not fit the model.
    """
    length = block_length_of(model, max_seq_length)
    if is_ready(source):
        features = as_token_ids(lambda: _unbatched(source))
        require_known_tokens(features, model)
        return [features[place] for place in drawn_places(len(features), max_examples, seed)]
    require_processor(model, tokenizer)
    rows = load_rows(source)
    tokenizer = reader_of(rows, tokenizer)
    head = type(model).__name__.removeprefix(PREFIX)
    if head in MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values() and {"answers", "paragraphs"} & set(rows[0]):
        questions = load_rows(flat_questions(rows), max_examples, seed)
        features = _answer_features(questions, tokenizer, length)
        require_known_tokens(features, model, tokenizer)
        return features
    if label_column in rows[0] and (name := _labelling_task(model, head)):
        options = {"text_column": text_column, "label_column": label_column, "max_seq_length": length}
        task = make_task(name, max_examples=max_examples, seed=seed, **options)
        steps = task.steps(tokenizer, rows, 1, model)
        return [{**rows_of(step.inputs)[0], "labels": torch.tensor(step.targets[0])} for step in steps]
    if reads_targets(model) and not reads_media(tokenizer) and (target := target_column(rows[0], label_column)):
        rows = load_rows(rows, max_examples, seed)
        return _unbatched(pair_batches(rows, tokenizer, text_column, target, length, _CHUNK))
    if says_vectors(model) and not reads_media(tokenizer):
        rows, text_column = _sentences(rows, text_column), None
    return _features(model, tokenizer, rows, length, max_examples, seed, text_column)


def with_target_rows(features: Features, writer: PreTrainedModel, padding: int) -> Features:
    """The rows with what a decoder is to write, which `writer` does where nobody did; see `with_targets`."""
    chunks = [padded(features[start : start + _CHUNK], padding) for start in range(0, len(features), _CHUNK)]
    return _unbatched(with_targets(chunks, writer))


def _sentences(rows: Sequence[Row], text_column: str | None) -> list[Row]:
    """Every sentence once, of the column of texts or of both of a pair; a text that is not cut is a sentence.

    Long texts have long sentences among them; of short ones, which an encoder is asked about, they show nothing.
    """
    is_pair = text_column is None and all(isinstance(rows[0].get(name), str) for name in _PAIR)
    columns = _PAIR if is_pair else [find_text_column(rows[0], text_column)]
    texts = [text for column in columns for text in load_texts(rows, column)]
    parts = [part.strip() for text in texts for part in _BETWEEN_SENTENCES.split(text)]
    return [{"text": part} for part in dict.fromkeys(parts) if part]


def _labelling_task(model: PreTrainedModel, head: str) -> str | None:
    """Whose labels a sequence head learns; there is no common form for several of them in a row."""
    if head in IMAGE_CLASSIFIERS:
        return "image-classification"
    if head not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        return None
    kind = kind_of_head(model)
    if kind == "number" and model.config.num_labels == 1:
        return "text-regression"
    return "text-classification" if kind == "distribution" else None


def _features(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Row],
    length: int,
    max_examples: int | None,
    seed: int,
    text_column: str | None,
) -> Features:
    limit = _ALL if max_examples is None else max_examples
    if text_column is None and (columns := pair_columns(rows[0])):
        if judges_pairs(model):
            drawn = load_rows(rows, max_examples, seed)
            return _unbatched(text_batches(drawn, columns, tokenizer, length, _CHUNK))
        rows = load_rows(every_text(rows, columns))
    batches = make_batches(rows, tokenizer, limit, length, _CHUNK, seed, text_column, pack=is_causal(model))
    require_known_tokens(batches, model, tokenizer)
    if is_masked_lm(model):
        batches = mask_tokens(batches, model, tokenizer, seed)
    elif is_causal(model) and "input_ids" in batches[0]:
        batches = [
            {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL)}
            for batch in batches
        ]
    return _unbatched(batches)


def _answer_features(questions: Sequence[Row], tokenizer: Any, length: int) -> Features:
    """Windows over the contexts; the answer's first and last token, or the first token where a window has it not."""
    require_columns(questions, ("question", "context", "answers"))
    features: Features = []
    for start in range(0, len(questions), _CHUNK):
        some = questions[start : start + _CHUNK]
        found = tokenizer(
            [row["question"].strip() for row in some],
            [row["context"] for row in some],
            truncation="only_second",
            max_length=length,
            stride=length // 3,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        sources, offsets = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
        for place, source in enumerate(sources):
            inside = [part == 1 for part in found.sequence_ids(place)]
            first, last = _answer_tokens(some[source]["answers"], offsets[place], inside)
            row = {name: torch.tensor(values[place]) for name, values in found.items()}
            features.append({**row, "start_positions": torch.tensor(first), "end_positions": torch.tensor(last)})
    return features


def _answer_tokens(answers: Any, offsets: Sequence[tuple[int, int]], inside: Sequence[bool]) -> tuple[int, int]:
    listed = isinstance(answers, list)  # as in SQuAD's files; the Hub's data sets hold one list a field
    texts = [answer["text"] for answer in answers] if listed else answers["text"]
    starts = [answer["answer_start"] for answer in answers] if listed else answers["answer_start"]
    if not texts:
        return 0, 0
    start, end = int(starts[0]), int(starts[0]) + len(texts[0])
    tokens = [i for i, (first, last) in enumerate(offsets) if inside[i] and first < end and last > start]
    is_whole = tokens and offsets[tokens[0]][0] <= start and offsets[tokens[-1]][1] >= end
    return (tokens[0], tokens[-1]) if is_whole else (0, 0)


def hold_out(features: Features, seed: int = 0) -> tuple[Features, Features]:
    """A tenth of the rows, 512 at most, is set aside to choose by: `(to train on, to choose by)`.

    Raises:
        InputError: If there are fewer than two rows.
    """
    if len(features) < 2:
        raise InputError("Training needs two examples at least, one of them to choose by; got 1. Give more data.")
    count = min(_MOST_HELD_OUT, max(1, round(len(features) * _HELD_OUT)))
    chosen = set(drawn_places(len(features), count, seed))
    kept = [row for index, row in enumerate(features) if index not in chosen]
    return kept, [features[index] for index in sorted(chosen)]


def has_labels(features: Features) -> bool:
    """Whether a model's own loss can be computed."""
    return bool({"labels", "start_positions"} & set(features[0]))


def _unbatched(source: Any) -> Features:
    features: Features = []
    for item in map(as_tensors, source):
        features += rows_of(item) if is_batch(item) else [item]
    return features
