"""`evaluate`: a compressed model's quality, size, speed and memory, beside the dense one's."""

import copy
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.base import AGREEMENTS, Task, metric_of
from hf_lowrank.evaluation.memory import peak_memory
from hf_lowrank.hosts.latency import Latency, measure_latency, typical_inputs, typical_length
from hf_lowrank.hosts.loading import held_model
from hf_lowrank.hosts.targets import is_tied
from hf_lowrank.options import checked
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.records.machine import machine_name
from hf_lowrank.records.wording import change_in_words, megabytes, milliseconds, shape_in_words, verdict
from hf_lowrank.remote_code.lowrank_structures import structure_name

_SHAPE = (8, 128)
_DENSE, _MODEL, _UNTIED = "dense", "model", "untied"
# Digits after the point in the table; four for all other scores.
_DIGITS = {"scored_tokens": 0, "examples": 0, "perplexity": 2}


@dataclass(frozen=True)
class Measurements:
    """What one model scores, takes and needs.

    Args:
        scores: The task's metrics and the number of `examples`; for a model with a dense one beside it the agreement
            with that, and `change_low` and `change_high`; see `hf_lowrank.evaluation.base.Task.compare`.
        size_bytes: Of all parameters in their own types.
        peak_memory_bytes: See `hf_lowrank.evaluation.memory`.
        latency: Of one forward pass.
    """

    class_name: str
    parameters: int
    size_bytes: int
    scores: dict[str, float]
    peak_memory_bytes: int | None
    latency: Latency | None


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Args:
        options: All options of the task, so that the numbers can be had again.
        metric: The score that counts.
        batch_size: Of the forward pass that latency and memory are of.
        sequence_length: The same.
        machine: What they were measured on.
        untied: The model with the dense one's head in place of its own, where a language model's embedding is
            compressed and its head tied to it: what the compressed look-up alone costs. Its size has that head in it;
            latency and memory are not measured.
    """

    task: str
    options: dict[str, Any]
    metric: str
    higher_is_better: bool
    batch_size: int
    sequence_length: int
    machine: str
    model: Measurements
    dense: Measurements | None
    untied: Measurements | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, with the `verdict` on the model (see `hf_lowrank.records.wording`)."""
        return {**asdict(self), "verdict": verdict(self.model.scores, self.higher_is_better)}

    def to_table(self) -> Table:
        """Dense and compressed side by side; what the dense model has not, agreement with itself, stays blank."""
        sides = [side for side in (self.dense, self.model, self.untied) if side is not None]
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column(self.task, overflow="fold")
        for name in ("dense", "compressed", "dense head")[: len(sides)] if self.dense is not None else ("model",):
            table.add_column(name, justify="right")
        for name in self.model.scores:
            if not name.startswith("change_"):
                table.add_row(name.replace("_", " "), *(_score(side.scores, name) for side in sides))
        if self.dense is not None and self.metric in self.dense.scores:
            dense, better = self.dense.scores, self.higher_is_better
            changes = (change_in_words(side.scores, dense, self.metric, better) for side in sides[1:])
            table.add_row(f"change of {self.metric}, 95 % interval", "", *changes)
        table.add_row("parameters", *(f"{side.parameters:,}" for side in sides))
        table.add_row("weights", *(megabytes(side.size_bytes) for side in sides))
        shape = shape_in_words(self.batch_size, self.sequence_length)
        if self.model.latency is not None:
            table.add_row(
                f"latency, {shape}", *("" if side.latency is None else milliseconds(side.latency) for side in sides)
            )
        if self.model.peak_memory_bytes is not None:
            table.add_row(f"memory, {shape}", *map(_memory, sides))
        return table


@checked
def evaluate(
    model: PreTrainedModel,
    dataset: Any,
    task: str | Task,
    *,
    dense: PreTrainedModel | None = None,
    tokenizer: Any = None,
    batch_size: int = 8,
    cost: bool = True,
    progress: Progress = no_progress,
    **options: Any,
) -> Evaluation:
    """Score a model, and beside it the dense one it came from: `evaluate(small, "dev.tsv", "similarity")`.

    Args:
        model: Compressed or not, with the head the task needs.
        dataset: A file, a data set of the Hub, a `datasets.Dataset`, texts or rows; see
            `hf_lowrank.data.rows.load_rows`.
        task: A name out of `hf_lowrank.evaluation.TASKS`, or a task.
        dense: What `model` was; agreement with it is measured too.
        tokenizer: Of both models.
        cost: Whether to measure latency and memory.
        options: Of the task, such as `max_examples` or `text_column`; see its class.

    Raises:
        InputError: If the data, the model or an option does not fit the task.
    """
    if isinstance(task, Task) and options:
        raise InputError(f"A task that is made has its options; {next(iter(options))} must be given where it is made.")
    task = task if isinstance(task, Task) else make_task(task, **options)
    if dense is None and task.metric in AGREEMENTS:
        raise InputError(f"Task {task.name} compares with the dense model, and there is none. Give dense=.")
    model = held_model(model)
    models = {_MODEL: model} if dense is None else {_DENSE: held_model(dense), _MODEL: model}
    timed = dict(models)
    if dense is not None and task.metric == "perplexity" and _is_tied_to_structure(model):
        models[_UNTIED] = _with_head_of(dense, model)
    parts = {name: task.prepare(one) for name, one in models.items()}
    steps = task.steps(tokenizer, dataset, batch_size, parts[_MODEL])
    scores = task.compare(parts, steps, progress)
    shape = (_SHAPE[0], typical_length(model, _SHAPE[1]))
    latency = measure_latency(timed, *shape) if cost else {}
    measured = {name: _measure(one, scores[name], latency.get(name), shape) for name, one in models.items()}
    return Evaluation(
        task=task.name,
        options=asdict(task),
        metric=metric_of(task, scores[_MODEL]),
        higher_is_better=task.higher_is_better,
        batch_size=shape[0],
        sequence_length=shape[1],
        machine=machine_name(model.device),
        model=measured[_MODEL],
        dense=measured.get(_DENSE),
        untied=measured.get(_UNTIED),
    )


def _is_tied_to_structure(model: PreTrainedModel) -> bool:
    return is_tied(model) and structure_name(model.get_input_embeddings()) is not None


def _with_head_of(dense: PreTrainedModel, model: PreTrainedModel) -> Any:
    """The model with the head of another; every tensor is shared with the two."""
    tensors = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    mixed = copy.deepcopy(model, tensors)
    mixed.set_output_embeddings(dense.get_output_embeddings())
    return mixed


def _measure(model: Any, scores: dict[str, float], latency: Latency | None, shape: tuple[int, int]) -> Measurements:
    parameters = list(model.parameters())
    return Measurements(
        class_name=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in parameters),
        size_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        scores=scores,
        peak_memory_bytes=None if latency is None else peak_memory(model, typical_inputs(model, *shape)),
        latency=latency,
    )


def _memory(side: Measurements) -> str:
    return "" if side.peak_memory_bytes is None else megabytes(side.peak_memory_bytes)


def _score(scores: dict[str, float], name: str) -> str:
    return f"{scores[name]:,.{_DIGITS.get(name, 4)}f}" if name in scores else ""
