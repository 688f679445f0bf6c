"""Training rounded weights: what learns are numbers behind them, and what computes is always on the grid."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.compression.trained_rounding import RoundedWeight
from hf_lowrank.files.scratch import write_file
from hf_lowrank.methods.rounding.coding import coded_bits

_FILE = "latent.safetensors"
_HALVINGS = 4
# What bits are estimated wrong by.
_MARGIN = 0.0005


class StraightThroughCallback(TrainerCallback):
    """Rounded weights make every pass; the numbers behind them take every step, as if nothing were rounded.

    The gradient at a rounded weight moves the latent one (straight-through estimator: Bengio et al., 1308.3432), which
    is rounded to the same grid anew. Codes that spread take more bits: before each evaluation the reluctance to larger
    ones is made so great that all together take no more bytes than at first, so that every state that is evaluated can
    be kept. What is not rounded is held in half precision.

    Args:
        rounded: What is on a grid; what of it does not learn stays as it is.
    """

    def __init__(self, rounded: Sequence[RoundedWeight]) -> None:
        self._all = rounded
        self._rounded: dict[str, RoundedWeight] = {}
        self._learning: dict[str, nn.Parameter] = {}
        self._latent: dict[str, torch.Tensor] = {}
        self._reluctance = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin at the numbers there are, or at those of the checkpoint that is gone on with."""
        self._learning = {name: p for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        on_grid = {id(one.parameter): one for one in self._all}
        self._rounded = {name: on_grid[id(p)].on(p.device) for name, p in self._learning.items() if id(p) in on_grid}
        self._latent = {name: p.detach().clone() for name, p in self._learning.items()}
        self._reluctance, file = 0.0, _file(args, state)
        if state.global_step and file.is_file():
            found = load_file(file)
            self._reluctance = float(found.pop("reluctance"))
            for name, value in found.items():
                self._latent[name].copy_(value)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The step is the latent numbers'."""
        self._put_(self._latent)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What computes is on the grid again."""
        for name, parameter in self._learning.items():
            self._latent[name].copy_(parameter.detach())
        self._round_()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What is evaluated fits."""
        if control.should_evaluate and self._rounded:
            self._reluctance = self._fitting()
            self._round_()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint has the latent numbers too."""
        if state.is_world_process_zero:
            held = {name: value.cpu().contiguous() for name, value in self._latent.items()}
            held["reluctance"] = torch.tensor(self._reluctance, dtype=torch.float64)
            write_file(_file(args, state), lambda draft: save_file(held, draft))

    def _round_(self) -> None:
        rounded, reluctance = self._rounded, self._reluctance
        at_rest = {name: _in_half(value) for name, value in self._latent.items() if name not in rounded}
        on_grid = {name: one.weight(one.codes(self._latent[name], reluctance)) for name, one in rounded.items()}
        self._put_(at_rest | on_grid)

    @torch.no_grad()
    def _put_(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._learning[name].copy_(value)

    def _fitting(self) -> float:
        """The least reluctance, nearly, at which the bytes are no more than at first."""
        most = (1 - _MARGIN) * sum(coded_bits(one.grid.codes.int().cpu()) for one in self._rounded.values())
        if self._bits(0.0) <= most:
            return 0.0
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self._bits(middle) > most else (low, middle)
        return high if high < 1 else math.inf

    def _bits(self, reluctance: float) -> float:
        codes = (one.codes(self._latent[name], reluctance) for name, one in self._rounded.items())
        return sum(coded_bits(one.cpu()) for one in codes)


def _in_half(values: torch.Tensor) -> torch.Tensor:
    """Numbers that half precision has, where they are within its range: saved in half the bytes."""
    near = values.half().to(values)
    return near if bool(near.isfinite().all()) else values


def _file(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FILE
