"""What a model says, in a form that two models can be compared in, whatever their head."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

Batch = Mapping[str, torch.Tensor]

IGNORED_LABEL = -100
# Of logits, whose softmaxes would otherwise be held several times for a whole batch.
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Said:
    """The output of a model at the places that count.

    Args:
        kind: `distribution` (rows are logits) or `embedding` (rows are unit vectors).
        rows: (N, V) or (N, D).
    """

    kind: str
    rows: torch.Tensor

    def distance(self, reference: "Said") -> torch.Tensor:
        """How far each row is from the reference's, (N): KL(reference || this), or 1 - cosine."""
        if self.kind == "embedding":
            return 1 - (self.rows * reference.rows).sum(dim=-1)
        divergence: torch.Tensor = _Divergence.apply(self.rows, reference.rows)  # type: ignore[no-untyped-call]  # torch's
        return divergence

    def random_gradient_loss(self, generator: torch.Generator) -> torch.Tensor:
        """A random scalar whose gradient has the second moment of the Gauss-Newton matrix of `distance`.

        For distributions: the cross-entropy of labels drawn from the model's own prediction, so that no labels are
        needed (the Fisher matrix). For embeddings: the product with standard normal directions.
        """
        if self.kind == "embedding":
            directions = torch.randn(self.rows.shape, generator=generator, dtype=torch.float32)
            return (self.rows * directions.to(self.rows)).sum()
        probabilities = F.softmax(self.rows.detach().float(), dim=-1).cpu()
        labels = torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(self.rows.device)
        return F.cross_entropy(self.rows, labels, reduction="sum")


class _Divergence(torch.autograd.Function):
    """KL(wanted || found) of each row of logits, (N, V) twice -> (N), a few rows at a time.

    The gradient, `softmax(found) - softmax(wanted)`, is formed anew: softmaxes of a whole batch, kept for it, would
    take several times the memory of the logits.
    """

    @staticmethod
    def forward(ctx: Any, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(found, wanted)
        rows = []
        for some, others in _parts(found, wanted):
            says, should = F.log_softmax(some, dim=-1), F.log_softmax(others, dim=-1)
            rows.append((should.exp() * (should - says)).sum(dim=-1))
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        found, wanted = ctx.saved_tensors
        gradient = torch.empty_like(found)
        for (some, others), into, scale in zip(
            _parts(found, wanted), gradient.split(_ROWS_AT_ONCE), gradients[0].split(_ROWS_AT_ONCE), strict=True
        ):
            into.copy_((some.softmax(dim=-1) - others.softmax(dim=-1)) * scale[:, None])
        return gradient, None


def _parts(found: torch.Tensor, wanted: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(found.split(_ROWS_AT_ONCE), wanted.split(_ROWS_AT_ONCE), strict=True)


def run(model: PreTrainedModel, batch: Batch) -> Said:
    """Run a batch and take from its output what is to be compared.

    A token head speaks at the masked tokens where the batch has labels, else at every token that is no padding; a
    sequence head once per sequence, a question-answering head once for the start and once for the end, a
    multiple-choice head once per batch; a model without a head by the mean of its last hidden states over the tokens,
    as unit vectors.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: value[None] for name, value in inputs.items()}  # the sequences of the batch are the choices
    return said(model(**inputs, **({"use_cache": False} if _has_cache(model) else {})), batch)


def said(output: Any, batch: Batch) -> Said:
    """What is to be compared of the output a model has given for a batch; see `run`."""
    if getattr(output, "start_logits", None) is not None:
        return Said("distribution", torch.cat([output.start_logits, output.end_logits]))
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = getattr(output, "prediction_logits", None)
    if logits is None:
        return Said("embedding", pooled(output.last_hidden_state, batch))
    if logits.dim() == 2:
        return Said("distribution", logits)
    return Said("distribution", logits[speaking_places(batch)])


@torch.no_grad()
def mean_distance(model: PreTrainedModel, reference: PreTrainedModel, batches: Sequence[Batch]) -> float:
    """Mean distance of a model's outputs from another's on some text; see `Said.distance`."""
    distances = []
    for batch in batches:
        placed = {name: value.to(model.device) for name, value in batch.items()}
        distances.append(run(model, placed).distance(run(reference, placed)))
    return float(torch.cat(distances).mean())


def pooled(hidden_states: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean of the hidden states (B, T, D) over the tokens that are no padding, as unit vectors (B, D)."""
    weights = real_tokens(batch).to(hidden_states)[..., None]  # (B, T, 1)
    return F.normalize((hidden_states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def real_tokens(batch: Batch) -> torch.Tensor:
    """Which tokens are no padding, (B, T), bool."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def speaking_places(batch: Batch) -> torch.Tensor:
    """Where a token head's prediction counts, (B, T), bool: at token labels if there are any, else at real tokens."""
    labels = batch.get("labels")
    if labels is not None and labels.shape == batch["input_ids"].shape:
        return labels != IGNORED_LABEL
    return real_tokens(batch)


def _has_cache(model: Any) -> bool:
    return model.can_generate() and getattr(model.config, "use_cache", False)
