"""`hf-lowrank compress MODEL OUT`."""

import argparse
import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.cli import tables
from hf_lowrank.compression.compress import compress
from hf_lowrank.compression.disk.tier import opened
from hf_lowrank.compression.job import Job, prepare
from hf_lowrank.compression.settings import CompressOptions
from hf_lowrank.compression.settled import settle_compression
from hf_lowrank.compression.vocabulary import reduce_vocabulary
from hf_lowrank.errors import InputError, Note
from hf_lowrank.hosts.disk.offloaded import offloaded
from hf_lowrank.hosts.loading import find_tokenizer
from hf_lowrank.hosts.targets import ALL_LINEAR
from hf_lowrank.options import given, settle
from hf_lowrank.planning.budgets import parse_size
from hf_lowrank.progress import progress_bar
from hf_lowrank.records.latency import compare_latency
from hf_lowrank.records.report import CompressionReport, make_report
from hf_lowrank.records.wording import megabytes
from hf_lowrank.sharing.cards.card import shown_command
from hf_lowrank.sharing.cards.usage import loading_line
from hf_lowrank.sharing.record import record_bytes, write_record
from hf_lowrank.sharing.saving import save_folder, side_file_bytes
from hf_lowrank.studies.analysis import planned_report
from hf_lowrank.training.processes import end_as_first

# What no module name holds, but a pattern does.
_IS_PATTERN = re.compile(r"[\\^$*+?()\[\]{}|]")


def run(arguments: argparse.Namespace) -> int:
    """Compress, save, measure and print."""
    options = _options(arguments)
    asked = settle(CompressOptions, options, "compress")
    settings = settle_compression(options, has_text=arguments.calibration is not None)
    dense, tokenizer = opened(arguments.model, settings)[0], None
    if arguments.vocabulary is not None:
        dense, tokenizer = reduce_vocabulary(
            dense, find_tokenizer(dense), arguments.vocabulary, text_column=arguments.text_column
        )
    side_bytes = side_file_bytes(arguments.model) + record_bytes(dense) if asked.target_size is not None else 0
    for_weights = options | _without_side_files(asked.target_size, side_bytes)
    about = {"calibration": arguments.calibration, "tokenizer": tokenizer, "progress": progress_bar}
    try:
        if arguments.dry_run:
            return _print_plan(arguments, _prepared(dense, for_weights, about), asked.to_dict())
        small = compress(dense, **about, **for_weights)
    except InputError as error:
        raise _with_side_files(error, side_bytes) from error
    if not end_as_first():
        return 0
    made_by = {"settings": asked.to_dict(), "command": shown_command(arguments.given, arguments.model)}
    small.config.compression["provenance"] |= made_by
    folder = save_folder(small, arguments.out, arguments.model, arguments.overwrite, tokenizer)
    report = make_report(small)
    if not arguments.no_latency and offloaded(small) is None:
        # The folder is saved by now: who does not want to wait for this loses nothing.
        try:
            report = replace(report, latency=compare_latency(dense, small))
            write_record(folder, report)
        except InputError as error:
            warnings.warn(Note(f"Latency is not measured: {error}"), stacklevel=2)
    _print_result(arguments, folder, report, small)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = given(arguments, CompressOptions)
    for name in ("target_modules", "exclude_modules"):
        if name in options:
            options[name] = _patterns(options[name])
    return options


def _patterns(given: list[str]) -> list[str] | str:
    """Names as a list; a single regular expression, or `all-linear`, as the string it is in PEFT."""
    is_string = len(given) == 1 and (given[0] == ALL_LINEAR or _IS_PATTERN.search(given[0]))
    return given[0] if is_string else given


def _without_side_files(target_size: str | float | None, side_bytes: int) -> dict[str, int]:
    """On the command line `target_size` speaks of the whole folder, the tokenizer included."""
    if target_size is None:
        return {}
    left = parse_size(target_size) - side_bytes
    if left < 1:
        raise InputError(
            f"target_size={target_size} is out of reach: the tokenizer and other files alone take "
            f"{megabytes(side_bytes)}. Raise the budget."
        )
    return {"target_size": left}


def _with_side_files(error: InputError, side_bytes: int) -> InputError:
    if "target_size" not in str(error) or not side_bytes:
        return error
    return InputError(f"{error} (Besides {megabytes(side_bytes)} of tokenizer and other files.)")


def _prepared(dense: PreTrainedModel, options: dict[str, Any], about: dict[str, Any]) -> Job:
    return prepare(dense, settle_compression(options, has_text=about["calibration"] is not None), **about)


def _print_plan(arguments: argparse.Namespace, job: Job, settings: dict[str, Any]) -> int:
    """Print what `compress` would do, from a model without numbers."""
    plan, _ = job.plan()
    plan["provenance"]["settings"] = settings
    report = planned_report(job.model, plan, job.problem.dtype)
    if arguments.json:
        tables.print_json({"model": arguments.model, "dry_run": True, "plan": plan, "report": report.to_dict()})
        return 0
    tables.print_comparison(report)
    tables.print_matrices(report)
    tables.print_modules(report)
    tables.print_line("dry run: nothing was written; errors and latency are known after the real run")
    return 0


def _print_result(arguments: argparse.Namespace, folder: Path, report: CompressionReport, model: Any) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if arguments.json:
        tables.print_json(
            {
                "model": arguments.model,
                "out": str(folder),
                "folder_bytes": size,
                "dense_size_bytes": report.dense_size_bytes,
                "report": report.to_dict(),
                "latency": None if report.latency is None else asdict(report.latency),
            }
        )
        return
    tables.print_line(f"{arguments.model} -> {arguments.out}: {tables.settings_in_words(report)}")
    tables.print_comparison(report)
    tables.print_matrices(report)
    tables.print_line(f"saved: {folder}, {megabytes(size)} with tokenizer and code")
    tables.print_steps(
        [
            f"hf-lowrank verify {arguments.out}",
            tables.evaluation_step(report, model, arguments.out, arguments.model),
            f"hf-lowrank inspect {arguments.out} --modules",
            f"{loading_line(report, arguments.out)}  # without this library",
        ]
    )
