"""Each task scores what can be worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build
from tiny_tokenizers import LETTERS, decoder_tokenizer, encoder_tokenizer
from torch import nn
from transformers.modeling_outputs import (
    CausalLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)

from hf_lowrank.cli.flags.parser import build_parser
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation import TASKS, make_task
from hf_lowrank.evaluation.base import Agreement
from hf_lowrank.evaluation.metrics import AnswerMetric, ClassificationMetric, CorrelationMetric, compute
from hf_lowrank.evaluation.question_answering import Window, best_span
from hf_lowrank.hosts.outputs import Said

ALPHABET = " ".join(LETTERS)
LABELLED = [{"text": "a", "label": 1}]
REGRESSION = {"num_labels": 1}
SEVERAL = {"problem_type": "multi_label_classification"}


class Stub(nn.Module):
    """A model that answers with a function of its inputs."""

    device = torch.device("cpu")

    def __init__(self, answer, **config):
        super().__init__()
        self.answer = answer
        self.config = SimpleNamespace(**config, get_text_config=lambda: SimpleNamespace(max_position_embeddings=1000))

    @property
    def base_model(self):
        return self

    def can_generate(self):
        return False

    def forward(self, input_ids, **others):
        return self.answer(input_ids)


def score(name, model, examples, tokenizer=None, **options):
    task = make_task(name, **options)
    steps = task.steps(tokenizer or encoder_tokenizer(), examples, 2, model)
    return task.compare({"model": model}, steps)["model"]


def zeroed(head):
    model = build(head)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.mark.parametrize(
    ("name", "head", "tokenizer"),
    [("masked-lm", "BertForMaskedLM", encoder_tokenizer), ("causal-lm", "GPT2LMHeadModel", decoder_tokenizer)],
)
def test_perplexity_of_a_uniform_model_is_the_vocabulary_size(name, head, tokenizer):
    model = zeroed(head)

    scores = make_task(name, block_length=16).evaluate(model, tokenizer(), [ALPHABET] * 3, batch_size=2)

    assert scores["perplexity"] == pytest.approx(model.config.vocab_size)


def successor(input_ids):
    """Says with odds of 3 to 1 that the next token has the next number."""
    vocabulary = torch.zeros(*input_ids.shape, 40)
    odds = torch.full((*input_ids.shape, 1), math.log(3 * 39))
    return CausalLMOutput(logits=vocabulary.scatter(-1, input_ids[..., None] + 1, odds))


@pytest.mark.parametrize("stride", [None, 1, 2, 3, 4])
def test_a_causal_model_is_scored_on_the_next_token(stride):
    scores = score("causal-lm", Stub(successor), [ALPHABET], block_length=4, stride=stride)

    assert scores["perplexity"] == pytest.approx(4 / 3)


@pytest.mark.parametrize(("stride", "scored"), [(4, 6 * 3), (2, 25), (1, 25), (3, 3 + 7 * 3)])
def test_overlapping_windows_score_every_token_once(stride, scored):
    steps = make_task("causal-lm", block_length=4, stride=stride).steps(
        encoder_tokenizer(), [ALPHABET], 5, Stub(successor)
    )

    targets = torch.cat([step.targets for step in steps]).tolist()
    assert len(targets) == scored
    assert len(set(targets)) == scored
    if stride < 4:
        assert targets == list(range(5, 5 + scored))


def test_masking_follows_the_recipe():
    tokenizer = encoder_tokenizer()
    steps = make_task("masked-lm", block_length=64).steps(tokenizer, [ALPHABET] * 800, 50, Stub(None))

    inputs, labels = (torch.cat([step.inputs[name] for step in steps]) for name in ("input_ids", "labels"))
    chosen = labels != -100
    kept, hidden = inputs[chosen] == labels[chosen], inputs[chosen] == tokenizer.mask_token_id
    assert inputs.shape[1] == 64
    assert not chosen[:, [0, -1]].any()  # [CLS] and [SEP]
    assert float(chosen[:, 1:-1].float().mean()) == pytest.approx(0.15, abs=0.01)
    assert float(hidden.float().mean()) == pytest.approx(0.8, abs=0.03)
    assert float(kept.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert (inputs[~chosen] != tokenizer.mask_token_id).all()


def test_masks_depend_on_the_seed_alone():
    first, again, other = (
        torch.cat(
            [step.targets for step in make_task("masked-lm", seed=seed).steps(encoder_tokenizer(), texts, n, model)]
        )
        for seed, n, model, texts in (
            (0, 2, build("BertForMaskedLM"), [ALPHABET] * 30),
            (0, 3, build("BertForMaskedLM", seed=1), [ALPHABET] * 30),
            (1, 2, build("BertForMaskedLM"), [ALPHABET] * 30),
        )
    )

    assert first.tolist() == again.tolist() != other.tolist()


def by_first_letter(input_ids):
    """Class 0 for texts that begin with `a`, class 1 for `b`, and so on."""
    return SequenceClassifierOutput(logits=torch.nn.functional.one_hot(input_ids[:, 1] - 4, 3).float())


def test_a_classifier_is_scored_by_its_labels():
    rows = [{"text": text, "label": label} for text, label in [("a x", 0), ("b", "Second"), ("c", 2.0), ("a", "1")]]
    model = Stub(by_first_letter, num_labels=3, label2id={"FIRST": 0, "SECOND": 1, "THIRD": 2})

    scores = score("text-classification", model, rows)

    assert scores["accuracy"] == 0.75
    assert scores["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_binary_scores_are_those_of_the_confusion_matrix():
    scores = compute(ClassificationMetric, [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], average="binary")

    assert scores["accuracy"] == 0.6
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["matthews"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


@pytest.mark.parametrize("labels", [[1, 2, 3], ["0.5", "1.0", "9"]])
def test_a_regression_is_scored_by_its_numbers(labels):
    model = Stub(lambda ids: SequenceClassifierOutput(logits=(ids[:, 1:2] - 4).float()), num_labels=1)

    scores = score("text-regression", model, [{"text": t, "label": n} for t, n in zip("abc", labels, strict=True)])

    assert scores["spearman"] == pytest.approx(1)
    assert (scores["pearson"] == pytest.approx(1)) is (labels == [1, 2, 3])


@pytest.mark.parametrize("names", [("sentence1", "sentence2"), ("query", "passage")])
def test_pairs_are_read_together(names):
    model = Stub(by_first_letter, num_labels=3, label2id={})
    task = make_task("text-classification")

    (step,) = task.steps(encoder_tokenizer(), [{names[0]: "a", names[1]: "b", "label": 0}], 1, model)

    assert step.inputs["input_ids"].tolist() == [[1, 4, 2, 5, 2]]


def test_ranks_and_their_ties_are_exact():
    assert compute(CorrelationMetric, [1.0, 2.0, 3.0], [1.0, 3.0, 2.0])["spearman"] == pytest.approx(0.5)
    assert compute(CorrelationMetric, [1.0, 2.0, 8.0], [0.0, 1.0, 2.0])["spearman"] == pytest.approx(1)
    assert compute(CorrelationMetric, [1.0, 2.0, 3.0], [0.0, 0.0, 1.0])["spearman"] == pytest.approx(math.sqrt(0.75))


def test_similarity_is_the_cosine_of_means_without_padding():
    vectors = torch.tensor([[3.0, -7.0]] + [[0.0, 0.0]] * 3 + [[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    model = Stub(lambda ids: SimpleNamespace(last_hidden_state=vectors[ids]))
    pairs = [("a", "c", 0), ("a", "b", 1.5), ("a a a", "a b", 2), ("a b", "b a a", 4), ("a", "a a", 5)]
    rows = [dict(zip(("sentence1", "sentence2", "score"), pair, strict=True)) for pair in pairs]

    assert score("similarity", model, rows)["spearman"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "golds", "f1", "exact"),
    [
        ("The Cat!", ["cat"], 1, 1),
        ("black cat", ["cat", "dog"], 2 / 3, 0),
        ("dog", ["cat"], 0, 0),
        ("", ["the"], 1, 1),
        ("cat cat", ["cat"], 2 / 3, 0),
    ],
)
def test_answers_are_compared_as_squad_does(given, golds, f1, exact):
    assert compute(AnswerMetric, [given], [golds]) == pytest.approx({"f1": f1, "exact_match": exact})


def test_a_span_is_inside_the_context_in_order_and_short():
    window = Window(0, "x y z", ["y"], [None, (0, 1), (2, 3), (4, 5)])
    start, end = torch.tensor([9.0, 0, 1, 5]), torch.tensor([9.0, 4, 3, 2])

    assert best_span(start, end, window, 3) == (7, "z")
    assert best_span(start - torch.tensor([0, 0, 0, 9.0]), end, window, 3) == (4, "x")
    assert best_span(torch.tensor([0, 5.0, 0, 0]), torch.tensor([0.0, 0, 0, 5]), window, 2) == (5, "x")


def finds_z(input_ids):
    hit = (input_ids == 4 + LETTERS.index("z")).float() * 5
    return QuestionAnsweringModelOutput(start_logits=hit, end_logits=hit)


def test_an_answer_is_found_in_any_window_of_a_long_context():
    context = " ".join("bcdefghijk" * 4) + " z " + ALPHABET.removesuffix(" z")
    flat = {"question": "z", "context": context, "answers": {"text": ["z"], "answer_start": [80]}}
    nested = {
        "paragraphs": [{"context": context, "qas": [{"question": "z", "answers": [{"text": "Z"}, {"text": "y"}]}]}]
    }

    for rows in ([flat] * 3, [nested]):
        scores = score("question-answering", Stub(finds_z), rows, max_seq_length=16)

        assert scores == {"f1": 1, "exact_match": 1, "examples": len(rows)}


def test_agreement_is_the_mean_divergence():
    agreement = Agreement()
    half, third = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([[1 / 3, 2 / 3], [0.75, 0.25]]).log()

    agreement.add(Said("distribution", third), Said("distribution", half))

    first = 0.5 * math.log(1.5) + 0.5 * math.log(0.75)
    second = 0.5 * math.log(3)
    assert agreement.result()["kl_from_dense"] == pytest.approx((first + second) / 2)
    assert agreement.result()["top1_agreement"] == 0


def test_embeddings_agree_by_their_cosine():
    agreement = Agreement()

    agreement.add(Said("embedding", torch.tensor([[0.6, 0.8], [1.0, 0.0]])), Said("embedding", torch.eye(2)[[0, 0]]))

    assert agreement.result() == {"cosine_to_dense": pytest.approx(0.8)}


def test_numbers_agree_by_error_and_correlation():
    agreement = Agreement()

    for found, wanted in (([1.0, 2.0], [2.0, 3.0]), ([3.0], [4.0])):
        agreement.add(Said("number", torch.tensor(found)[:, None]), Said("number", torch.tensor(wanted)[:, None]))

    assert agreement.result() == {"rmse_from_dense": pytest.approx(1), "pearson_to_dense": pytest.approx(1)}


def test_a_number_that_never_varies_agrees_with_nothing():
    agreement = Agreement()

    agreement.add(Said("number", torch.ones(4, 1)), Said("number", torch.arange(4.0)[:, None]))

    assert agreement.result()["pearson_to_dense"] == 0


def test_labels_agree_one_by_one():
    agreement = Agreement()

    agreement.add(Said("labels", torch.tensor([[1.0, -1.0], [0.5, 0.5]])), Said("labels", torch.ones(2, 2)))

    assert agreement.result()["label_agreement"] == 0.75
    assert agreement.result()["kl_from_dense"] > 0


def help_of_evaluate():
    """What `evaluate --help` says."""
    commands = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    return commands.choices["evaluate"].format_help()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_it_is(name):
    task = make_task(name)

    assert task.name == name
    assert TASKS[name].data
    assert f"  {name} " in help_of_evaluate()
    assert task.needs
    assert isinstance(task.higher_is_better, bool)


@pytest.mark.parametrize(
    ("name", "head", "rows", "options", "message"),
    [
        ("text-regression", "BertForSequenceClassification", LABELLED, {}, "needs a head of one number"),
        ("text-regression", REGRESSION, ["a"], {}, "text-regression needs labels: set label_column"),
        ("text-regression", REGRESSION, [{"text": "a", "label": "x"}], {}, "'label' must hold numbers, got 'x'"),
        ("text-classification", REGRESSION, LABELLED, {}, "this head says numbers. Use text-regression"),
        ("text-classification", SEVERAL, LABELLED, {}, "this head can say several"),
        ("mlm", "BertModel", [], {}, "task must be one of masked-lm, .*, got 'mlm'"),
        ("masked-lm", "BertModel", [], {"block_size": 3}, "no option 'block_size'. Closest: 'block_length'"),
        ("masked-lm", "BertModel", ["a"], {}, "masked-lm cannot use the head of BertModel"),
        ("causal-lm", "BertForMaskedLM", ["a"], {}, "causal-lm cannot use the head of BertForMaskedLM"),
        ("masked-lm", "BertForMaskedLM", ["a b"], {"block_length": 9}, "has 2 tokens, and at least 7 are needed"),
        (
            "causal-lm",
            "GPT2LMHeadModel",
            ["a b"],
            {"stride": 99},
            "stride must be between 1 and block_length=38, got 99",
        ),
        ("text-classification", "BertForSequenceClassification", ["a"], {}, "no column 'label'.*set label_column"),
        ("similarity", "BertModel", [{"sentence1": "a"}], {}, "no column 'sentence2'; there are: sentence1. Set text"),
        ("question-answering", "BertForQuestionAnswering", ["a"], {}, "no column 'question'; there are: text"),
        (
            "text-classification",
            "BertForSequenceClassification",
            [{"text": "a", "label": "good"}],
            {},
            "Label 'good' is none of the model's: 0, 1, label_0, label_1",
        ),
    ],
)
def test_what_does_not_fit_gets_one_clear_line(name, head, rows, options, message):
    model = build(head) if isinstance(head, str) else build("BertForSequenceClassification", **head)
    with pytest.raises(InputError, match=message) as caught:
        make_task(name, **options).evaluate(model, encoder_tokenizer(), rows)

    assert "\n" not in str(caught.value)


def test_a_model_without_mask_token_is_refused():
    with pytest.raises(InputError, match="needs a mask token"):
        make_task("masked-lm").evaluate(build("BertForMaskedLM"), decoder_tokenizer(), ["a"])


def test_no_tokenizer_is_one_clear_line():
    for name in TASKS:
        with pytest.raises(InputError, match="tokenizer"):
            make_task(name).steps(None, ["a"], 1, build("BertForSequenceClassification"))
