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
    for note in found.notes:
        tables.print_line(note)
    tables.print_line(f"{'written' if found.ok else 'FAILED'}: {found.message}")
    return 0 if found.ok else CHECK_FAILED
