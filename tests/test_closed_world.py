"""The shipped code is a closed world: siblings, torch and transformers are all it needs, and all of it is shipped."""

import ast
import importlib.util
import inspect
import shutil
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files

from hf_lowrank.remote_code.lowrank_code import code_files, save_code
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

SHIPPED = Path(__file__).resolve().parents[1] / "hf_lowrank" / "remote_code"
ENTRIES = ("modeling_lowrank", "configuration_lowrank")
INSTALLED = {"torch", "transformers", "huggingface_hub", "safetensors"}


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def siblings(path):
    """Names of the files that `path` imports, as Python sees it."""
    found = [node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.level]
    return {node.module for node in found}


def foreign_imports(path):
    """Imports that would not work in a folder that holds only the shipped files."""
    known = {file.stem for file in path.parent.glob("*.py")} - {"__init__"}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            if node.level > 1 or node.module not in known:
                yield ast.unparse(node)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if not {name.split(".")[0] for name in names} <= INSTALLED | sys.stdlib_module_names:
                yield ast.unparse(node)


def closure(path):
    """Every file that `path` imports, directly or not, as Python sees it."""
    found, waiting = set(), siblings(path)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting |= siblings(path.with_name(f"{name}.py"))
    return found


def scanned(path):
    """Every file that transformers ships with `path`: a text search, which also reads docstrings."""
    return {Path(file).stem for file in get_relative_import_files(path)}


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.py")), ids=lambda path: path.stem)
def test_shipped_file_imports_only_siblings_torch_and_transformers(path):
    assert list(foreign_imports(path)) == []


@pytest.mark.parametrize("entry", ENTRIES)
def test_transformers_ships_exactly_what_is_imported(entry):
    path = SHIPPED / f"{entry}.py"

    assert scanned(path) == closure(path)


def test_every_shipped_file_is_reached_from_the_models():
    others = {path.stem for path in SHIPPED.glob("*.py")} - {"__init__", "modeling_lowrank"}

    assert closure(SHIPPED / "modeling_lowrank.py") == others


def plan_of(*names):
    return {"format_version": 1, "modules": {name: {"structure": name} for name in names}}


@pytest.mark.parametrize("name", [*STRUCTURES, "nothing"])
def test_a_folder_holds_the_code_its_plan_needs_and_no_other(tmp_path, name):
    save_code(plan_of(*({name} & set(STRUCTURES))), tmp_path)

    files = {path.stem for path in tmp_path.glob("*.py")}
    assert [line for path in tmp_path.glob("*.py") for line in foreign_imports(path)] == []
    assert files == closure(tmp_path / "modeling_lowrank.py") | {"modeling_lowrank"}
    assert files == scanned(tmp_path / "modeling_lowrank.py") | {"modeling_lowrank"}
    assert name not in STRUCTURES or Path(inspect.getfile(STRUCTURES[name])).stem in files


def test_code_that_is_saved_is_this_librarys_text_but_for_lines_of_the_table():
    for name, text in code_files(plan_of("banked_tucker")).items():
        whole = (SHIPPED / name).read_text(encoding="utf-8")
        assert text == whole or name == "lowrank_table.py"

    lines = code_files(plan_of("banked_tucker"))["lowrank_table.py"].splitlines()
    whole = (SHIPPED / "lowrank_table.py").read_text(encoding="utf-8").splitlines()
    gone = [line for line in whole if line not in lines]
    assert [line for line in whole if line in lines] == lines
    assert gone
    assert all(line.startswith(("from .lowrank_", '    "')) for line in gone)


@pytest.mark.parametrize("name", STRUCTURES)
def test_code_saved_by_what_was_saved_is_the_same(tmp_path, name):
    first, plan = tmp_path / "first", plan_of(name)
    first.mkdir()
    save_code(plan, first)

    spec = importlib.util.spec_from_file_location("saved.lowrank_code", first / "lowrank_code.py")
    shutil.copy(SHIPPED / "lowrank_plan.py", first)
    sys.modules["saved.lowrank_plan"] = importlib.import_module("hf_lowrank.remote_code.lowrank_plan")
    saved = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(saved)

    assert saved.code_files(plan) == code_files(plan)


def test_the_code_of_plain_pairs_of_factors_is_short():
    assert sum(map(len, code_files(plan_of("low_rank")).values())) <= 70_000


@pytest.mark.parametrize(
    "line",
    [
        "from . import lowrank_plan",
        "from ..report import make_report",
        "from .lowrank_missing import Missing",
        "from .lowrank_plan.deeper import Plan",
        "from hf_lowrank.records.report import make_report",
        "import hf_lowrank",
        "import numpy",
        "def f():\n    import rich",
    ],
)
def test_gate_sees_a_foreign_import(tmp_path, line):
    shutil.copytree(SHIPPED, tmp_path / "code")
    path = tmp_path / "code" / "lowrank_linear.py"
    path.write_text(f"{path.read_text()}\n{line}\n")

    assert len(list(foreign_imports(path))) == 1


@pytest.mark.parametrize(
    "line", ['"""\nfrom .lowrank_stray import Stray\n"""', "import os; from .lowrank_stray import x"]
)
def test_gate_sees_that_transformers_ships_something_else(tmp_path, line):
    shutil.copytree(SHIPPED, tmp_path / "code")
    (tmp_path / "code" / "lowrank_stray.py").write_text(
        '"""Nothing imports this, or transformers does not see it."""\n'
    )
    path = tmp_path / "code" / "modeling_lowrank.py"
    path.write_text(f"{path.read_text()}\n{line}\n")

    assert scanned(path) != closure(path)
