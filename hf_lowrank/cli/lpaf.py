"""`hf-lowrank lpaf MODEL OUT --dataset DATA --keep-targets F`."""

import argparse

from hf_lowrank.cli import tables
from hf_lowrank.compression.settings import CompressOptions
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.options import given
from hf_lowrank.records.report import make_report
from hf_lowrank.sharing.cards.card import shown_command
from hf_lowrank.sharing.saving import save_folder
from hf_lowrank.training.lpaf import lpaf
from hf_lowrank.training.options import LPAFOptions
from hf_lowrank.training.processes import end_as_first


def run(arguments: argparse.Namespace) -> int:
    """Prune, factorize, train, save and print."""
    options = given(arguments, LPAFOptions) | given(arguments, CompressOptions)
    small = lpaf(load_dense(arguments.model), dataset=arguments.dataset, **options)
    if not end_as_first():
        return 0
    small.config.compression["provenance"]["command"] = shown_command(arguments.given, arguments.model)
    folder = save_folder(small, arguments.out, arguments.model, arguments.overwrite)
    report, found = make_report(small), small.config.compression["provenance"]["lpaf"]
    if arguments.json:
        about = {"model": arguments.model, "dataset": arguments.dataset, "out": str(folder)}
        tables.print_json({**about, "lpaf": found, "report": report.to_dict()})
        return 0
    ranks = found["ranks_after_pruning"].values()
    share = sum(one["rank"] / one["full_rank"] for one in ranks) / len(ranks)
    tables.print_comparison(report)
    tables.print_line(f"pruned matrices: {share:.0%} of full rank on average")
    loss = found["held_out_loss"]
    tables.print_line(f"held-out loss: {loss['before']:.4f} factorized -> {loss['after']:.4f} trained")
    tables.print_line(f"saved: {folder}")
    tables.print_steps([tables.evaluation_step(report, small, arguments.out, arguments.model)])
    return 0
