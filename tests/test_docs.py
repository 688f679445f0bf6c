"""Every block of code in README and docs runs, in the order of its page, on tiny models and a Hub on loopback."""

import importlib.util
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from every_method import SOLVERS, TENSOR_METHODS
from markdown_it import MarkdownIt
from tiny_files import write_data, write_models

import hf_lowrank
from hf_lowrank.cli import main
from hf_lowrank.cli import verify as verify_command
from hf_lowrank.evaluation import TASKS
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.remote_code.lowrank_table import STRUCTURES
from hf_lowrank.sharing import hub
from hf_lowrank.sharing.verification import Verification

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
PROVED_ON = "quicktour.md"
OUTPUT = "text"  # what a block says that shows output, an equation or a listing


@dataclass(frozen=True)
class Block:
    """Code between fences.

    Args:
        line: Of its first line in the page.
    """

    language: str
    code: str
    line: int


def blocks_of(page):
    tokens = MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8"))
    return [Block(token.info, token.content, token.map[0] + 2) for token in tokens if token.type == "fence"]


def commands_of(block):
    lines = block.code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def hf_lowrank_runs(words):
    assert main(words) == 0, shlex.join(["hf-lowrank", *words])


def pip_installs_what_there_is(words):
    assert words[0] == "install"
    place, _, extras = words[-1].rstrip("]").partition("[")
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert place == "."
    assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras.split(",") if extra)


def make_has_the_target(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert words[0] in targets


def script_has_the_options(words):
    text = (ROOT / words[0]).read_text(encoding="utf-8")
    assert all(f'"{word}"' in text for word in words if word.startswith("--"))


# first word of a line -> what is done with the others; scripts are run by the tests of examples
COMMANDS = {
    "hf-lowrank": hf_lowrank_runs,
    "pip": pip_installs_what_there_is,
    "make": make_has_the_target,
    "python": script_has_the_options,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folders and files that pages speak of."""
    folder = tmp_path_factory.mktemp("world")
    write_models(folder)
    write_data(folder)
    return folder


@pytest.fixture
def proof(page, monkeypatch):
    """The proof in another process, which takes seconds, is made on one page; pushes elsewhere go without."""
    if page.name != PROVED_ON:
        for module in (hub, verify_command):
            monkeypatch.setattr(module, "verify", lambda path, *_, **__: Verification(Path(path).is_dir(), "skipped"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # of huggingface_hub's own transport
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # of torch, without a GPU
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning", "ignore:fan_in_fan_out")
@each_page
def test_every_block_of_a_page_runs(page, world, our_hub, proof, tmp_path, monkeypatch):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}

    for block in blocks_of(page):
        if block.language == "python":
            code = "\n" * (block.line - 1) + block.code  # errors name the line of the page
            exec(compile(code, str(page), "exec", dont_inherit=True), namespace)
        elif block.language == "bash":
            for first, *others in commands_of(block):
                COMMANDS[first](others)
        else:
            assert block.language == OUTPUT, f"{page.name}:{block.line}: nobody runs {block.language!r}"


@each_page
def test_every_link_within_the_repository_leads_somewhere(page):
    found = re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8"))

    assert [link for link in found if "://" not in link and not (page.parent / link).exists()] == []


@each_page
def test_every_script_that_is_named_is_there(page):
    found = re.findall(r"\b(?:examples|model_cards|docs)/[\w/]+\.py\b", page.read_text(encoding="utf-8"))

    assert [name for name in found if not (ROOT / name).is_file()] == []


def script(name):
    """A script of docs as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_what_the_docstrings_say():
    maker = script("make_reference")

    assert maker.PAGE.read_text(encoding="utf-8") == maker.reference(), "run: make docs"


def test_the_reference_holds_every_public_name_structure_and_solver():
    names = {name.rpartition(".")[2] for group in script("make_reference").CONTENTS.values() for name in group}

    assert set(hf_lowrank.__all__) - {"__version__"} <= names
    assert len(hf_lowrank.__all__) <= 25
    assert {structure.__name__ for structure in STRUCTURES.values()} <= names
    assert {type(solver).__name__ for solver in SOLVERS.values()} <= names


@pytest.mark.parametrize("picture", script("make_plots").PICTURES)
def test_a_picture_has_the_numbers_of_the_tables(picture):
    maker = script("make_plots")
    text = (maker.DOCS / picture).read_text(encoding="utf-8")
    drawn = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)[1]
    read, _ = maker.PICTURES[picture]

    assert json.loads(drawn) == json.loads(
        json.dumps(read((maker.DOCS / "results.md").read_text(encoding="utf-8")))
    ), "run: make docs"


def test_every_public_name_to_train_with_stands_in_a_block_that_is_run():
    code = "".join(block.code for page in PAGES for block in blocks_of(page) if block.language == "python")
    training = [name for name in hf_lowrank.__all__ if name.endswith(("Callback", "Trainer", "MixedRank"))]

    assert len(training) >= 6
    assert [name for name in training if not re.search(rf"\b{name}\(", code)] == []


def test_options_and_methods_are_in_the_guides():
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES if page.name != "reference.md")

    assert [name for name in [*SOLVERS, *TENSOR_METHODS, *ALLOCATIONS, *TASKS] if f"`{name}`" not in pages] == []
