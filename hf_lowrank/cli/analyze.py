"""`hf-lowrank analyze MODEL`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_lowrank.cli import tables
from hf_lowrank.compression.settings import CompressOptions
from hf_lowrank.extras import load_part
from hf_lowrank.options import given
from hf_lowrank.progress import progress_bar
from hf_lowrank.studies.analysis import analyze
from hf_lowrank.studies.analysis_report import DAMAGE, ENERGY, Grid

_LOSSES = {
    DAMAGE: "change of the output, KL in nats or 1 - cosine, from one short run a matrix",
    ENERGY: "share of the squared singular values, weighed by the norm; does not compare methods",
}


def run(arguments: argparse.Namespace) -> int:
    """Analyze and print; draw if asked for."""
    plots = load_plots(arguments.plot)
    analysis = analyze(
        arguments.model,
        calibration=arguments.calibration,
        progress=progress_bar,
        **given(arguments, CompressOptions),
    )
    if plots is not None:
        plots.save_page(analysis, arguments.plot)
    if arguments.json:
        tables.print_json({"model": arguments.model, "plot": arguments.plot, "analysis": analysis.to_dict()})
        return 0
    how = f"{analysis.method}, {analysis.allocation} allocation, {analysis.storage} storage"
    tables.print_line(f"{arguments.model}: {analysis.architecture}, {how}")
    model_table, matrix_table = analysis.tables()
    print_grid(model_table)
    tables.print_line(f"{analysis.loss_name}: {_LOSSES[analysis.loss_name]}")
    print_grid(matrix_table)
    tables.print_line(analysis.recommendation)
    print_plot(arguments.plot)
    return 0


def load_plots(path: str | None) -> Any:
    """The module that draws, if there is something to draw; what can be wrong is found before the work is done."""
    if path is None:
        return None
    plots = load_part("hf_lowrank.studies.plots", "plot")
    plots.check_output(path)
    return plots


def print_grid(grid: Grid) -> None:
    """Print a table with its title, as wide as it is: numbers broken over lines cannot be read."""
    title, (header, *rows) = grid
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(header):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    width = sum(
        max(len(line) for row in (header, *rows) for line in row[index].split("\n")) + 2
        for index in range(len(header))
    )
    tables.print_line()
    tables.print_line(title)
    Console(file=sys.stdout, highlight=False, width=width).print(table)


def print_plot(path: str | None) -> None:
    """Say where the picture is."""
    if path is not None:
        tables.print_line(f"plot: {Path(path).resolve()}")
