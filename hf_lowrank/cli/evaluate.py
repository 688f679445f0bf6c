"""`hf-lowrank evaluate PATH --dataset DATA --task TASK`."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from hf_lowrank.cli import tables
from hf_lowrank.cli.flags.evaluate import TaskFlags
from hf_lowrank.errors import InputError, one_line
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.base import Task
from hf_lowrank.evaluation.evaluation import Evaluation, evaluate
from hf_lowrank.hosts.config_file import read_config
from hf_lowrank.hosts.latency import measure_latency
from hf_lowrank.hosts.loading import load_dense, load_processor
from hf_lowrank.options import given
from hf_lowrank.progress import progress_bar
from hf_lowrank.records.machine import usable_device
from hf_lowrank.runtimes.model import exported_files, load_exported
from hf_lowrank.sharing.cards.card import REPORT_FILE
from hf_lowrank.sharing.recorded_evaluation import record_evaluation
from hf_lowrank.sharing.saving import load_compressed


def run(arguments: argparse.Namespace) -> int:
    """Score the model, and the dense one if it is given, and print one table."""
    if arguments.record and not (Path(arguments.path).is_dir() and _is_compressed(arguments.path)):
        raise InputError(f"--record needs the folder of a compressed model, got {arguments.path}.")
    device = usable_device(arguments.device or "cpu")
    task = make_task(arguments.task, **given(arguments, TaskFlags))
    model = _load(arguments.path, device)
    processor = _processor(model, arguments.path, arguments.dense)
    evaluation = evaluate(
        model,
        arguments.dataset,
        task,
        dense=_load(arguments.dense, device) if arguments.dense else None,
        tokenizer=processor,
        cost=not arguments.no_cost,
        progress=progress_bar,
    )
    runtimes = _in_runtimes(arguments, task, evaluation, processor)
    if arguments.record:
        record_evaluation(arguments.path, evaluation, arguments.dataset)
    if arguments.json:
        about = {"path": arguments.path, "dense_path": arguments.dense, "dataset": arguments.dataset}
        tables.print_json({**about, "evaluation": evaluation.to_dict(), "runtimes": runtimes})
        return 0
    tables.print_line(f"{arguments.path} on {arguments.dataset}")
    Console(file=sys.stdout, highlight=False).print(evaluation.to_table())
    _print_runtimes(runtimes, evaluation.metric)
    if arguments.record:
        tables.print_line(f"recorded: {arguments.path}/{REPORT_FILE}, and the card")
    return 0


def _in_runtimes(arguments: argparse.Namespace, task: Task, evaluation: Evaluation, processor: Any) -> dict[str, Any]:
    """What every exported file in the folder of a model scores, how large and how fast it is."""
    files = exported_files(arguments.path) if Path(arguments.path).is_dir() else []
    models = {file.relative_to(arguments.path).as_posix(): load_exported(file) for file in files}
    if not models:
        return {}
    first = next(iter(models.values()))
    steps = task.steps(processor, arguments.dataset, 8, first)
    scores = task.compare({name: task.prepare(model) for name, model in models.items()}, steps, progress_bar)
    shape = evaluation.batch_size, evaluation.sequence_length
    latency = {} if arguments.no_cost else measure_latency(models, *shape)
    return {
        name: {
            "size_bytes": sum(one.stat().st_size for one in file.parent.glob(f"{file.stem}.*")),
            "score": scores[name][evaluation.metric],
            "seconds": latency[name].median if name in latency else None,
        }
        for name, file in zip(models, files, strict=True)
    }


def _print_runtimes(rows: dict[str, Any], metric: str) -> None:
    if rows:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in ("in other runtimes", "MB", metric, "ms"):
            table.add_column(column, justify="left" if column.startswith("in") else "right")
        for name, row in rows.items():
            spent = "" if row["seconds"] is None else f"{1e3 * row['seconds']:.1f}"
            table.add_row(name, f"{row['size_bytes'] / 1e6:.1f}", f"{row['score']:.4f}", spent)
        Console(file=sys.stdout, highlight=False).print(table)


def _load(path: str, device: torch.device) -> Any:
    """A compressed or a dense model."""
    model: Any = load_compressed(path) if _is_compressed(path) else load_dense(path)
    return model.to(device).eval()


def _is_compressed(path: str) -> bool:
    if Path(path).is_dir():
        return bool(read_config(Path(path)).get("compression"))
    try:
        return bool(PreTrainedConfig.get_config_dict(path)[0].get("compression"))
    except (OSError, ValueError):
        return False  # load_dense says what is wrong with it


def _processor(model: Any, path: str, dense: str | None) -> Any:
    """The tokenizer, or the processor of images or sounds, beside the model, or beside the dense one."""
    reasons = []
    for source in [path, dense] if dense else [path]:
        try:
            return load_processor(source, model)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reasons.append(f"{source}: {one_line(error, 200)}")
    raise InputError(f"There is no tokenizer beside the model ({'; '.join(reasons)}). Save it there.")
