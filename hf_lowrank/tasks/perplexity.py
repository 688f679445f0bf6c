"""Perplexity, which masked and causal language models share."""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from hf_lowrank.outputs import IGNORED_LABEL
from hf_lowrank.tasks.base import Step


class Perplexity:
    """`exp` of the mean negative log-likelihood of the scored tokens."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._count = 0

    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count one step; targets are token ids, one a row."""
        self._loss += float(F.cross_entropy(rows.double(), step.targets, reduction="sum"))
        self._count += len(rows)

    def result(self) -> dict[str, float]:
        """`perplexity`, `loss` in nats a token, and how many tokens were scored."""
        loss = self._loss / self._count
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss, "scored_tokens": float(self._count)}


def token_steps(input_ids: torch.Tensor, labels: torch.Tensor, batch_size: int) -> Sequence[Step]:
    """Steps from blocks (N, T) and labels (N, T) that lie where the predicting logits do; -100 is not scored."""
    return [
        Step({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": wanted}, wanted[_scored(wanted)])
        for ids, wanted in zip(input_ids.split(batch_size), labels.split(batch_size), strict=True)
        if bool(_scored(wanted).any())
    ]


def _scored(labels: torch.Tensor) -> torch.Tensor:
    return labels != IGNORED_LABEL
