"""A `Trainer` whose loss is how far the model is from a teacher."""

import inspect
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from hf_lowrank.data.calibration import is_causal
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.blocks import block_name, recorded_outputs
from hf_lowrank.hosts.heads import says_vectors
from hf_lowrank.options import checked
from hf_lowrank.remote_code.lowrank_structures import named_structures
from hf_lowrank.training.attention import recorded_attention
from hf_lowrank.training.features import Features, has_labels
from hf_lowrank.training.losses import LOSSES, Compared, Watched, make_projections
from hf_lowrank.training.preparation import fast_attention, without_dropout

_PROJECTIONS = "distillation_projections"


class DistillationTrainer(Trainer):
    """`transformers.Trainer` that trains a student towards a teacher.

    The loss is `sum_k weight_k loss_k` over the named terms of `hf_lowrank.training.losses.LOSSES`:
        task        the student's own loss on the labels
        logits      `T^2 KL(teacher || student)` at temperature `T` where the heads speak; half the squared difference
                    of a single output, 1 - cosine without a head
        hidden      squared error of block outputs over their variance, through learned projections between widths
        attention   squared error of the last layers' attention scores before the softmax over their variance
    Evaluated, a model without a head is judged by `logits` alone, where that is among them.
    Each weighted term is logged as `loss_<name>` beside `loss`, unweighted. Everything else is the Trainer's:
    arguments, checkpoints, resuming, several processes, mixed precision, gradient accumulation and checkpointing. With
    several processes a step has the loss one process would have on all their batches.

    The teacher runs in evaluation mode and without gradients, on the student's device. The student has no dropout
    unless asked for: what it is to say does not vary either. Projections are parameters of
    the student while it is trained, so that checkpoints hold them, and gone after `train()`.

    Args:
        teacher: With the student's vocabulary and, for `logits`, its head; see `check_teacher`.
        losses: Weight of each term that counts. Default: `logits` and `hidden`, 1 each.
        temperature: `T`; counts for `logits` alone.
        layer_map: Pairs (student block, teacher block) by number; see `spread_layers` for the default.
        dropout: Whether the student's own dropout stays.

    Raises:
        InputError: If a term or a block does not exist, or the teacher does not fit.
    """

    loss_is_scaled_for_ga = False

    @checked
    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel,
        losses: Mapping[str, float] | None = None,
        temperature: float = 1.0,
        layer_map: Sequence[tuple[int, int]] | None = None,
        dropout: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.losses = {name: float(w) for name, w in (losses or {"logits": 1.0, "hidden": 1.0}).items() if w}
        self.temperature = temperature
        self.dropout = dropout
        _check_losses(self.losses, temperature)
        student = self.accelerator.unwrap_model(self.model)
        check_teacher(student, teacher, "logits" in self.losses)
        self.teacher: Any = teacher.eval()
        self.teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the task loss is the mean over the batch
        self.layer_map = _named_layers(student, teacher, layer_map) if "hidden" in self.losses else []
        self._student_blocks, self._teacher_blocks = ([pair[side] for pair in self.layer_map] for side in (0, 1))
        widths = [_setting(model, "hidden_size") for model in (student, teacher)]
        self._projections = make_projections(self.layer_map, widths[0], widths[1], self.args.device)
        self._sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._count = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`."""
        student = self.accelerator.unwrap_model(self.model)
        if self._projections:
            # A module's name holds no dots.
            named = {name.replace(".", "_"): module for name, module in self._projections.items()}
            student.add_module(_PROJECTIONS, nn.ModuleDict(named))
        try:
            with nullcontext() if self.dropout else without_dropout(student):
                return super().train(*args, **kwargs)
        finally:
            student._modules.pop(_PROJECTIONS, None)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The weighted sum of the terms; see the class."""
        student = self.accelerator.unwrap_model(model)
        compared = self._compare(model, student, inputs)
        total = torch.zeros((), device=self.args.device)
        for name, weight in self._counted(student, model.training).items():
            loss = LOSSES[name](compared)
            total = total + weight * loss
            if model.training:
                self._sums[name] += loss.detach()
        self._count += int(model.training)
        return (total, compared.student.output) if return_outputs else total

    def _counted(self, student: PreTrainedModel, is_training: bool) -> Mapping[str, float]:
        """The terms that count: a model without a head is judged by its vectors alone, which are what it is for."""
        is_judged_by_vectors = says_vectors(student) and "logits" in self.losses and not is_training
        return {"logits": self.losses["logits"]} if is_judged_by_vectors else self.losses

    def _compare(self, model: Any, student: PreTrainedModel, inputs: dict[str, Any]) -> Compared:
        attends = "attention" in self.losses
        unlabelled = {name: value for name, value in inputs.items() if name not in self.label_names}
        teaches = bool(set(self.losses) - {"task"})
        with (
            torch.no_grad(),
            self.accelerator.autocast(),  # which Accelerate puts around the student by itself
            recorded_outputs(self.teacher, self._teacher_blocks) as wanted,
            recorded_attention(self.teacher, attends) as their_attention,
        ):
            reference = self.teacher(**_accepted(self.teacher, unlabelled)) if teaches else None
        with (
            fast_attention(self.accelerator, next(iter(inputs.values())).shape[-1]),
            recorded_outputs(student, self._student_blocks) as found,
            recorded_attention(student, attends) as attention,
        ):
            output = model(**(inputs if "task" in self.losses else unlabelled))
        return Compared(
            batch=inputs,
            student=Watched(student, output, found, attention),
            teacher=Watched(self.teacher, reference, wanted, their_attention),
            temperature=self.temperature,
            layer_map=self.layer_map,
            projections=self._projections,
            is_causal=is_causal(student),
            average=self._average,
        )

    def _average(self, value: torch.Tensor) -> torch.Tensor:
        averaged: torch.Tensor = self.accelerator.reduce(value, reduction="mean")
        return averaged

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """As in `Trainer`; data without labels have a loss too."""
        if self.label_names and all(inputs.get(name) is not None for name in self.label_names):
            found: tuple[Any, Any, Any] = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
            return found
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        logits = None if prediction_loss_only else getattr(outputs, "logits", None)
        return loss.detach(), logits, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, with the mean of each term since the last time."""
        if "loss" in logs and self._count:
            for name, total in self._sums.items():
                logs[f"loss_{name}"] = float(self._average(total)) / self._count
            self._sums.clear()
            self._count = 0
        super().log(logs, *args, **kwargs)


def default_losses(model: PreTrainedModel, features: Features) -> dict[str, float]:
    """Weights where none are given: 1 for `logits`, `hidden`, and for `task` where rows have a class or an answer.

    What a model without a head says is all it is for: `logits` counts ten times there.
    """
    if says_vectors(model):
        return {"logits": 10.0, "hidden": 1.0}
    # A language model's labels are its teacher's text: the teacher's whole distribution says more.
    is_labelled = has_labels(features) and (features[0].get("labels", torch.tensor(0)).dim() == 0)
    return {"logits": 1.0, "hidden": 1.0, **({"task": 1.0} if is_labelled else {})}


def check_teacher(student: PreTrainedModel, teacher: PreTrainedModel, compares_logits: bool = True) -> None:
    """Refuse a teacher that does not speak of the same things.

    Raises:
        InputError: If its vocabulary or its number of classes is another.
    """
    if not isinstance(teacher, nn.Module):
        raise InputError(f"teacher must be a transformers model, got {teacher!r}. Load it first.")
    ours, theirs = (_setting(model, "vocab_size") for model in (student, teacher))
    if ours != theirs:
        raise InputError(f"The teacher has another vocabulary: {theirs} tokens, the model {ours}. Give its own.")
    classes = [getattr(model.config, "num_labels", None) for model in (student, teacher)]
    heads = [type(model).__name__.partition("For")[2] for model in (student, teacher)]
    if compares_logits and heads[0] == heads[1] and "Classification" in heads[0] and classes[0] != classes[1]:
        raise InputError(f"The teacher has {classes[1]} classes, the model {classes[0]}. Give one with the same.")
    if compares_logits and heads[0] != heads[1]:
        raise InputError(
            f"The teacher is a {type(teacher).__name__}, the model a {type(student).__name__}: their heads cannot be "
            "compared. Give a teacher with the same head, or leave out the loss 'logits'."
        )


def _setting(model: PreTrainedModel, name: str) -> int:
    """A number of the part that writes text, where a model has several; 0 where it has none."""
    return int(getattr(model.config.get_text_config(decoder=True), name, 0) or 0)


def repeated_blocks(model: PreTrainedModel) -> list[str]:
    """Full names of the repeated blocks of a model's body, in its order.

    What a structure numbers of its own, such as the parts of a table, is no block.
    """
    base = model.base_model
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)
    own = tuple(f"{name}." for name, _ in named_structures(base))
    named = [name for name, _ in base.named_modules() if name and block_name(name) == name]
    return [prefix + name for name in named if not name.startswith(own)]


def spread_layers(num_layers: int, num_teacher_layers: int) -> list[tuple[int, int]]:
    """Block `i` of `N` learns from block `ceil((i + 1) M / N) - 1` of `M`: the last from the last."""
    return [(i, -(-(i + 1) * num_teacher_layers // num_layers) - 1) for i in range(num_layers)]


def _named_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, layer_map: Sequence[tuple[int, int]] | None
) -> list[tuple[str, str]]:
    ours, theirs = repeated_blocks(student), repeated_blocks(teacher)
    if not ours or not theirs:
        raise InputError("The loss 'hidden' compares repeated blocks, and there are none. Leave it out.")
    pairs = spread_layers(len(ours), len(theirs)) if layer_map is None else layer_map
    for first, second in pairs:
        if not (0 <= first < len(ours) and 0 <= second < len(theirs)):
            raise InputError(
                f"layer_map names blocks ({first}, {second}); the model has {len(ours)}, the teacher {len(theirs)}. "
                "Count from 0."
            )
    return [(ours[first], theirs[second]) for first, second in pairs]


def _check_losses(losses: Mapping[str, float], temperature: float) -> None:
    if unknown := set(losses) - set(LOSSES):
        raise InputError(f"Losses are {', '.join(LOSSES)}; there is no {min(unknown)!r}.")
    if not losses or not all(0 < weight < math.inf for weight in losses.values()):
        raise InputError(f"Weights of losses must be positive and one at least is needed, got {dict(losses)}.")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be positive, got {temperature:g}.")


def _accepted(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs a model takes; a teacher of another family may know fewer."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in inputs.items() if name in known}
