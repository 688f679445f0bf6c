"""The door for options: what is checked, and the flags that follow from the fields."""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from hf_lowrank.errors import InputError
from hf_lowrank.options import LARGEST_SEED, Options, add_flags, given, option, settle, settle_parts
from hf_lowrank.records.machine import usable_device


@dataclass(frozen=True, kw_only=True)
class Size(Options):
    """How small.

    Args:
        keep: Fraction that stays, such as 40 %. Not with `rank`.
        rank: Of every matrix
            that is replaced.
        seed: Of every draw.
    """

    keep: float | None = option(None, above=0, at_most=1)
    rank: int | None = option(None, at_least=1)
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)


@dataclass(frozen=True, kw_only=True)
class Teaching(Options):
    """How to train.

    Args:
        data: What to train on.
        losses: Weight of each term.
        places: Where.
        rate: Of learning.
        kind: Of the optimizer.
        size: Of the whole. Default: by the data.
        fast: Leave something out.
        thorough: Leave nothing out.
        seed: Of every draw.
    """

    data: Any
    losses: Mapping[str, float] | None = option(None, at_least=0)
    places: Sequence[int] = option((1, 2), at_least=0)
    rate: float = option(1e-4, above=0)
    kind: str = option("adam", choices=("adam", "descent"), metavar="NAME")
    size: str | int | None = option(None)
    fast: bool = option(False)
    thorough: bool | None = option(None)
    seed: int = option(0, at_least=0)


WRONG = [
    ({"keep": 0}, "keep must be a number above 0 and at most 1, got 0"),
    ({"keep": float("nan")}, "keep must be a number above 0 and at most 1, got nan"),
    ({"keep": float("-inf")}, "got -inf"),
    ({"keep": True}, "got True"),
    ({"keep": "half"}, "got 'half'"),
    ({"rank": 2.0}, "rank must be a whole number at least 1, got 2.0"),
    ({"rank": True}, "got True"),
    ({"seed": -1}, "seed must be a whole number at least 0 and at most 4294967295, got -1"),
    ({"seed": 10**400}, "seed must be .* got 1000"),
    ({"seed": None}, "seed must be"),
    ({"rankk": 1}, "verb has no option 'rankk'. Closest: 'rank'"),
    ({"losses": {"task": float("nan")}}, "losses must be a number by name at least 0"),
    ({"losses": {"task": -1}}, "losses must be"),
    ({"losses": {1: 1.0}}, "losses must be"),
    ({"losses": ["task"]}, "losses must be"),
    ({"places": 3}, "places must be a list of which each is a whole number at least 0, got 3"),
    ({"places": "34"}, "places must be"),
    ({"places": [1, -1]}, "places must be"),
    ({"rate": float("inf")}, "rate must be"),
    ({"kind": "adm"}, "kind must be one of adam, descent, got 'adm'. Closest: 'adam'"),
    ({"kind": 3}, "kind must be text, got 3"),
    ({"kind": "a" * 500}, "kind must be one of"),
    ({"size": 1.5}, "size must be text or a whole number, got 1.5"),
    ({"fast": 1}, "fast must be true or false, got 1"),
    ({"thorough": "no"}, "thorough must be true or false"),
]


def settled(**options):
    return settle_parts((Size, Teaching), {"data": [], **options}, "verb")


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_wrong_option_is_one_line_that_says_the_option_the_rule_and_the_value(options, message):
    with pytest.raises(InputError, match=message) as caught:
        settled(**options)

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_what_fits_is_taken_as_it_is():
    options = {"keep": 1, "rank": np.int64(3), "losses": {"task": 1, "logits": 0.5}, "places": [4], "seed": 7,
               "rate": np.float32(0.5), "size": "100MB", "thorough": False, "fast": True}  # fmt: skip

    size, teaching = settled(**options)

    assert {name: getattr(teaching if hasattr(teaching, name) else size, name) for name in options} == options
    assert size.seed == teaching.seed == 7


def test_an_option_that_is_needed_is_asked_for_by_its_meaning():
    with pytest.raises(InputError, match="train needs data: what to train on"):
        settle(Teaching, {}, "train")


def test_a_change_of_settled_options_is_checked_too():
    with pytest.raises(InputError, match="rate must be"):
        replace(settle(Teaching, {"data": []}, "train"), rate=-1.0)


def parser():
    made = argparse.ArgumentParser()
    add_flags(made.add_argument_group("size"), Size, ["keep", "rank", "seed"])
    add_flags(made, Teaching, ["losses", "places", "rate", "kind", "size", "fast"])
    return made


def test_flags_carry_the_meaning_and_the_default_of_their_fields():
    shown = " ".join(parser().format_help().split())

    for expected in (
        "--keep F fraction that stays, such as 40 % --rank N of every matrix that is replaced",
        "--seed N of every draw (default: 0)",
        "--rate F of learning (default: 0.0001)",
        "--kind NAME of the optimizer (one of adam, descent; default: adam)",
        "--size SIZE of the whole (default: by the data)",
    ):
        assert expected in shown


def test_what_is_given_on_the_command_line_is_what_python_would_be_given():
    line = "--keep 0.5 --losses task=1 --losses logits=0.5 --places 3 4 --size 5 --fast"
    found = parser().parse_args(line.split())

    assert given(found, Size) == {"keep": 0.5}
    assert given(found, Teaching) == {
        "losses": {"task": 1.0, "logits": 0.5}, "places": [3, 4], "size": "5", "fast": True,
    }  # fmt: skip
    assert given(parser().parse_args([]), Teaching) == {}


@pytest.mark.parametrize("line", ["--keep nan", "--seed -1", "--losses task=nan", "--kind adm", "--places 1 -2"])
def test_the_command_line_refuses_what_python_refuses(line):
    name, *values = line.split()
    with pytest.raises(InputError, match=f"{name[2:]} must be"):
        parser().parse_args([f"{name}={values[0]}", *values[1:]] if len(values) == 1 else [name, *values])


@pytest.mark.parametrize("name", ["gpu9", "meta", "cuda:99", "", "cpu:cpu"])
def test_a_device_that_cannot_be_computed_on_is_one_line(name):
    with pytest.raises(InputError, match="device must be one of this machine's") as caught:
        usable_device(name)

    assert "\n" not in str(caught.value)
    assert usable_device("cpu").type == "cpu"


def test_help_imports_neither_torch_nor_transformers():
    code = "import sys\nfrom hf_lowrank.cli import main\n"
    code += "try: main(['recover', '--help'])\nexcept SystemExit: print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()

    assert "hf_lowrank.cli.flags.parser" in found
    assert not {"torch", "transformers", "numpy", "huggingface_hub", "safetensors"} & set(found)
