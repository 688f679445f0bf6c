"""How much a compressed model still says what the dense one does; needs no labels, and any head will do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_lowrank.data.batches import make_batches
from hf_lowrank.data.calibration import is_causal
from hf_lowrank.data.target_texts import reads_targets, with_targets
from hf_lowrank.evaluation.base import Score, Step, Task
from hf_lowrank.evaluation.blocks import block_length_of


class _Nothing(Score):
    """Scores no model by itself."""

    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count the texts."""
        self._examples.append(torch.zeros(len(next(iter(step.inputs.values()))), 0))

    def result(self) -> dict[str, float]:
        """Empty."""
        return {}

    def metric(self, examples: torch.Tensor) -> float:
        """Of a model by itself there is none."""
        return 0.0

    def interval(self, dense: Score) -> dict[str, float]:
        """Empty: all that is scored is how far from dense."""
        return {}


@dataclass(frozen=True)
class AgreementWithDense(Task):
    """How far from the dense model's predictions and how often the same; see `Agreement.result` for each kind of head.

    A token head is compared at every token, a sequence head once a text, a model without a head by the mean of its
    last hidden states.

    Args:
        max_examples: Sequences at most; None takes 256.
        max_seq_length: Tokens of a sequence at most.
    """

    name: ClassVar[str] = "agreement"
    needs: ClassVar[tuple[str, ...]] = ("text",)
    metric: ClassVar[str] = "top1_agreement"
    higher_is_better: ClassVar[bool] = True
    heads: ClassVar[tuple[str, ...]] = ()
    reads_text: ClassVar[bool] = False

    text_column: str | None = None
    max_seq_length: int = 128

    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        batches = make_batches(
            examples,
            tokenizer,
            num_calibration_samples=self.max_examples or 256,
            max_seq_length=block_length_of(model, self.max_seq_length),
            batch_size=batch_size,
            seed=self.seed,
            text_column=self.text_column,
            pack=None if is_causal(model) else False,
        )
        if reads_targets(model):
            batches = with_targets(batches, model)
        return [Step(batch, None) for batch in batches]

    def score(self) -> Score:
        return _Nothing()


TASK = AgreementWithDense
