"""A score says on how many examples it stands and how sure its change from dense is; what is scored is drawn."""

import io
import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console
from tiny_architectures import build_architecture
from tiny_media import IMAGES, image_processor
from tiny_models import build
from tiny_tokenizers import LETTERS, encoder_tokenizer

from hf_lowrank import compare, compress, evaluate
from hf_lowrank.evaluation import TASKS, make_task
from hf_lowrank.evaluation.perplexity import Perplexity
from hf_lowrank.records.wording import verdict
from hf_lowrank.sharing.recorded_evaluation import record_evaluation
from hf_lowrank.sharing.saving import save_folder
from hf_lowrank.studies.plots import save_page

TEXTS = [" ".join(LETTERS[number:]) for number in range(25)]
PAIRS = [{"sentence1": one, "sentence2": two, "score": i % 7} for i, (one, two) in enumerate(pairwise(TEXTS))]
LABELLED = [{"text": text, "label": number % 2} for number, text in enumerate(TEXTS)]
NUMBERED = [{"text": text, "label": number / 3} for number, text in enumerate(TEXTS)]
TRANSLATED = [{"source": one, "target": two} for one, two in pairwise(TEXTS)]
QUESTIONS = [{"question": "b", "context": text, "answers": {"text": [text.split()[0]]}} for text in TEXTS]
CLASSIFIER = "BertForSequenceClassification"

# task -> dense model, data, options, examples there are
CASES = {
    "masked-lm": (lambda: build("BertForMaskedLM"), TEXTS * 2, {"block_length": 16}, 50),
    "causal-lm": (lambda: build("GPT2LMHeadModel"), TEXTS * 2, {"block_length": 16}, 43),
    "text-classification": (lambda: build(CLASSIFIER), LABELLED, {}, 25),
    "text-regression": (lambda: build(CLASSIFIER, num_labels=1), NUMBERED, {}, 25),
    "question-answering": (lambda: build("BertForQuestionAnswering"), QUESTIONS, {"max_seq_length": 16}, 25),
    "similarity": (lambda: build("BertModel"), PAIRS, {}, 24),
    "seq2seq-lm": (lambda: build_architecture("BartForConditionalGeneration"), TRANSLATED, {}, 24),
    "image-classification": (
        lambda: build_architecture("ViTForImageClassification"),
        IMAGES,
        {"tokenizer": image_processor()},
        20,
    ),
    "agreement": (lambda: build(CLASSIFIER), TEXTS, {}, 25),
}


@pytest.fixture(params=CASES)
def case(request):
    make, data, options, number = CASES[request.param]
    dense = make()
    found = evaluate(
        compress(dense, rank=2, method="svd"),
        data,
        request.param,
        dense=dense,
        cost=False,
        **{"tokenizer": encoder_tokenizer(), **options},
    )
    return found, number


def test_every_task_has_a_case():
    assert CASES.keys() == TASKS.keys()


def test_a_score_says_on_how_many_examples_it_stands_and_how_far_it_may_be_from_dense(case):
    found, number = case
    scores = found.model.scores

    assert scores["examples"] == found.dense.scores["examples"] == number
    assert "change_low" not in found.dense.scores
    assert any(name.endswith(("from_dense", "to_dense")) for name in scores)
    if found.task == "agreement":  # is the comparison with dense, and has no other
        assert found.to_dict()["verdict"] == ""
        return
    relative = found.metric == "perplexity"
    ours, theirs = scores[found.metric], found.dense.scores[found.metric]
    change = ours / theirs - 1 if relative else ours - theirs
    assert scores["change_low"] <= change <= scores["change_high"]
    assert found.to_dict()["verdict"] in ("better", "worse", "unclear")
    console = Console(width=150, file=io.StringIO())
    console.print(found.to_table())
    assert f"change of {found.metric}, 95 % interval" in console.file.getvalue()
    assert f", {found.to_dict()['verdict']}" in console.file.getvalue()


