"""`hf-lowrank inspect PATH`."""

import argparse

from hf_lowrank.cli import tables
from hf_lowrank.sharing.inspection import saved_report


def run(arguments: argparse.Namespace) -> int:
    """Print the report of a compressed model, without loading its weights."""
    report = saved_report(arguments.path)
    if arguments.json:
        tables.print_json({"path": arguments.path, "report": report.to_dict()})
        return 0
    tables.print_line(f"{report.architecture}: {tables.settings_in_words(report)}")
    tables.print_comparison(report)
    tables.print_matrices(report)
    if arguments.modules:
        tables.print_modules(report)
    return 0
