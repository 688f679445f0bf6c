"""`hf-lowrank evaluate PATH --dataset DATA --task TASK`."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from hf_lowrank.cli import tables
from hf_lowrank.cli.flags.evaluate import TaskFlags
from hf_lowrank.errors import InputError, one_line
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.evaluation import evaluate
from hf_lowrank.hosts.config_file import read_config
from hf_lowrank.hosts.loading import load_dense, load_processor
from hf_lowrank.options import given
from hf_lowrank.progress import progress_bar
from hf_lowrank.records.machine import usable_device
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
    evaluation = evaluate(
        model,
        arguments.dataset,
        task,
        dense=_load(arguments.dense, device) if arguments.dense else None,
        tokenizer=_processor(model, arguments.path, arguments.dense),
        cost=not arguments.no_cost,
        progress=progress_bar,
    )
    if arguments.record:
        record_evaluation(arguments.path, evaluation, arguments.dataset)
    if arguments.json:
        about = {"path": arguments.path, "dense_path": arguments.dense, "dataset": arguments.dataset}
        tables.print_json({**about, "evaluation": evaluation.to_dict()})
        return 0
    tables.print_line(f"{arguments.path} on {arguments.dataset}")
    Console(file=sys.stdout, highlight=False).print(evaluation.to_table())
    if arguments.record:
        tables.print_line(f"recorded: {arguments.path}/{REPORT_FILE}, and the card")
    return 0


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
