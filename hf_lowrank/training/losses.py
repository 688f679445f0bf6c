"""How far a student is from its teacher: one function and one row of `LOSSES` a term."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.blocks import hidden_states
from hf_lowrank.hosts.outputs import IGNORED_LABEL, OUTPUTS, Said, real_rows, said, token_masks
from hf_lowrank.training.attention import AttentionRecord

# What averages a number over all processes; every term is a local sum over a mean count, so that the mean of the
# processes' losses is the loss of one process with all their batches.
Average = Callable[[torch.Tensor], torch.Tensor]
# What is divided by is no less.
_LEAST = 1e-9


@dataclass(frozen=True)
class Watched:
    """What one model did with a batch.

    Args:
        model: The one that did it.
        output: As the model returns it.
        blocks: Name of a block -> what it returned.
        attention: Of its last layer.
    """

    model: PreTrainedModel
    output: Any
    blocks: Mapping[str, Any]
    attention: AttentionRecord


@dataclass(frozen=True)
class Compared:
    """A student and its teacher on one batch.

    Args:
        layer_map: Pairs of block names, the student's and the teacher's.
        projections: Block of the student -> map from its width to the teacher's; none where the widths agree.
    """

    batch: Mapping[str, torch.Tensor]
    student: Watched
    teacher: Watched
    temperature: float
    layer_map: Sequence[tuple[str, str]]
    projections: Mapping[str, nn.Module]
    is_causal: bool
    average: Average


def task_loss(compared: Compared) -> torch.Tensor:
    """The student's own loss on the labels of the batch."""
    loss = compared.student.output.loss
    if loss is None:
        raise InputError("The loss 'task' needs labels, and the data has none. Give labels, or leave 'task' out.")
    labels = compared.batch.get("labels")
    if labels is None or labels.dim() < 2:
        count = len(next(iter(compared.batch.values())))
    else:
        count = int(labels.ne(IGNORED_LABEL).sum())
    mean: torch.Tensor = loss * (count / _average_count(count, compared))
    return mean


def logits_loss(compared: Compared) -> torch.Tensor:
    """`T^2 KL(softmax(t / T) || softmax(s / T))` at the places that count; others: `hf_lowrank.hosts.outputs.OUTPUTS`.

    `T` is the temperature; its square keeps the gradients of one size (Hinton et al., 2015).
    """
    heat = compared.temperature
    # As the teacher says it, whose folder tells how an encoder's hidden states are pooled: a copy's may not.
    speaker = compared.teacher.model
    found, wanted = (said(speaker, side.output, compared.batch) for side in (compared.student, compared.teacher))
    if has_temperature := OUTPUTS[found.kind].has_temperature:
        found, wanted = Said(found.kind, found.rows.float() / heat), Said(wanted.kind, wanted.rows.float() / heat)
    total = found.distance(wanted).sum() / _average_count(len(found.rows), compared)
    return total * heat**2 if has_temperature else total


def hidden_loss(compared: Compared) -> torch.Tensor:
    """Mean over the mapped blocks of `||h - t||^2 / (N D var(t))` at the `N` tokens that are no padding."""
    terms = []
    for ours, theirs in compared.layer_map:
        if ours not in compared.student.blocks or theirs not in compared.teacher.blocks:
            continue  # what reads images is not run on text alone
        target = real_rows(hidden_states(compared.teacher.blocks[theirs]), compared.batch).float()  # (N, D)
        found = real_rows(hidden_states(compared.student.blocks[ours]), compared.batch)
        projection = compared.projections.get(ours)
        found = (found if projection is None else projection(found)).float()
        terms.append(_relative_square(found, target, compared))
    return torch.stack(terms).mean()


def attention_loss(compared: Compared) -> torch.Tensor:
    """Squared difference of the last layers' attention scores before the softmax, over the teacher's variance.

    Over all heads and all pairs of real tokens of which the first may see the second; over the means of the heads
    where their numbers differ.
    """
    found, wanted = (side.attention.scores() for side in (compared.student, compared.teacher))  # (B, H, T, T)
    if found.shape[1] != wanted.shape[1]:
        found, wanted = found.mean(dim=1, keepdim=True), wanted.mean(dim=1, keepdim=True)
    queries, keys = (_real_of(length, compared.batch, found) for length in found.shape[2:])
    allowed = queries[:, None, :, None] & keys[:, None, None, :]
    allowed = (allowed.tril() if compared.is_causal else allowed).expand_as(found)
    return _relative_square(found.masked_select(allowed), wanted.masked_select(allowed), compared)


def _real_of(length: int, batch: Mapping[str, torch.Tensor], scores: torch.Tensor) -> torch.Tensor:
    """Which of that many queries or keys are no padding, (B, T): the length tells what of a batch they are of."""
    everything = torch.ones(len(scores), length, dtype=torch.bool, device=scores.device)
    return next((mask for mask in token_masks(batch) if mask.shape[1] == length), everything)


LOSSES: dict[str, Callable[[Compared], torch.Tensor]] = {
    "task": task_loss,
    "logits": logits_loss,
    "hidden": hidden_loss,
    "attention": attention_loss,
}


def make_projections(
    layer_map: Sequence[tuple[str, str]], width: int, teacher_width: int, device: torch.device
) -> dict[str, nn.Module]:
    """Student block -> a linear map from its width to the teacher's; none where the widths agree."""
    if width == teacher_width:
        return {}
    return {ours: nn.Linear(width, teacher_width, bias=False, device=device) for ours, _ in layer_map}


def _relative_square(found: torch.Tensor, target: torch.Tensor, compared: Compared) -> torch.Tensor:
    """Mean squared difference over the variance of the target, both over the batches of all processes."""
    moments = torch.stack([torch.tensor(float(target.numel())).to(target), target.sum(), target.square().sum()])
    count, total, squares = compared.average(moments)
    variance = (squares / count - (total / count).square()).clamp_min(_LEAST)  # a single score has none
    relative: torch.Tensor = (found - target).square().sum() / count / variance
    return relative


def _average_count(count: int, compared: Compared) -> torch.Tensor:
    device = next(iter(compared.batch.values())).device
    return compared.average(torch.tensor(float(count), device=device)).clamp_min(_LEAST)
