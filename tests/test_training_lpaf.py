"""Prune, factorize, mixed ranks in one call."""

import json
import shutil

import pytest
import tiny_models
import tiny_tokenizers
import torch

from hf_lowrank import InputError, compress, lpaf, make_report
from hf_lowrank.cli import main
from hf_lowrank.sharing.saving import load_compressed

WORDS = ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k", "l", "m", "n", "o", "p"]
ROWS = [{"text": " ".join(WORDS[(i + k) % 16] for k in range(6)), "label": i % 2} for i in range(32)]
OPTIONS = {"keep_targets": 0.4, "prune_epochs": 2, "tune_epochs": 2, "batch_size": 8, "max_seq_length": 16,
           "probability": 0.5}  # fmt: skip


def dense_model(head="BertForSequenceClassification", **config):
    return tiny_models.build(head, vocab_size=30, **config)


def run(model=None, **options):
    tokenizer = options.pop("tokenizer", tiny_tokenizers.encoder_tokenizer())
    return lpaf(model or dense_model(), tokenizer=tokenizer, **{"dataset": ROWS, **OPTIONS, **options})


@pytest.mark.parametrize("method", ["svd", "sparsity_aware_svd", "importance_aware_svd", "two_sided_svd"])
def test_a_plain_compressed_model_of_the_size_asked_for_remains(method, tmp_path):
    dense = dense_model()
    before = {name: value.clone() for name, value in dense.state_dict().items()}

    small = run(dense, method=method, num_calibration_samples=32)
    small.save_pretrained(tmp_path)
    found = small.config.compression["provenance"]["lpaf"]

    assert make_report(small).kept_targets_fraction <= 0.4
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert not any("full_rank" in name or "parametrizations" in name for name in small.state_dict())
    assert found["held_out_loss"]["after"] <= found["held_out_loss"]["before"]
    assert all(one["kept"] == pytest.approx(0.5, abs=0.01) for one in found["ranks_after_pruning"].values())
    inputs = {"input_ids": torch.randint(3, 30, (2, 9))}
    tiny_models.assert_same_function(small, load_compressed(tmp_path), inputs)


@pytest.mark.parametrize(("options", "kept"), [({}, 0.5), ({"keep_targets": 0.7}, 0.7), ({"prune_keep": 0.3}, 0.3)])
def test_pruning_takes_no_more_than_a_half_of_the_entries_or_the_budget_unless_asked_to(options, kept):
    found = run(method="svd", **options).config.compression["provenance"]["lpaf"]

    assert found["prune_keep"] == kept
    assert all(one["kept"] == pytest.approx(kept, abs=0.01) for one in found["ranks_after_pruning"].values())


def test_without_epochs_of_pruning_the_model_is_factorized_as_it_is():
    dense = dense_model()

    small = run(dense, prune_epochs=0, tune_learning_rate=0.0, method="svd")

    expected = compress(dense, method="svd", storage="low_rank", keep_targets=0.4)
    tiny_models.assert_same_function(small, expected, {"input_ids": torch.randint(3, 30, (2, 9))})
    assert small.config.compression["provenance"]["lpaf"]["ranks_after_pruning"] == {}


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_a_regression_is_pruned_and_trained_on_its_numbers(head):
    dense = dense_model(head, num_labels=1, pad_token_id=0)
    data = [{"text": row["text"], "score": f"{index / 8:.2f}"} for index, row in enumerate(ROWS)]

    small = run(dense, dataset=data, label_column="score", method="svd", tune_learning_rate=5e-3)
    found = small.config.compression["provenance"]["lpaf"]

    assert found["losses"]["task"] == 1
    assert found["held_out_loss"]["after"] < found["held_out_loss"]["before"]


def test_it_learns_from_the_model_as_it_was_unless_labels_alone_are_asked_for():
    dense, other = dense_model(), tiny_models.build("BertForSequenceClassification", vocab_size=30, seed=1)
    asked = {"by default": {}, "of another": {"teacher": other}, "labels": {"losses": {"task": 1}}}
    kept = {name: run(dense, **options) for name, options in asked.items()}
    found = {name: small.config.compression["provenance"]["lpaf"] for name, small in kept.items()}
    losses = {name: one["held_out_loss"]["before"] for name, one in found.items()}

    assert found["by default"]["losses"] == {"logits": 1, "hidden": 1, "task": 1}
    assert found["labels"]["losses"] == {"task": 1}
    assert losses["labels"] < losses["by default"] < losses["of another"]


