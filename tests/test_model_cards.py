"""The cards that are shown are those their stored reports render to, and their numbers those of the reports."""

import json
import re
from pathlib import Path

import pytest
from every_method import SOLVERS, TENSOR_METHODS
from huggingface_hub import ModelCard

from hf_lowrank.records.report import CompressionReport
from hf_lowrank.sharing.cards.card import KEPT_LINE, REPORT_FILE
from hf_lowrank.sharing.record import card_text

FOLDER = Path(__file__).resolve().parents[1] / "model_cards"
CARDS = sorted(path.parent for path in FOLDER.glob(f"*/{REPORT_FILE}"))
each_card = pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)


def report_of(card):
    return CompressionReport.from_dict(json.loads((card / REPORT_FILE).read_text(encoding="utf-8")))


@each_card
def test_a_card_is_what_its_report_renders_to(card):
    assert (card / "README.md").read_text(encoding="utf-8") == card_text(card, report_of(card), card.name)


@each_card
def test_a_card_is_of_a_real_run(card):
    report, data = report_of(card), ModelCard.load(card / "README.md").data

    assert report.latency is not None
    assert all(entry.dense_scores for entry in report.quality)
    assert report.quality
    command = report.provenance["command"].removeprefix("ACCELERATE_MIXED_PRECISION=bf16 ")
    assert command.startswith(("hf-lowrank ", "python examples/"))
    assert (data.base_model, data.license) == (report.origin.base_model, report.origin.license)
    assert data.license is not None or report.origin.base_model is None  # unknown stays unknown


def test_a_table_below_a_card_is_that_of_the_results():
    results = (FOLDER.parent / "docs/results.md").read_text(encoding="utf-8")
    kept = [(card / "README.md").read_text(encoding="utf-8").partition(KEPT_LINE)[2] for card in CARDS]
    rows = [line for text in kept for line in text.splitlines() if re.match(r"\| \d.*[^ |] \|$", line)]

    assert rows
    assert [row for row in rows if row not in results] == []


def test_every_method_has_a_card():
    """But the presets, which are another method at given ranks."""
    methods = {*SOLVERS, *(name for name, method in TENSOR_METHODS.items() if method.ranks is None)}

    assert {report_of(card).provenance["settings"]["method"] for card in CARDS} >= methods
