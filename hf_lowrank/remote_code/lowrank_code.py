"""Which of the files beside this one load a model of some plan: a folder is saved with these and no others."""

import os
import re
from pathlib import Path

from .lowrank_plan import Plan, specs_of

# Transformers finds what a file needs in the same way, in its text.
_IMPORT = re.compile(r"^from \.(\w+) import (.*)\n", re.MULTILINE)
_ENTRY = re.compile(r'^    "(\w+)": (\w+),\n', re.MULTILINE)


def code_files(plan: Plan) -> dict[str, str]:
    """Name and text of each file that is saved with a model of this plan.

    Each is a file of this folder as it is, but for the table of structures: of that, only the lines of the files that
    hold what the plan names, and of what these need.
    """
    texts = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")}
    table = texts["lowrank_table"]
    homes = {name: file for file, names in _IMPORT.findall(table) for name in names.split(", ")}
    classes = dict(_ENTRY.findall(table))
    names = [spec["structure"] for spec in specs_of(plan).values()]
    named = {classes[name] for name in [*names, *([plan["packed"]["code"]] if plan.get("packed") else [])]}
    kept = _needed({homes[name] for name in named}, texts)
    table = _IMPORT.sub(lambda line: line[0] if line[1] in kept else "", table)
    texts["lowrank_table"] = _ENTRY.sub(lambda line: line[0] if homes[line[2]] in kept else "", table)
    return {f"{name}.py": texts[name] for name in sorted(_needed({"modeling_lowrank"}, texts))}


def _needed(names: set[str], texts: dict[str, str]) -> set[str]:
    """Files of these names and all that they import, directly or not."""
    found: set[str] = set()
    while names:
        found |= names
        names = {file for name in names for file, _ in _IMPORT.findall(texts[name])} - found
    return found


def save_code(plan: Plan, folder: str | os.PathLike[str]) -> None:
    """Write the code that loads a model of this plan into a folder."""
    for name, text in code_files(plan).items():
        (Path(folder) / name).write_text(text, encoding="utf-8")
