"""`hf-lowrank card PATH`."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_lowrank.cli import tables
from hf_lowrank.errors import InputError
from hf_lowrank.sharing.inspection import saved_report
from hf_lowrank.sharing.record import CARD_FILE, has_own_card, write_record


def run(arguments: argparse.Namespace) -> int:
    """Write the card again, with what is said of the dense model."""
    folder = Path(arguments.path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give the folder of a saved compressed model.")
    report = saved_report(folder)
    if has_own_card(folder):
        raise InputError(f"{folder / CARD_FILE} was not written by hf_lowrank. Keep it, or move it away first.")
    said: dict[str, Any] = {}
    if arguments.base_model is not None:
        said |= {"name": arguments.base_model, "base_model": arguments.base_model, "is_base": True}
    if arguments.finetuned_from is not None:
        said |= {"base_model": arguments.finetuned_from, "is_base": False}
    if arguments.license is not None:
        said["license"] = arguments.license
    if arguments.language is not None:
        said["language"] = tuple(arguments.language)
    write_record(folder, replace(report, origin=replace(report.origin, **said)))
    if arguments.json:
        tables.print_json({"path": arguments.path, "card": str(folder / CARD_FILE), "quality": len(report.quality)})
        return 0
    tables.print_line(f"written: {folder / CARD_FILE}")
    if not report.quality:
        tables.print_steps([f"hf-lowrank evaluate {folder} --dense MODEL --task TASK --dataset DATA --record"])
    return 0
