"""`hf-lowrank compare MODEL --dataset DATA --task TASK --methods M ... --keep-targets F ...`."""

import argparse
from typing import Any

import torch

from hf_lowrank.cli import tables
from hf_lowrank.cli.analyze import load_plots, print_grid, print_plot
from hf_lowrank.comparison import compare
from hf_lowrank.loading import load_dense
from hf_lowrank.progress import progress_bar
from hf_lowrank.tasks import make_task

# Options of the tasks and of the settings; only those that were given are passed on.
_TASK_OPTIONS = (
    "text_column", "text_pair_column", "label_column", "score_column",
    "max_examples", "block_length", "stride", "seed",
)  # fmt: skip
_OPTIONS = (
    "work_dir", "baseline", "embeddings", "device", "num_calibration_samples", "max_seq_length", "batch_size", "seed",
    "refine_passes",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; draw if asked for."""
    plots = load_plots(arguments.plot)
    comparison = compare(
        load_dense(arguments.model, None if arguments.dtype is None else getattr(torch, arguments.dtype)),
        arguments.dataset,
        make_task(arguments.task, **_given(arguments, _TASK_OPTIONS)),
        off_calibration=arguments.off_calibration,
        calibration=arguments.calibration,
        progress=progress_bar,
        methods=arguments.methods,
        text_column=arguments.calibration_column,
        **({} if arguments.keep_targets is None else {"budgets": arguments.keep_targets}),
        **_given(arguments, _OPTIONS),
    )
    if plots is not None:
        plots.save_page(comparison, arguments.plot)
    if arguments.json:
        about = {"model": arguments.model, "dataset": arguments.dataset, "off_calibration": arguments.off_calibration}
        tables.print_json({**about, "plot": arguments.plot, "comparison": comparison.to_dict()})
        return 0
    for grid in comparison.tables():
        print_grid(grid)
    print_plot(arguments.plot)
    return 0


def _given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
