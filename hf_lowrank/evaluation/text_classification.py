"""Accuracy, F1 and Matthews correlation of a text classifier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from hf_lowrank.data.rows import Row, find_text_column, load_rows, require_columns
from hf_lowrank.data.two_texts import pair_columns, text_batches
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation.base import Score, Step, Task
from hf_lowrank.evaluation.blocks import block_length_of
from hf_lowrank.evaluation.metrics import ClassificationMetric, compute
from hf_lowrank.hosts.outputs import kind_of_head


class _Classification(Score):
    """Predicted and true classes of all rows."""

    _num_classes = 0

    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count one step."""
        self._num_classes = rows.shape[1]
        self._examples.append(torch.stack([rows.argmax(dim=-1), torch.tensor(step.targets)], dim=1))

    def result(self) -> dict[str, float]:
        """`accuracy`, `f1` and `matthews`."""
        average = "binary" if self._num_classes == 2 else "macro"
        return compute(ClassificationMetric, *self.examples.long().T.tolist(), average=average)

    def metric(self, examples: torch.Tensor) -> float:
        """The accuracy."""
        return float((examples[:, 0] == examples[:, 1]).double().mean())


@dataclass(frozen=True)
class TextClassification(Task):
    """Accuracy of the most likely class, F1 (of class 1 where there are two, else macro) and Matthews correlation.

    Args:
        max_examples: Rows at most, drawn by `seed`.
        text_pair_column: Second text of a row. Found, like the first, where the two have the names of GLUE, or are a
            query and a passage or document.
        label_column: Class, as a number or as a name in the model's `label2id`.
        max_seq_length: Tokens of a row at most.
    """

    name: ClassVar[str] = "text-classification"
    needs: ClassVar[tuple[str, ...]] = ("text", "label")
    metric: ClassVar[str] = "accuracy"
    higher_is_better: ClassVar[bool] = True
    heads: ClassVar = frozenset(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values())

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str = "label"
    max_seq_length: int = 256

    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        rows = load_rows(examples, self.max_examples, self.seed)
        columns = self._columns(rows[0])
        require_columns(rows, [self.label_column], f"{self.name} needs labels: set label_column.")
        read_label = self._label_reader(model)
        labels = [read_label(row[self.label_column]) for row in rows]
        length = block_length_of(model, self.max_seq_length)
        batches = text_batches(rows, columns, tokenizer, length, batch_size)
        return [Step(batch, labels[place * batch_size :][:batch_size]) for place, batch in enumerate(batches)]

    def _label_reader(self, model: Any) -> Callable[[Any], Any]:
        """What makes a target of a label."""
        return partial(_class_of, classes=_classes(model))

    def _columns(self, row: Row) -> list[str]:
        if self.text_column is None and self.text_pair_column is None and (pair := pair_columns(row)):
            return pair
        first = find_text_column({k: v for k, v in row.items() if k != self.label_column}, self.text_column)
        return [first, *([] if self.text_pair_column is None else [self.text_pair_column])]

    def score(self) -> Score:
        return _Classification()


def _classes(model: Any) -> dict[str, int]:
    """What a label can be written as: the class's name in any case, or its number."""
    config = model.config
    if (kind := kind_of_head(model)) == "number":
        raise InputError("text-classification needs classes, and this head says numbers. Use text-regression.")
    if kind == "labels":
        raise InputError("text-classification is of one class a text, and this head can say several. Use agreement.")
    names = {str(name).lower(): int(number) for name, number in (config.label2id or {}).items()}
    return {**{str(number): number for number in range(config.num_labels)}, **names}


def _class_of(label: Any, classes: dict[str, int]) -> int:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    found = classes.get(str(label).strip().lower())
    if found is None:
        raise InputError(f"Label {label!r} is none of the model's: {', '.join(classes)}. Set label2id in its config.")
    return found


TASK = TextClassification
