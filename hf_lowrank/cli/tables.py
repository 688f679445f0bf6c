"""What the commands print: tables for people, one JSON object for programs."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_lowrank.evaluation import TASKS
from hf_lowrank.planning.budgets import BUDGETS
from hf_lowrank.records.report import CompressionReport
from hf_lowrank.records.wording import megabytes, milliseconds, shape_in_words, share, speed_in_words
from hf_lowrank.sharing.cards.usage import evaluation_task

_WIDE = 120  # more than any row: one that is broken over two lines cannot be read


def print_json(result: dict[str, Any]) -> None:
    """Print one JSON object."""
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


def print_line(text: str = "") -> None:
    """Print text as it is, however narrow the terminal."""
    Console(file=sys.stdout, highlight=False, soft_wrap=True).print(escape(text))


def print_steps(steps: Sequence[str]) -> None:
    """Print the commands to run next."""
    for index, step in enumerate(steps):
        print_line(f"{'next:' if index == 0 else '     '} {step}")


def evaluation_step(report: CompressionReport, model: Any, path: str, dense: str) -> str:
    """The command that scores a model in what it is for."""
    task = evaluation_task(report, model)
    command = f"hf-lowrank evaluate {path} --dense {dense} --task {task} --dataset DATA --record"
    return f"{command}  # DATA: {TASKS[task].data}"


def print_comparison(report: CompressionReport) -> None:
    """Print the before/after table, and first of all if most of the model was never looked at."""
    if report.warning:
        print_line(report.warning)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("dense", "compressed", ""):
        table.add_column(column, justify="right" if column else "left")
    table.add_row(
        "parameters", f"{report.dense_parameters:,}", f"{report.parameters:,}", f"{report.kept_fraction:.1%} kept"
    )
    _add_parts(table, report)
    table.add_row(
        "weights",
        megabytes(report.dense_size_bytes),
        megabytes(report.size_bytes),
        share(report.size_bytes, report.dense_size_bytes),
    )
    if report.materialized_bytes:
        decoded = report.size_bytes + report.materialized_bytes
        dense = report.dense_size_bytes
        table.add_row("memory, decoded once", megabytes(dense), megabytes(decoded), share(decoded, dense))
    table.add_row(
        "multiply-adds a token",
        f"{report.dense_multiply_adds:,}",
        f"{report.multiply_adds:,}",
        share(report.multiply_adds, report.dense_multiply_adds),
    )
    if (latency := report.latency) is not None:
        times = (milliseconds(latency.dense), milliseconds(latency.compressed))
        shape = shape_in_words(latency.batch_size, latency.sequence_length)
        # The median of ratios is not quite the ratio of the two medians beside it.
        table.add_row(f"latency, {shape}", *times, f"{speed_in_words(latency.compressed)}, median of rounds")
    Console(file=sys.stdout, highlight=False, width=_WIDE).print(table)


def _add_parts(table: Table, report: CompressionReport) -> None:
    """Rows for what papers count: all but the token embedding, and the replaced matrices alone."""
    for name, (before, now) in report.parts.items():
        table.add_row(f"  {name}", f"{before:,}", f"{now:,}", f"{share(now, before)} kept")


def print_matrices(report: CompressionReport) -> None:
    """Print how many matrices were replaced, and which were left dense and why."""
    dense = [module for module in report.modules if module.structure == "dense" and module.bits is None]
    print_line(report.matrices_in_words)
    if report.bits:
        print_line(f"          {report.bits[0]:.2f} to {report.bits[-1]:.2f} bits a number")
    for note, count in Counter(module.note for module in dense).items():
        print_line(f"          {count} dense: {note}")
    for reason, count in Counter(one.reason for one in report.untouched).items():
        size = sum(one.parameters for one in report.untouched if one.reason == reason)
        print_line(f"          {count} not looked at, {size:,} parameters: {reason}")


def print_modules(report: CompressionReport) -> None:
    """Print one line for every matrix."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("structure")
    for column in ("shape", "rank", "parameters", "kept", "bits", "error"):
        table.add_column(column, justify="right")
    for module in report.modules:
        table.add_row(
            module.name,
            module.structure,
            " x ".join(map(str, module.shape)),
            str(module.rank or ""),
            f"{module.parameters:,}",
            share(module.parameters, module.dense_parameters),
            "" if module.bits is None else f"{module.bits:.2f}",
            "" if module.relative_error is None else f"{module.relative_error:.3f}",
        )
    Console(file=sys.stdout, highlight=False).print(table)


def settings_in_words(report: CompressionReport) -> str:
    """The settings that were given, on one line."""
    shown = (*BUDGETS, "rank_pattern", "method", "allocation", "dtype")
    given = report.provenance.get("settings", {})
    return ", ".join(f"{name} {given[name]}" for name in shown if name in given)