def test_language_models_can_be_pruned_on_their_text():
    texts = [row["text"] for row in ROWS]
    small = run(dense_model("GPT2LMHeadModel"), dataset=texts, tokenizer=tiny_tokenizers.decoder_tokenizer())

    assert small.can_generate()
    assert make_report(small).kept_targets_fraction <= 0.4


@pytest.mark.parametrize(
    ("head", "asked", "rate"),
    [
        ("BertForSequenceClassification", {}, 5e-5),
        ("GPT2LMHeadModel", {}, 5e-4),
        ("GPT2LMHeadModel", {"tune_learning_rate": 0.0}, 0.0),
    ],
)
def test_factors_learn_at_the_rate_that_recovers_such_a_model_unless_another_is_asked_for(head, asked, rate):
    is_bert = head.startswith("Bert")
    tokenizer = tiny_tokenizers.encoder_tokenizer() if is_bert else tiny_tokenizers.decoder_tokenizer()
    rows = ROWS if is_bert else [row["text"] for row in ROWS]

    small = run(dense_model(head), dataset=rows, tokenizer=tokenizer, prune_epochs=0, method="svd", **asked)

    assert small.config.compression["provenance"]["lpaf"]["tune_learning_rate"] == rate


def test_a_work_folder_is_not_taken_for_another_runs(tmp_path):
    run(method="svd", prune_epochs=0, tune_epochs=1, work_dir=str(tmp_path))

    for other in ({"seed": 1}, {"keep_targets": 0.5}, {"dataset": ROWS[:24]}, {"model": dense_model(seed=1)}):
        with pytest.raises(InputError, match="another model, other data or other options"):
            run(**{"method": "svd", "prune_epochs": 0, "tune_epochs": 1, "work_dir": str(tmp_path), **other})


def test_a_killed_run_goes_on_and_ends_bit_identical(tmp_path):
    whole = run(consistency=0.1, work_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("pruning/checkpoint-4", "pruning/checkpoint-8"):
        assert (tmp_path / "cut" / name).is_dir()
    shutil.rmtree(tmp_path / "cut" / "tuning" / "checkpoint-8")

    resumed = run(consistency=0.1, work_dir=str(tmp_path / "cut"))

    assert resumed.config.compression == whole.config.compression
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": [row["text"] for row in ROWS]}, "no labels"),
        ({"probability": 2}, "probability must be a number at least 0 and at most 1"),
        ({"probability": 0, "consistency": 1.0}, "Give probability"),
        ({"consistency": 1.0, "losses": {"task": 1, "hidden": 1}}, "can be task and logits"),
        ({"tune_epochs": 0}, "tune_epochs must be a number above 0"),
        ({"prune_epochs": -1}, "prune_epochs must be a number at least 0"),
        ({"prune_keep": 3.0}, "prune_keep must be a number above 0"),
        ({"prune_keep": 0.0}, "prune_keep must be"),
        ({"keep_targts": 0.5}, "lpaf has no option 'keep_targts'. Closest: 'keep_targets'"),
        ({"prune_epoch": 1}, "Closest: 'prune_epochs'"),
        ({"importance": "luck"}, "importance must be one of"),
        ({"method": "svdd"}, "method must be one of"),
    ],
)
def test_bad_input_is_one_clear_line(options, message):
    with pytest.raises(InputError, match=message) as caught:
        run(**options)

    assert "\n" not in str(caught.value)


def test_the_command_writes_a_folder_that_loads(tmp_path, capsys):
    dense_model().save_pretrained(tmp_path / "dense")
    tiny_tokenizers.encoder_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "train.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in ROWS)
    )
    options = ["--keep-targets", "0.4", "--prune-epochs", "1", "--tune-epochs", "1", "--batch-size", "8", "--json"]
    command = ["lpaf", tmp_path / "dense", tmp_path / "out", "--dataset", tmp_path / "train.tsv", *options]

    status = main([str(part) for part in command])
    found = json.loads(capsys.readouterr().out)

    assert status == 0
    assert found["lpaf"]["prune_epochs"] == 1.0
    provenance = load_compressed(tmp_path / "out").config.compression["provenance"]
    assert provenance["lpaf"] == found["lpaf"]
    assert provenance["command"].startswith("hf-lowrank lpaf @MODEL@ out --dataset train.tsv --keep-targets 0.4")
