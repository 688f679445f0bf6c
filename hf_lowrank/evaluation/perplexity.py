"""Perplexity, which masked and causal language models share."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from hf_lowrank.evaluation.base import Score, Step
from hf_lowrank.hosts.outputs import IGNORED_LABEL


class Perplexity(Score):
    """`exp` of the mean negative log-likelihood of the scored tokens; an example is a block."""

    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count one step; targets are token ids, one a row."""
        losses = F.cross_entropy(rows.double(), step.targets, reduction="none")
        counts = _scored(step.inputs["labels"]).sum(dim=1)  # (B)
        sums = torch.stack([part.sum() for part in losses.split(counts.tolist())])
        self._examples.append(torch.stack([sums, counts], dim=1))

    def result(self) -> dict[str, float]:
        """`perplexity`, `loss` in nats a token, and how many tokens were scored."""
        loss, count = self.examples.sum(dim=0).tolist()
        return {"perplexity": self.metric(self.examples), "loss": loss / count, "scored_tokens": count}

    def metric(self, examples: torch.Tensor) -> float:
        """The perplexity; 1 where no token is scored."""
        loss, count = examples.sum(dim=0).tolist()
        return math.exp(min(loss / max(count, 1), 700.0))

    def change(self, ours: torch.Tensor, theirs: torch.Tensor) -> float:
        """Relative: `perplexity / other perplexity - 1`."""
        return self.metric(ours) / self.metric(theirs) - 1


def token_steps(input_ids: torch.Tensor, labels: torch.Tensor, batch_size: int) -> Sequence[Step]:
    """Steps from blocks (N, T) and labels (N, T) that lie where the predicting logits do; -100 is not scored."""
    return [
        Step({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": wanted}, wanted[_scored(wanted)])
        for ids, wanted in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True)
        if bool(_scored(wanted).any())
    ]


def _scored(labels: torch.Tensor) -> torch.Tensor:
    return labels != IGNORED_LABEL
