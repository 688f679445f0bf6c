"""When something changes during a training, and how far it has come."""

import math
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.remote_code.lowrank_model import LowRankMixin


@dataclass(frozen=True)
class Span:
    """A part of a training, from `start` to `end`: below 1 a share of it, else a number of steps."""

    start: float
    end: float

    def __post_init__(self) -> None:
        if not (0 <= self.start < math.inf and 0 < self.end < math.inf):
            raise InputError(f"A schedule's start and end must be positive, got {self.start:g} and {self.end:g}.")

    def steps(self, max_steps: int) -> tuple[int, int]:
        """First and last step in a training of `max_steps`.

        Raises:
            InputError: If the schedule is longer than the training, or ends before it begins.
        """
        first, last = (round(at * max_steps) if at < 1 else round(at) for at in (self.start, self.end))
        if last > max_steps:
            raise InputError(
                f"The schedule ends at step {last}, the training at step {max_steps}. End it earlier or train longer."
            )
        if first >= last:
            raise InputError(f"The schedule ends at step {last} and begins at step {first}. Begin earlier.")
        return first, last

    def progress(self, step: int, max_steps: int) -> float:
        """0 before the span, 1 after it, and the share of its steps between."""
        first, last = self.steps(max_steps)
        return min(1.0, max(0.0, (step - first) / (last - first)))


def cubic(first: float, last: float, progress: float) -> float:
    """`last + (first - last) (1 - progress)^3`: fast at the start, slow at the end (Zhu and Gupta, 2018)."""
    return last + (first - last) * (1 - progress) ** 3


def compressed_model(model: PreTrainedModel) -> LowRankMixin | None:
    """The compressed model in a model or in what wraps one (PEFT); None if there is none."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((module for module in modules if isinstance(module, LowRankMixin)), None)
