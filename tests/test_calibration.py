"""What a model is watched on: real text where there is some, masked for a masked head, synthetic tokens otherwise."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny_models import VOCABULARY, build
from tiny_tokenizers import encoder_tokenizer

from hf_lowrank import InputError, compress
from hf_lowrank.data.calibration import Text, is_masked_lm, make_calibration, mask_tokens, varied_lengths
from hf_lowrank.hosts.outputs import IGNORED_LABEL
from hf_lowrank.training.features import PaddingCollator, make_features

SETTINGS = Text(num_samples=32, max_seq_length=24, batch_size=4)


def ready_batches(count=6, length=12):
    return [
        {"input_ids": torch.randint(3, VOCABULARY, (4, length)), "attention_mask": torch.ones(4, length).long()}
        for _ in range(count)
    ]


def test_synthetic_tokens_are_the_same_for_the_same_seed():
    model = build("GPT2LMHeadModel")

    first, second = (make_calibration(model, None, None, SETTINGS) for _ in range(2))

    for ours, theirs in zip(first.batches, second.batches, strict=True):
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_synthetic_tokens_follow_the_law_of_zipf():
    batches = make_calibration(build("GPT2LMHeadModel"), None, None, SETTINGS).batches
    counts = torch.bincount(torch.cat([batch["input_ids"].flatten() for batch in batches]), minlength=VOCABULARY)

    assert counts[:10].sum() > 1.5 * counts[-10:].sum()


def test_ranks_are_measured_on_text_the_statistics_were_not_made_from():
    calibration = make_calibration(build("BertModel"), ready_batches(8), None, SETTINGS)

    seen = {batch["input_ids"].numpy().tobytes() for batch in calibration.batches}
    assert (len(calibration.batches), len(calibration.probes)) == (7, 1)
    assert not seen & {batch["input_ids"].numpy().tobytes() for batch in calibration.probes}


@pytest.mark.parametrize(
    ("head", "expected"),
    [("BertForMaskedLM", True), ("BertForPreTraining", True), ("BertModel", False), ("GPT2LMHeadModel", False)],
)
def test_only_masked_heads_see_masked_text(head, expected):
    model = build(head)

    assert is_masked_lm(model) == expected
    assert ("labels" in make_calibration(model, ready_batches(), None, SETTINGS).batches[0]) == expected


def test_masking_labels_what_it_hides_and_spares_padding():
    batch = {"input_ids": torch.full((8, 40), 50), "attention_mask": (torch.arange(40) < 30).long().expand(8, -1)}

    (masked,) = mask_tokens([batch], build("BertForMaskedLM"), None, seed=0)
    hidden = masked["labels"] != IGNORED_LABEL

    assert 0.05 < hidden[:, :30].float().mean() < 0.3
    assert not hidden[:, 30:].any()
    assert torch.equal(masked["labels"][hidden], batch["input_ids"][hidden])
    assert torch.equal(masked["input_ids"][~hidden], batch["input_ids"][~hidden])


def test_every_other_text_is_cut_for_an_encoder():
    texts = [" ".join(f"w{i}." for i in range(200))] * 10

    found = varied_lengths(texts, SETTINGS)

    assert [len(text.split()) == 200 for text in found] == [False, True] * 5
    assert all(4 <= len(text.split()) <= 100 for text in found[::2])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no text|empty|holds nothing|no rows"),
        (ready_batches(1), "two batches at least"),
        (
            [{"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 3).long()}] * 2,
            "6 tokens, and at least 36",
        ),
        (["some text"] * 8, "tokenizer"),
    ],
)
def test_text_that_will_not_do_is_one_clear_line(source, message):
    with pytest.raises(InputError, match=message) as caught:
        compress(build("BertModel"), keep_targets=0.5, calibration=source)

    assert "\n" not in str(caught.value)


PAIRS = [{"sentence1": f"a {one}", "sentence2": f"b b {two}"} for one, two in product("cdefgh", repeat=2)]
WAYS = {
    "compress": lambda model, rows: make_calibration(model, rows, encoder_tokenizer(), SETTINGS).batches[0],
    "recover": lambda model, rows: PaddingCollator()(make_features(model, encoder_tokenizer(), rows)[:8]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("head", "together"),
    [("BertForSequenceClassification", True), ("BertForNextSentencePrediction", True), ("BertModel", False),
     ("BertForMaskedLM", False), ("GPT2ForSequenceClassification", True)],
)  # fmt: skip
def test_a_head_that_judges_pairs_is_shown_pairs_and_any_other_each_text_alone(way, head, together):
    batch = WAYS[way](build(head), PAIRS)

    first, second = (encoder_tokenizer().convert_tokens_to_ids(letter) for letter in "ab")
    rows = [set(ids.tolist()) for ids in batch["input_ids"]]
    assert all({first, second} <= row for row in rows) is together
    assert any(first in row or second in row for row in rows)


def test_a_column_that_is_named_is_the_text():
    text = replace(SETTINGS, text_column="sentence2")

    batches = make_calibration(build("BertForSequenceClassification"), PAIRS, encoder_tokenizer(), text).batches

    assert not any((batch["input_ids"] == encoder_tokenizer().convert_tokens_to_ids("a")).any() for batch in batches)
