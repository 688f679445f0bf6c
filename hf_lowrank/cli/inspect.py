"""`hf-lowrank inspect PATH`."""

import argparse

import torch

from hf_lowrank.cli import tables
from hf_lowrank.report import make_report
from hf_lowrank.saving import load_skeleton_config


def run(arguments: argparse.Namespace) -> int:
    """Print the report of a compressed model, from its configuration alone."""
    model_class, config = load_skeleton_config(arguments.path)
    with torch.device("meta"):
        skeleton = model_class(config)
    report = make_report(skeleton.to(config.dtype or torch.float32))
    if arguments.json:
        tables.print_json({"path": arguments.path, "report": report.to_dict()})
        return 0
    tables.print_line(f"{report.architecture}: {tables.settings_in_words(report)}")
    tables.print_comparison(report, report.dense_size_bytes)
    tables.print_matrices(report)
    if arguments.modules:
        tables.print_modules(report)
    return 0
