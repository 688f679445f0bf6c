"""A short, guarded training of a compressed model towards the dense one, on the calibration text."""

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lowrank.blocks import block_name, frozen, recorded_outputs
from hf_lowrank.calibration import Calibration
from hf_lowrank.outputs import Batch, real_tokens, run
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_structures import named_structures

_WARM_UP = 0.1
_LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Args:
        before: Mean distance of the outputs from the dense model's on text that was not trained on; see
            `Said.distance`.
        after: The same of the state that was kept: the best of all passes, or the one before them.
        passes: Passes over the text that led to it; 0 if none helped.
    """

    before: float
    after: float
    passes: int


def refine_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    calibration: Calibration,
    *,
    passes: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Refinement:
    """Train the blocks of `small` to do what `dense` does, and keep the pass that does it best on unseen text.

    The loss is the distance of the outputs plus the squared error of every block's output over its variance. All
    weights of the blocks that hold structures are trained; embeddings and head are not. Because the state before the
    first pass competes, the model never gets worse on the text set aside.

    Args:
        passes: Over the calibration batches.
        learning_rate: Peak of AdamW's, after a warm-up over a tenth of the steps; it falls as a cosine.
        seed: Of the order of the batches.
    """
    names = sorted({block_name(name) for name, _ in named_structures(small)} - {""})
    parameters = [p for name in names for p in small.get_submodule(name).parameters() if p.is_floating_point()]
    state = [parameter.requires_grad for parameter in small.parameters()]
    order = random.Random(seed)
    steps = [batch for _ in range(passes) for batch in order.sample(calibration.batches, len(calibration.batches))]
    with frozen(dense), frozen(small):
        best = before = _distance(small, dense, calibration.probes)
        kept, kept_passes = _copies(parameters), 0
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _Cosine(len(steps)))
        for step, batch in enumerate(progress(steps, "refining"), start=1):
            optimizer.zero_grad()
            _loss(small, dense, batch, names).backward()
            nn.utils.clip_grad_norm_(parameters, _LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            if step % len(calibration.batches) == 0:
                distance = _distance(small, dense, calibration.probes)
                if distance < best:
                    best, kept, kept_passes = distance, _copies(parameters), step // len(calibration.batches)
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
                parameter.grad = None
    for parameter, requires_grad in zip(small.parameters(), state, strict=True):
        parameter.requires_grad_(requires_grad)
    return Refinement(before, best, kept_passes)


@dataclass(frozen=True)
class _Cosine:
    """Factor of the learning rate at each step."""

    num_steps: int

    def __call__(self, step: int) -> float:
        warm = min(1.0, (step + 1) / max(1.0, _WARM_UP * self.num_steps))
        return warm * (1 + math.cos(math.pi * step / max(1, self.num_steps))) / 2


def _loss(small: PreTrainedModel, dense: PreTrainedModel, batch: Batch, names: Sequence[str]) -> torch.Tensor:
    placed = {name: value.to(small.device) for name, value in batch.items()}
    with torch.no_grad(), recorded_outputs(dense, names) as wanted:
        reference = run(dense, placed)
    with recorded_outputs(small, names) as found:
        loss = run(small, placed).distance(reference).mean()
    real = real_tokens(placed)
    for name in names:
        target = _hidden(wanted[name])[real]
        loss = loss + F.mse_loss(_hidden(found[name])[real], target) / target.var() / len(names)
    return loss


def _hidden(output: Any) -> torch.Tensor:
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _distance(small: PreTrainedModel, dense: PreTrainedModel, batches: Iterable[Batch]) -> float:
    with torch.no_grad():
        distances = []
        for batch in batches:
            placed = {name: value.to(small.device) for name, value in batch.items()}
            distances.append(run(small, placed).distance(run(dense, placed)))
    return float(torch.cat(distances).mean())


def _copies(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
