"""The best state of a training, the one before it among them."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import InputError
from hf_lowrank.files.processes import told_by_first
from hf_lowrank.files.scratch import write_file
from hf_lowrank.training.processes import share_

_FILE = "best.safetensors"


class BestStateCallback(TrainerCallback):
    """Keeps the trainable parameters of the evaluation with the least loss, and gives them back at the end.

    With `eval_on_start=True` the state before the first step competes, so that the training never makes a model
    worse on the evaluation data. The best state lies in `output_dir` of the first process and survives a kill.

    Args:
        metric: What is least.
    """

    def __init__(self, metric: str = "eval_loss") -> None:
        self.metric = metric
        self.before: float | None = None
        self.after: float | None = None
        self.step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        file, numbers = _file(args), None
        if state.is_world_process_zero:
            if state.global_step and file.is_file():
                with safe_open(file, framework="pt") as saved:
                    numbers = saved.metadata()
            else:
                file.unlink(missing_ok=True)
        if numbers := told_by_first(numbers):
            self.before, self.after = float(numbers["before"]), float(numbers["after"])
            self.step = int(numbers["step"])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        value = kwargs["metrics"][self.metric]
        if self.before is None:
            if not math.isfinite(value):
                raise InputError(
                    f"The held-out loss is {value} before the first step. Something in the model, its teacher or the "
                    "data is no finite number: mend that first."
                )
            self.before = value
        if self.after is not None and not value < self.after:
            return
        self.after, self.step = value, state.global_step
        if state.is_world_process_zero:
            numbers = {"before": repr(self.before), "after": repr(self.after), "step": str(self.step)}
            best = {name: p.detach().cpu().contiguous() for name, p in _trained(kwargs["model"])}
            write_file(_file(args), lambda draft: save_file(best, draft, numbers))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trained = _trained(kwargs["model"])
        if state.is_world_process_zero:
            with safe_open(_file(args), framework="pt") as saved, torch.no_grad():
                for name, parameter in trained:
                    parameter.copy_(saved.get_tensor(name))
        share_(parameter for _, parameter in trained)


def _file(args: TrainingArguments) -> Path:
    return Path(str(args.output_dir)) / _FILE


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
