"""`hf-lowrank lpaf MODEL OUT --dataset DATA --keep-targets F`."""

import argparse

from hf_lowrank.cards.card import shown_command
from hf_lowrank.cli import tables
from hf_lowrank.loading import load_dense
from hf_lowrank.report import make_report
from hf_lowrank.saving import check_output, save_folder
from hf_lowrank.training.lpaf import lpaf
from hf_lowrank.training.processes import end_as_first

# Options that carry the names of `lpaf`'s; only those that were given are passed on.
_OPTIONS = (
    "keep_params", "keep_targets", "target_size", "rank", "method", "prune_keep", "importance", "probability",
    "consistency", "prune_epochs", "tune_epochs", "prune_learning_rate", "tune_learning_rate", "score_learning_rate",
    "temperature", "batch_size", "max_seq_length", "max_examples", "text_column", "label_column", "seed", "work_dir",
)  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Prune, factorize, train, save and print."""
    check_output(arguments.out, arguments.overwrite, arguments.model)
    given = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    if arguments.losses:
        given["losses"] = dict(arguments.losses)
    dense = load_dense(arguments.model)
    small = lpaf(dense, dataset=arguments.dataset, eval_dataset=arguments.eval_dataset, **given)
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
    tables.print_steps([f"hf-lowrank evaluate {arguments.out} --dense {arguments.model} --dataset DATA --task TASK"])
    return 0
