"""Whatever a command is told or finds in a file: exit status 0, 1 or 2, one line for bad input, nothing spoiled.

The cases are drawn from a seed, HF_LOWRANK_FUZZ_SEED, which is printed at the end; HF_LOWRANK_FUZZ_SHARE=10 draws ten
times as many.
"""

from functools import cache

import pytest
from examining import complaint, remove
from fuzzing import (
    DATA,
    DATA_READERS,
    LINES,
    READERS,
    SEED,
    SHARE,
    copy_world,
    damaged,
    files_in,
    lines_of,
    replace,
    write_world,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from hf_lowrank import cli
from hf_lowrank.cli.flags.parser import build_parser
from hf_lowrank.sharing import verification
from hf_lowrank.studies import doctor

# command -> cases, the fewer the longer one takes
CASES = {
    "inspect": 300, "push": 300, "decompress": 250, "verify": 220, "card": 120, "compress": 120, "evaluate": 60,
    "doctor": 60, "export": 40, "analyze": 30, "compare": 30, "recover": 8, "lpaf": 5,
}  # fmt: skip
CASES_OF_FOLDERS = {"small": 150, "dense": 80, "gpt2": 100}
CASES_OF_DATA = 190


def drawn(count):
    """Settings of a test of so many cases, all from the seed; a failing one is told as it is."""
    quiet = settings(
        max_examples=max(1, round(count * SHARE)),
        phases=[Phase.generate],
        database=None,
        derandomize=False,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(quiet(test))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "world"
    folder.mkdir()
    write_world(folder)
    return folder


@pytest.fixture(autouse=True)
def spared(monkeypatch, tmp_path):
    """What takes seconds for each line, and what is drawn here ends before it, is left out."""
    monkeypatch.setattr(verification, "_ask_child", lambda *_: ({"error": "left out here"}, {}))
    monkeypatch.setattr(cli, "build_parser", cache(build_parser))
    monkeypatch.setattr(doctor, "_LARGE_PAGES", tmp_path / "none")


def check(world, words, spoil=lambda folder: None):
    """The promises hold for a line in a copy of the world, in which something is spoiled first."""
    folder = world.parent / "case"
    copy_world(world, folder)
    spoil(folder)
    try:
        assert complaint(words, folder) is None, f"hf-lowrank {words} (seed {SEED})"
    finally:
        remove(folder)


@pytest.mark.parametrize("command", CASES)
def test_any_options(command, world):
    @drawn(CASES[command])
    @given(lines_of(command))
    def of_options(words):
        check(world, words)

    of_options()


@pytest.mark.parametrize("name", CASES_OF_FOLDERS)
def test_any_damage_to_a_model_folder(name, world):
    @drawn(CASES_OF_FOLDERS[name])
    @given(st.sampled_from(READERS[name]), st.sampled_from(files_in(world / name)), st.data())
    def of_damage(line, path, data):
        content = data.draw(damaged(path))
        check(world, line.split(), lambda folder: replace(folder / name / path.name, content))

    of_damage()


def test_any_damage_to_data(world):
    @drawn(CASES_OF_DATA)
    @given(st.sampled_from(DATA_READERS), st.sampled_from(sorted(DATA)), st.data())
    def of_damage(line, name, data):
        content = data.draw(damaged(world / name))
        check(world, line.replace("DATA", name).split(), lambda folder: replace(folder / name, content))

    of_damage()


def test_every_command_is_drawn():
    commands = next(action.choices for action in build_parser()._actions if action.choices)

    assert set(CASES) == set(LINES) == set(commands)
    assert sum(CASES.values()) + sum(CASES_OF_FOLDERS.values()) + CASES_OF_DATA >= 2000
