"""How well the one number a model says of a text, or of a pair, follows the gold one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from hf_lowrank.data.rows import as_number
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation.base import Score, Step
from hf_lowrank.evaluation.metrics import CorrelationMetric, compute, rank_correlation
from hf_lowrank.evaluation.text_classification import TextClassification
from hf_lowrank.hosts.outputs import kind_of_head


class Correlation(Score):
    """Predicted and gold numbers of all rows."""

    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count one step; the rows are (N, 1)."""
        self._examples.append(torch.stack([rows[:, 0].double(), torch.tensor(step.targets).double()], dim=1))

    def result(self) -> dict[str, float]:
        """`spearman` and `pearson`."""
        return compute(CorrelationMetric, *self.examples.T.tolist())

    def metric(self, examples: torch.Tensor) -> float:
        """Spearman's rank correlation."""
        return rank_correlation(examples.numpy())


@dataclass(frozen=True)
class TextRegression(TextClassification):
    """Spearman's rank correlation and Pearson's between the gold numbers and the one output of the head.

    For regressions, and for models that score pairs to rank them.

    Args:
        max_examples: Rows at most, drawn by `seed`.
        text_pair_column: Second text of a row. Found, like the first, where the two have the names of GLUE, or are a
            query and a passage or document.
        label_column: Gold number.
        max_seq_length: Tokens of a row at most.
    """

    name: ClassVar[str] = "text-regression"
    metric: ClassVar[str] = "spearman"

    def _label_reader(self, model: Any) -> Callable[[Any], float]:
        if kind_of_head(model) != "number" or model.config.num_labels != 1:
            raise InputError("text-regression needs a head of one number. Use text-classification or agreement.")
        return partial(as_number, column=self.label_column)

    def score(self) -> Score:
        """A score that has seen nothing yet."""
        return Correlation()


TASK = TextRegression
