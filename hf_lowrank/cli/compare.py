"""`hf-lowrank compare MODEL --dataset DATA --task TASK --methods M ... --keep-targets F ...`."""

import argparse

from hf_lowrank.cli import tables
from hf_lowrank.cli.analyze import load_plots, print_grid, print_plot
from hf_lowrank.cli.flags.evaluate import TaskFlags
from hf_lowrank.compression.settings import ComparisonOptions
from hf_lowrank.evaluation import make_task
from hf_lowrank.options import given
from hf_lowrank.progress import progress_bar
from hf_lowrank.studies.comparison import compare


def run(arguments: argparse.Namespace) -> int:
    """Compare and print; draw if asked for."""
    plots = load_plots(arguments.plot)
    comparison = compare(
        arguments.model,
        arguments.dataset,
        make_task(arguments.task, **given(arguments, TaskFlags)),
        off_calibration=arguments.off_calibration,
        calibration=arguments.calibration,
        progress=progress_bar,
        **given(arguments, ComparisonOptions),
        **({} if arguments.keep_targets is None else {"budgets": arguments.keep_targets}),
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
