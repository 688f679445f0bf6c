"""Latency is measured fairly, and embeddings are means over real tokens."""

from types import SimpleNamespace

import pytest
import torch
from transformers import BatchEncoding, BertConfig, BertForMultipleChoice, BertModel

from hf_lowrank.hosts import latency as evaluation
from hf_lowrank.hosts.latency import embed_sentences, mean_cosine, measure_latency, typical_length

CONFIG = BertConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=50,
    max_position_embeddings=32,
)


@pytest.fixture
def model():
    return BertModel(CONFIG).eval()


def tokenize(sentences, **kwargs):
    """Each letter a token, padded to the longest sentence."""
    rows = [[ord(letter) % 49 + 1 for letter in sentence] for sentence in sentences]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids > 0).long()})


def test_models_take_turns_and_warm_up_rounds_are_not_counted(monkeypatch):
    calls = []
    pretended = {"dense": 3.0, "small": 1.5}
    models = {name: torch.nn.Linear(1, 1) for name in pretended}
    names = {id(model): name for name, model in models.items()}

    def time_forward(model, inputs):
        calls.append(names[id(model)])
        return pretended[calls[-1]] * (100 if len(calls) <= 4 else 1)

    monkeypatch.setattr(evaluation, "typical_inputs", lambda *args: {})
    monkeypatch.setattr(evaluation, "_time_forward", time_forward)
    latency = measure_latency(models, rounds=1)

    assert calls == ["dense", "small"] * 3
    assert (latency["dense"].median, latency["small"].median) == (3.0, 1.5)
    assert (latency["dense"].speed_up, latency["small"].speed_up) == (1.0, 2.0)


def test_speed_up_is_the_median_of_paired_ratios():
    latency = evaluation._summarize([1.0, 1.0, 4.0], [2.0, 6.0, 4.0])

    assert latency.speed_up == 2.0
    assert (latency.lower_quartile, latency.median, latency.upper_quartile) == (1.0, 1.0, 2.5)


@pytest.mark.parametrize("model_class", [BertModel, BertForMultipleChoice])
def test_measuring_leaves_the_training_mode_as_it_was(model_class):
    model = model_class(CONFIG).train()

    latency = measure_latency({"only": model}, batch_size=2, sequence_length=4, rounds=1)

    assert model.training
    assert latency["only"].median > 0


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="at least one model and one round, got 0 and 9"):
        measure_latency({})


@pytest.mark.parametrize(("config", "length"), [({"max_position_embeddings": 32}, 16), ({}, 128)])
def test_length_fits_the_positions_of_the_model(config, length):
    text = SimpleNamespace(**config)

    assert typical_length(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))) == length


def test_padding_does_not_change_an_embedding(model):
    alone = embed_sentences(model, tokenize, ["cat"])
    padded = embed_sentences(model, tokenize, ["cat", "a longer sentence"])[:1]

    torch.testing.assert_close(alone, padded)


def test_mean_cosine_of_a_model_with_itself_is_one_and_with_another_less(model):
    other = BertModel(CONFIG).eval()

    assert mean_cosine(model, model, tokenize, ["cat", "dog"]) == pytest.approx(1.0)
    assert mean_cosine(model, other, tokenize, ["cat", "dog"]) < 0.99
