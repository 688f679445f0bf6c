"""`hf-lowrank export PATH`."""

import argparse

from hf_lowrank.cli import CHECK_FAILED, tables
from hf_lowrank.options import given
from hf_lowrank.runtimes.export import export
from hf_lowrank.runtimes.options import ExportOptions


def run(arguments: argparse.Namespace) -> int:
    """Write the files of one runtime, and print how each compares with the model."""
    found = export(arguments.path, **given(arguments, ExportOptions))
    if arguments.json:
        tables.print_json({"path": arguments.path, **found.to_dict()})
        return 0 if found.ok else CHECK_FAILED
    reasons: dict[str, list[str]] = {}
    for name, _, reason in (note.partition(": ") for note in found.notes):
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        others = f" and {len(names) - 1} more" if names[1:] else ""
        tables.print_line(f"{names[0]}{others}: {reason}")
    tables.print_line(f"{'written' if found.ok else 'FAILED'}: {found.message}")
    return 0 if found.ok else CHECK_FAILED
