"""Token accuracy of a model that reads one text and writes another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from hf_lowrank.data.batches import require_padding
from hf_lowrank.data.rows import load_rows
from hf_lowrank.data.target_texts import pair_batches, target_column, with_targets
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation.base import Score, Step, Task
from hf_lowrank.evaluation.blocks import block_length_of
from hf_lowrank.hosts.outputs import IGNORED_LABEL


class TokenAccuracy(Score):
    """Which tokens are the most likely ones where they come; an example is a text."""

    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count one step; targets are labels (B, T), those that are ignored not among the rows."""
        counted = step.targets != IGNORED_LABEL
        labels, counts = step.targets[counted], counted.sum(dim=1).tolist()
        losses = F.cross_entropy(rows.double(), labels, reduction="none")
        hits = (rows.argmax(dim=-1) == labels).double()
        sums = [[part.sum() for part in values.split(counts)] for values in (hits, losses)]
        self._examples.append(torch.tensor([*sums, counts], dtype=torch.float64).T)

    def result(self) -> dict[str, float]:
        """`token_accuracy`, `perplexity`, and how many tokens were scored."""
        _, loss, count = self.examples.sum(dim=0).tolist()
        perplexity = math.exp(min(loss / count, 700.0))
        return {"token_accuracy": self.metric(self.examples), "perplexity": perplexity, "scored_tokens": count}

    def metric(self, examples: torch.Tensor) -> float:
        """The share of tokens that are the most likely ones."""
        hits, _, count = examples.sum(dim=0).tolist()
        return float(hits / max(count, 1))


@dataclass(frozen=True)
class SequenceToSequence(Task):
    """How often the most likely token is the one of the target text, given the tokens of it before that one.

    Args:
        max_examples: Rows at most, drawn by `seed`.
        text_column: Text that is read. Default: `source`, `article` and their like, or the only other one.
        label_column: Text that is to be written. Default: `target`, `summary` or `highlights`.
        max_seq_length: Tokens of a text at most.
    """

    name: ClassVar[str] = "seq2seq-lm"
    needs: ClassVar[tuple[str, ...]] = ("source", "target")
    metric: ClassVar[str] = "token_accuracy"
    higher_is_better: ClassVar[bool] = True
    heads: ClassVar = frozenset(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values())

    text_column: str | None = None
    label_column: str = "target"
    max_seq_length: int = 128

    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        rows = load_rows(examples, self.max_examples, self.seed)
        if (target := target_column(rows[0], self.label_column)) is None:
            there = ", ".join(map(str, rows[0]))
            raise InputError(f"No column holds the text to be written; there are: {there}. Set label_column to one.")
        require_padding(tokenizer)
        length = block_length_of(model, self.max_seq_length)
        batches = pair_batches(rows, tokenizer, self.text_column, target, length, batch_size)
        return [Step(batch, batch["labels"]) for batch in with_targets(batches, model)]

    def score(self) -> TokenAccuracy:
        return TokenAccuracy()


TASK = SequenceToSequence
