"""`hf-lowrank recover PATH OUT --teacher MODEL --dataset DATA`."""

import argparse

from hf_lowrank.cli import tables
from hf_lowrank.options import given
from hf_lowrank.records.report import make_report
from hf_lowrank.sharing.cards.card import shown_command
from hf_lowrank.sharing.saving import save_folder
from hf_lowrank.training.options import RecoveryOptions
from hf_lowrank.training.processes import end_as_first
from hf_lowrank.training.recovery import recover


def run(arguments: argparse.Namespace) -> int:
    """Recover, save and print the loss before and after."""
    options = given(arguments, RecoveryOptions)
    model = recover(arguments.path, teacher=arguments.teacher, dataset=arguments.dataset, **options)
    if not end_as_first():
        return 0
    provenance = model.config.compression["provenance"]
    commands = [provenance["command"]] if "command" in provenance else []
    provenance["command"] = "\n".join([*commands, shown_command(arguments.given, arguments.teacher)])
    folder = save_folder(model, arguments.out, arguments.path, arguments.overwrite)
    found = provenance["recovery"]
    if arguments.json:
        about = {"path": arguments.path, "teacher": arguments.teacher, "dataset": arguments.dataset}
        tables.print_json({**about, "out": str(folder), "recovery": found})
        return 0
    kept = f"best after {found['step']} of {found['steps']} steps" if found["step"] else "no step helped: unchanged"
    tables.print_line(f"held-out loss: {found['before']:.4f} -> {found['after']:.4f} ({kept})")
    tables.print_line(f"saved: {folder}")
    tables.print_steps([tables.evaluation_step(make_report(model), model, arguments.out, arguments.teacher)])
    return 0