def test_the_interval_is_that_of_paired_draws_of_examples():
    """Of the logarithm of a ratio of perplexities, that of a mean: within 1.96 standard errors."""
    torch.manual_seed(0)
    dense, ours = (Perplexity() for _ in range(2))
    common, step = torch.randn(400), 0.02 + 0.1 * torch.randn(400)
    for score, losses in ((dense, 3 + common), (ours, 3 + common + step)):
        score._examples.append(torch.stack([losses, torch.ones(400)], dim=1))

    found = ours.interval(dense)

    error = 1.96 * float(step.std()) / 20
    expected = [math.expm1(float(step.mean()) + sign * error) for sign in (-1, 1)]
    assert [found["change_low"], found["change_high"]] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("low", "high", "examples", "higher_is_better", "said"),
    [
        (0.1, 0.2, 100, True, "better"),
        (0.1, 0.2, 100, False, "worse"),
        (-0.2, -0.1, 100, True, "worse"),
        (-0.2, -0.1, 100, False, "better"),
        (-0.1, 0.2, 100, True, "unclear"),
        (0.0, 0.0, 100, True, "unclear"),
        (0.1, 0.2, 19, True, "unclear"),
    ],
)
def test_a_verdict_is_given_where_the_interval_and_the_examples_allow_one(low, high, examples, higher_is_better, said):
    scores = {"examples": examples, "change_low": low, "change_high": high}

    assert verdict(scores, higher_is_better) == said
    assert verdict({"examples": examples}, higher_is_better) == ""


@pytest.mark.parametrize(("task", "head"), [("masked-lm", "BertForMaskedLM"), ("causal-lm", "GPT2LMHeadModel")])
def test_blocks_of_a_language_model_are_drawn_from_the_whole_text(task, head):
    model, tokenizer = build(head), encoder_tokenizer()

    def blocks(**options):
        steps = make_task(task, block_length=8, **options).steps(tokenizer, TEXTS, 4, model)
        labels = torch.cat([step.inputs["labels"] for step in steps])
        inputs = torch.cat([step.inputs["input_ids"] for step in steps])
        return torch.where(labels == -100, inputs, labels).tolist() if task == "masked-lm" else inputs.tolist()

    whole, first = blocks(), blocks(max_examples=5)

    assert first == blocks(max_examples=5) != blocks(max_examples=5, seed=1)
    assert len(first) == 5
    assert first != whole[:5]
    assert blocks(max_examples=len(whole)) == whole


def test_the_card_says_on_how_many_examples_and_how_sure(tmp_path):
    dense = build("BertForMaskedLM")
    small = compress(dense, rank=2, method="svd")
    save_folder(small, tmp_path / "small")
    options = {"tokenizer": encoder_tokenizer(), "block_length": 16, "max_examples": 30, "cost": False}
    found = evaluate(small, TEXTS * 2, "masked-lm", dense=dense, **options)

    record_evaluation(tmp_path / "small", found, "texts.txt")

    card = (tmp_path / "small/README.md").read_text()
    assert "perplexity, masked-lm on texts.txt, 30 examples" in card
    assert f"{found.model.scores['change_low']:+.1%} to {found.model.scores['change_high']:+.1%})" in card
    assert f", {found.to_dict()['verdict']}; lower is better" in card


def test_a_comparison_says_what_it_is_of_and_how_sure(tmp_path):
    dense = build("BertForMaskedLM", num_hidden_layers=1)
    task = replace(make_task("masked-lm", block_length=16), seed=3)
    calibration = tmp_path / "texts.txt"
    calibration.write_text("\n".join(TEXTS * 6))
    options = {"methods": ["svd", "whitened_svd"], "budgets": [0.5], "tokenizer": encoder_tokenizer(), "seed": 3}

    found = compare(dense, TEXTS * 2, task, calibration=calibration, off_calibration=TEXTS[:5], **options)
    save_page(found, tmp_path / "page.html")

    assert found.about["held-out text"] == "texts, 50 examples"
    assert found.about["off-calibration text"] == "texts, 8 examples"
    assert found.about["calibration"].startswith("texts.txt, ")
    assert found.about["seed"] == "3"
    assert [cell.verdict["off-calibration"] for cell in found.cells] == ["", "unclear", "unclear"]
    cell = found.cells[1]
    assert math.expm1(cell.g["held-out"]) == pytest.approx(
        cell.change["held-out"] / found.cells[0].scores["held-out"]["perplexity"]
    )
    page = (tmp_path / "page.html").read_text()
    assert all(value in page for value in found.about.values())
    assert f"{cell.scores['held-out']['kl_from_dense']:.4f}" in page
    assert json.loads(json.dumps(found.to_dict()))["cells"][1]["verdict"] == cell.verdict
    assert "unclear" in page
