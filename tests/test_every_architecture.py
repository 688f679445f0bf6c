"""Every architecture that transformers lists: compressed, reloaded and computing the same, or refused in one line.

    python tests/test_every_architecture.py [--keep FILE] [MODEL_TYPE ...]

goes the whole path with all of them, or those named, and writes docs/architectures.md; `make test` tries a few. What
was found is kept in FILE, with which a run that was killed goes on.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import conftest  # noqa: F401  (the settings of every test, where this file is run by itself)
import pytest
import torch
import transformers
from every_architecture import DONE, WAYS, Outcome, reloaded_, try_architecture
from shrunk import head_of
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
_AT_ONCE = 24  # architectures whose folders are loaded in one process

_ABOUT = """# Architectures

What becomes of architectures that transformers lists, tiny and with random numbers: saved, loaded from disk,
compressed at `keep_targets=0.5`, saved, loaded in a process without hf_lowrank and compared output by output,
decompressed, and gone on with. Written by `python tests/test_every_architecture.py`, with transformers {transformers}
and torch {torch}.

Of {built} architectures {svd} come out right with `svd`, {default} of them with the default method too ({synthetic}
without data, {inputs} with, where that was tried); {verified} were verified and {recovered} recovered as well;
{refused} are refused something, in one line that says why. *Replaced* is the share of the parameters of two and more
dimensions in the blocks that became small; every report names the others and why. An empty cell was not tried.

| model type | class | replaced by svd | by default | svd | no data | data | generates | what is refused |
|---|---|---|---|---|---|---|---|---|"""

# One of each kind of host: what it takes beside blocks of nn.Linear.
SAMPLE = {
    "falcon": "a linear layer of its own class",
    "falcon_h1": "buffers that a parent makes for its children",
    "encoder-decoder": "two models in one",
    "apertus": "a constructor that asks for the type of the numbers",
    "convnext": "convolutions, and images",
    "wav2vec2": "sounds",
    "mamba": "a layer whose weight the host reads",
    "xlnet": "attention that is no linear layer",
    "llava": "a model for images inside one for text",
    "funnel": "blocks in a list of lists",
}
_BY_DEFAULT = {"encoder-decoder", "funnel"}  # besides the plain SVD


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Model type -> outcome."""
    return tried(SAMPLE, tmp_path_factory.mktemp("architectures"), is_thorough=False, ways_of=_ways)


def _ways(model_type):
    return ("svd", "inputs") if model_type in _BY_DEFAULT else ("svd",)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_every_step_is_done_or_refused_in_one_line(outcomes, model_type):
    outcome = outcomes[model_type]

    assert outcome.faults == {}
    for way in _ways(model_type):
        assert outcome.is_right(way), outcome.steps
        assert outcome.replaced[way] > 0


def test_the_page_is_of_many_architectures_and_none_of_them_fails_otherwise_than_by_a_refusal():
    text = PAGE.read_text(encoding="utf-8")

    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) >= 140
    assert not [row for row in rows if any(word in row for word in ("crash: ", "differs: ", "silent: "))]


def tried(model_types, root, is_thorough=True, ways_of=lambda one: tuple(WAYS)):
    """Model type -> outcome; all are reloaded by one process."""
    outcomes = {}
    for model_type in model_types:
        outcomes[model_type] = try_architecture(model_type, root / model_type, ways_of(model_type), is_thorough)
    reloaded_(outcomes, root)
    return outcomes


def page(outcomes):
    """The table, one architecture a row."""
    built = sorted((one for one in outcomes if one.is_built), key=lambda one: one.model_type)
    by_default = ("synthetic", "inputs")
    counts = {way: sum(one.is_right(way) for one in built) for way in WAYS}
    counts["default"] = sum(one.is_right("svd") and any(map(one.is_right, by_default)) for one in built)
    counts["refused"] = sum(any(said.startswith("refused") for said in one.steps.values()) for one in built)
    for name, step in {"verified": "verify", "recovered": "recover"}.items():
        counts[name] = sum(one.steps.get(step) == DONE for one in built)
    releases = {"transformers": transformers.__version__, "torch": torch.__version__}
    return "\n".join([_ABOUT.format(**releases, built=len(built), **counts), *map(_row, built), ""])


def _row(one):
    tried = {way: any(step.startswith(f"{way} ") for step in one.steps) for way in WAYS}
    marks = ["" if not tried[way] else "yes" if one.is_right(way) else "no" for way in WAYS]
    generates = {DONE: "yes", None: ""}.get(one.steps.get("generate"), "no")
    wrong = {said.partition(": ")[2] if said.startswith("refused") else said for said in _refusals(one)}
    default = one.replaced.get("inputs", one.replaced.get("synthetic"))
    parts = [f"`{one.model_type}`", one.head, _percent(one.replaced.get("svd")), _percent(default), *marks, generates]
    return f"| {' | '.join(parts)} | {'; '.join(sorted(wrong)).replace('|', '/')} |"


def _refusals(one):
    return [said for step, said in one.steps.items() if said != DONE and step != "build"]


def _percent(share):
    return "" if share is None else f"{share:.0%}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--keep", type=Path, help="file of what was found before, which is gone on with")
    arguments = parser.parse_args()
    kept = json.loads(arguments.keep.read_text()) if arguments.keep and arguments.keep.is_file() else {}
    every = [one for one in CONFIG_MAPPING_NAMES if head_of(one)]
    left = arguments.types or [one for one in every if one not in kept]
    for start in range(0, len(left), _AT_ONCE):
        root = Path(tempfile.mkdtemp(prefix="architectures-"))
        try:
            for model_type, outcome in tried(left[start : start + _AT_ONCE], root).items():
                kept[model_type] = asdict(outcome)
                sys.stdout.write(f"{_row(outcome)}\n")
        finally:
            shutil.rmtree(root)
        if arguments.keep:
            arguments.keep.write_text(json.dumps(kept))
    if set(every) <= set(kept):
        PAGE.write_text(page([Outcome(**one) for one in kept.values()]), encoding="utf-8")


if __name__ == "__main__":
    main()
