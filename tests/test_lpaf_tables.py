"""The tables of the pruning benchmark: of finished cells alone, over seeds and tasks."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from hf_lowrank.sharing.cards.card import KEPT_LINE

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("lpaf_tables")


def cell(what, accuracy, seed=0, keep=0.5):
    return {"table": "compressed", "what": what, "keep": keep, "seed": seed, "found": {"accuracy": accuracy}}


def dense(accuracy):
    return {"table": "dense", "found": {"accuracy": accuracy}}


def test_a_row_has_mean_and_deviation_of_seeds_and_the_mean_of_tasks(tables):
    tasks = {"A": [dense(0.9), cell("svd", 0.7), cell("svd", 0.8, seed=1)], "B": [dense(0.8), cell("svd", 0.65)]}

    lines = list(tables.Tables(tasks).lines())

    assert lines[0].endswith("over seeds 0, 1. Dense: A 90.00, B 80.00.")
    assert lines[-1] == "| 0.5 | svd | 75.00 ± 7.07 | 65.00 (seeds: 1) | 70.00 |"


def test_the_mean_of_tasks_deviates_as_the_means_of_seeds_do(tables):
    tasks = {
        "A": [dense(0.9), cell("svd", 0.7), cell("svd", 0.8, seed=1)],
        "B": [dense(0.8), cell("svd", 0.8, seed=1), cell("svd", 0.5)],
    }

    assert list(tables.Tables(tasks).lines())[-1].endswith(" | 70.00 ± 14.14 |")  # of 60 and 80


def test_there_is_no_mean_where_a_task_is_missing(tables):
    tasks = {"A": [dense(0.9), cell("svd", 0.7), cell("fwsvd", 0.7)], "B": [dense(0.8), cell("svd", 0.6)]}

    assert list(tables.Tables(tasks).lines())[-1] == "| 0.5 | fwsvd | 70.00 |  |  |"


def test_what_recover_closed_is_of_what_was_lost(tables):
    found = {"before": 0.6, "after": 0.85, "minutes": 2.0}
    cells = [dense(0.9), {"table": "recovered", "what": "svd", "keep": 0.5, "seed": 0, "found": found}]

    assert "| 60.00, to 85.00, 83% closed, minutes 2.00 |" in list(tables.Tables({"A": cells}).lines())[-1]


def test_a_finished_cell_is_not_made_again(tables, tmp_path):
    def fails():
        raise AssertionError

    key = {"table": "compressed", "what": "svd", "keep": 0.5, "seed": 0}
    tables.Cells(tmp_path, {"epochs": 3}).get(lambda: {"accuracy": 0.5}, **key)

    assert tables.Cells(tmp_path, {"epochs": 3}).get(fails, **key) == {"accuracy": 0.5}
    with pytest.raises(SystemExit, match=r"holds cells of {'epochs': 3}, not of {'epochs': 1}"):
        tables.Cells(tmp_path, {"epochs": 1})


def test_a_card_keeps_them_once(tables, tmp_path, monkeypatch):
    (tmp_path / "cells.json").write_text(json.dumps({"options": {}, "cells": [dense(0.9), cell("svd", 0.7)]}))
    card = tmp_path / "README.md"
    card.write_text(f"# Model\n{KEPT_LINE}\nold\n")
    monkeypatch.setattr(sys, "argv", ["lpaf_tables.py", f"A={tmp_path}", "--card", str(tmp_path)])

    tables.main()
    tables.main()

    head, kept = card.read_text().split(KEPT_LINE)
    assert head == "# Model\n"
    assert kept.count("| 0.5 | svd | 70.00 |") == 1
    assert "old" not in kept


def test_a_card_of_somebody_else_is_left(tables, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")

    with pytest.raises(SystemExit, match="was not written by hf_lowrank"):
        tables.keep_in_card(tmp_path, ["| |"])

    assert (tmp_path / "README.md").read_text() == "# Mine\n"
