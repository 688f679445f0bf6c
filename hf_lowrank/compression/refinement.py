"""A short, guarded training of a compressed model towards the dense one, on the calibration text."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lowrank.data.calibration import Calibration
from hf_lowrank.files.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.hosts.blocks import block_name, frozen, hidden_states, recorded_outputs
from hf_lowrank.hosts.outputs import Batch, mean_distance, real_rows, run
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_structures import named_structures

_WARM_UP = 0.1
_LARGEST_GRADIENT = 1.0
_STEP_DOWN = 4


@dataclass(frozen=True)
class Refinement:
    """What a refinement did.

    Args:
        before: Mean distance of the outputs from the dense model's on text that was not trained on; see
            `Said.distance`.
        after: The same of the state that was kept: the best of all passes, or the one before them.
        passes: Passes over the text that led to it; 0 if none helped.
        learning_rate: The one it was trained at.
    """

    before: float
    after: float
    passes: int
    learning_rate: float


def refine_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    calibration: Calibration,
    *,
    passes: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
    checkpoint: Checkpoint = NOT_KEPT,
    progress: Progress = no_progress,
) -> Refinement:
    """Train the blocks of `small` to do what `dense` does, and keep the pass that does it best on unseen text.

    The loss is the distance of the outputs plus the squared error of every block's output over its variance. All
    weights of the blocks that hold structures are trained; embeddings and head are not. Because the state before the
    first pass competes, the model never gets worse on the text set aside.

    Args:
        passes: Over the calibration batches.
        learning_rate: Peak of AdamW's, after a warm-up over a tenth of the steps; it falls as a cosine. A model that
            has lost little is hurt by a rate that heals another: where the first pass does not help, training starts
            again at a quarter of it.
        seed: Of the order of the batches.
        checkpoint: Keeps each finished pass, so that none is made twice.
    """
    names = sorted({block_name(name) for name, _ in named_structures(small)} - {""})
    training = Training(
        parameters=[p for name in names for p in small.get_submodule(name).parameters()],
        num_batches=len(calibration.batches),
        loss=lambda index: _loss(small, dense, calibration.batches[index], names),
        distance=lambda: mean_distance(small, dense, calibration.probes),
        passes=passes,
        seed=seed,
        checkpoint=checkpoint.part("refined"),
        progress=progress,
    )
    trainable = [parameter.requires_grad for parameter in small.parameters()]
    with frozen(dense), frozen(small):
        found = training.at(learning_rate, f"refining at {learning_rate:g}")
        if found.passes == 0:
            found = training.at(learning_rate / _STEP_DOWN, f"refining at {learning_rate / _STEP_DOWN:g}")
    for parameter, requires_grad in zip(small.parameters(), trainable, strict=True):
        parameter.requires_grad_(requires_grad)
    return found


@dataclass(frozen=True)
class Training:
    """A guarded training from the state the parameters are in, at a rate to be given.

    Args:
        loss: Of a batch, by its number.
        distance: What has to fall, on text that is not trained on.
        passes: Over the batches.
        seed: Of their order.
        checkpoint: Keeps each finished pass.
    """

    parameters: Sequence[nn.Parameter]
    num_batches: int
    loss: Callable[[int], torch.Tensor]
    distance: Callable[[], float]
    passes: int
    seed: int
    checkpoint: Checkpoint
    progress: Progress

    def at(self, learning_rate: float, description: str) -> Refinement:
        """Train, and leave the best state; give up after a first pass that does not help, or with nothing to train."""
        if not self.parameters:  # every block stayed dense, and only a table became smaller
            distance = self.distance()
            return Refinement(distance, distance, 0, learning_rate)
        checkpoint = self.checkpoint.part(f"{self.passes}-{learning_rate:g}-{self.seed}")
        draw = random.Random(self.seed)
        orders = [draw.sample(range(self.num_batches), self.num_batches) for _ in range(self.passes)]
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _Cosine(self.passes * self.num_batches))
        state = self._resumed(checkpoint, optimizer, schedule) or self._begun()
        rest = [index for order in orders[state["passes"] :] for index in order]
        for step, index in enumerate(self.progress(rest, description) if not _is_over(state) else [], start=1):
            self._step(index, optimizer)
            schedule.step()
            if step % self.num_batches == 0:
                self._note_pass(state)
                learned = {"parameters": _copies(self.parameters), "optimizer": optimizer.state_dict()}
                checkpoint.save({**state, **learned, "schedule": schedule.state_dict()})
                if _is_over(state):
                    break
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state["kept"], strict=True):
                parameter.copy_(value)
                parameter.grad = None
        return Refinement(state["before"], state["best"], state["kept_passes"], learning_rate)

    def _begun(self) -> dict[str, Any]:
        before = self.distance()
        kept = _copies(self.parameters)
        return {"passes": 0, "before": before, "best": before, "kept_passes": 0, "kept": kept}

    def _resumed(self, checkpoint: Checkpoint, optimizer: Any, schedule: Any) -> dict[str, Any] | None:
        state = checkpoint.load()
        if state is None:
            return None
        with torch.no_grad():
            for parameter, value in zip(self.parameters, state.pop("parameters"), strict=True):
                parameter.copy_(value)
        optimizer.load_state_dict(state.pop("optimizer"))
        schedule.load_state_dict(state.pop("schedule"))
        return dict(state)

    def _step(self, index: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.loss(index).backward()
        nn.utils.clip_grad_norm_(self.parameters, _LARGEST_GRADIENT)
        optimizer.step()

    def _note_pass(self, state: dict[str, Any]) -> None:
        state["passes"] += 1
        distance = self.distance()
        if distance < state["best"]:
            state |= {"best": distance, "kept": _copies(self.parameters), "kept_passes": state["passes"]}


def _is_over(state: dict[str, Any]) -> bool:
    """Whether the first pass did not help."""
    return bool(state["passes"] == 1 and not state["kept_passes"])


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
    for name in names:
        target = real_rows(hidden_states(wanted[name]), placed)
        rows = real_rows(hidden_states(found[name]), placed)
        loss = loss + F.mse_loss(rows, target) / target.var() / len(names)
    return loss


def _copies(parameters: Sequence[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
