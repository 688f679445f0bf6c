"""SQuAD's F1 and exact match of a model that points at the answer in a text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES

from hf_lowrank.data.batches import require_padding
from hf_lowrank.data.rows import Row, as_text, load_rows, require_columns
from hf_lowrank.errors import InputError, one_line
from hf_lowrank.evaluation.base import Score, Step, Task
from hf_lowrank.evaluation.blocks import block_length_of
from hf_lowrank.evaluation.metrics import AnswerMetric, compute, word_overlaps


@dataclass(frozen=True)
class Window:
    """One part of a context, seen with the question.

    Args:
        spans: Of each token the first and last character in the context; None outside of it.
    """

    question: int
    context: str
    answers: list[str]
    spans: list[tuple[int, int] | None]


class Answers(Score):
    """The best span of every question over all windows of its context."""

    def __init__(self, max_answer_length: int) -> None:
        super().__init__()
        self._max_answer_length = max_answer_length
        self._best: dict[int, tuple[float, str]] = {}
        self._gold: dict[int, list[str]] = {}

    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count one step; the rows are start logits, then end logits, (2, N) x T."""
        starts, ends = rows.chunk(2)
        for start, end, window in zip(starts, ends, step.targets, strict=True):
            found = best_span(start, end, window, self._max_answer_length)
            self._gold[window.question] = window.answers
            self._best[window.question] = max(found, self._best.get(window.question, (-float("inf"), "")))

    def result(self) -> dict[str, float]:
        """`f1` and `exact_match`."""
        return compute(AnswerMetric, *self._answers())

    @property
    def examples(self) -> torch.Tensor:
        """F1 of every question, (N, 1)."""
        return torch.tensor(word_overlaps(*self._answers()), dtype=torch.float64)[:, None]

    def metric(self, examples: torch.Tensor) -> float:
        """The mean F1."""
        return float(examples.mean())

    def _answers(self) -> tuple[list[str], list[list[str]]]:
        order = sorted(self._gold)
        return [self._best[i][1] for i in order], [self._gold[i] for i in order]


@dataclass(frozen=True)
class QuestionAnswering(Task):
    """SQuAD (version 1) F1 and exact match.

    A context too long for one input is read in windows that overlap by `overlap` tokens; the answer is the span of at
    most `max_answer_length` tokens, inside the context, with the largest sum of start and end logit in any window.

    Args:
        max_examples: Questions at most, drawn by `seed`.
        max_seq_length: Tokens of question and window together, at most.
        overlap: Tokens two neighbouring windows share (the `stride` of transformers' tokenizers).
    """

    name: ClassVar[str] = "question-answering"
    needs: ClassVar[tuple[str, ...]] = ("question", "context", "answers")
    metric: ClassVar[str] = "f1"
    higher_is_better: ClassVar[bool] = True
    heads: ClassVar = frozenset(MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values())

    max_seq_length: int = 384
    overlap: int = 128
    max_answer_length: int = 30

    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        if not getattr(tokenizer, "is_fast", False):
            raise InputError("question-answering needs a fast tokenizer, which knows where in the text a token lies.")
        questions = load_rows(flat_questions(load_rows(examples)), self.max_examples, self.seed)
        require_columns(questions, self.needs)
        questions = [
            {**row, **{name: as_text(row[name], name) for name in ("question", "context")}} for row in questions
        ]
        steps: list[Step] = []
        for start in range(0, len(questions), batch_size):
            numbered = list(enumerate(questions[start : start + batch_size], start))
            inputs, windows = self._windows(numbered, tokenizer, block_length_of(model, self.max_seq_length))
            for first in range(0, len(windows), batch_size):
                part = slice(first, first + batch_size)
                steps.append(Step({name: tensor[part] for name, tensor in inputs.items()}, windows[part]))
        return steps

    def _windows(
        self, numbered: Sequence[tuple[int, Row]], tokenizer: Any, length: int
    ) -> tuple[dict[str, torch.Tensor], list[Window]]:
        require_padding(tokenizer)
        found = tokenizer(
            [row["question"].strip() for _, row in numbered],
            [row["context"] for _, row in numbered],
            truncation="only_second",
            max_length=length,
            stride=min(self.overlap, length // 3),
            padding=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        sources = found.pop("overflow_to_sample_mapping").tolist()
        windows = []
        for place, (source, offsets) in enumerate(zip(sources, found.pop("offset_mapping").tolist(), strict=True)):
            number, row = numbered[source]
            inside = [part == 1 for part in found.sequence_ids(place)]
            spans = [(first, last) if here else None for (first, last), here in zip(offsets, inside, strict=True)]
            windows.append(Window(number, row["context"], _gold(row), spans))
        return dict(found), windows

    def score(self) -> Answers:
        return Answers(self.max_answer_length)


def best_span(start: torch.Tensor, end: torch.Tensor, window: Window, max_answer_length: int) -> tuple[float, str]:
    """The largest sum of a start and an end logit, (T) each, over spans in the context, and the text of that span."""
    allowed = torch.tensor([span is not None for span in window.spans])
    outside = start.new_full((), -float("inf"))
    sums = torch.where(allowed, start, outside)[:, None] + torch.where(allowed, end, outside)[None, :]  # (T, T)
    ordered = torch.ones_like(sums, dtype=torch.bool).triu().tril(max_answer_length - 1)
    flat = torch.where(ordered, sums, outside).flatten()
    best = int(flat.argmax())
    first, last = window.spans[best // len(start)], window.spans[best % len(start)]
    if first is None or last is None:
        return -float("inf"), ""
    return float(flat[best]), window.context[first[0] : last[1]]


def flat_questions(rows: Sequence[Row]) -> list[Row]:
    """One row a question; SQuAD's files hold paragraphs in articles."""
    if "paragraphs" not in rows[0]:
        return list(rows)
    try:
        return [
            {"question": question["question"], "context": paragraph["context"], "answers": question["answers"]}
            for article in rows
            for paragraph in article["paragraphs"]
            for question in paragraph["qas"]
        ]
    except (KeyError, TypeError) as error:
        raise InputError(f"The paragraphs are not as in SQuAD's files: {one_line(error)}. Mend them.") from error


def _gold(row: Row) -> list[str]:
    answers = row["answers"]
    try:
        texts = answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
        texts = [as_text(text, "answers") for text in texts]
    except (KeyError, TypeError) as error:
        raise InputError(f"The answers of question {row['question']!r} are not as in SQuAD. Mend them.") from error
    if not texts:
        raise InputError(f"Question {row['question']!r} has no answer. Leave out questions without one (SQuAD 2).")
    return texts


TASK = QuestionAnswering
