"""One prepared job behind every verb: a dry run is the run, and a cache holds what belongs to one model alone."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from tiny_models import VOCABULARY, build
from tiny_tokenizers import encoder_tokenizer
from transformers import AutoModelForMaskedLM

from hf_lowrank import InputError, analyze, cli, compare, compress

TEXTS = ["a small text of the kind that is asked for", "another one, which is a little longer than that"] * 40


def text(count=4):
    draw = torch.randint(3, VOCABULARY, (count, 4, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draw]


def saved(folder, dtype=torch.float32, **options):
    build("BertForMaskedLM", **options).to(dtype).save_pretrained(folder)
    return folder


def sizes(plan):
    """What a plan chose; which rows move is known when they are solved for."""
    return {name: {**spec, "moved": None} for name, spec in plan["modules"].items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["two_sided_svd", "svd", "whitened_tucker", "autoencoder"])
@pytest.mark.parametrize("budget", [("keep_targets", 0.4), ("target_size", 400_000)], ids=lambda budget: budget[0])
def test_a_dry_run_shows_the_plan_of_the_run(dtype, method, budget, tmp_path, capsys):
    dense, flag = saved(tmp_path / "dense", dtype, num_hidden_layers=1), "--" + budget[0].replace("_", "-")
    command = ["compress", str(dense), str(tmp_path / "small"), "--method", method, flag, str(budget[1]), "--json"]

    assert cli.main([*command, "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)["plan"]
    assert cli.main([*command, "--no-latency"]) == 0
    done = json.loads((tmp_path / "small" / "config.json").read_text(encoding="utf-8"))["compression"]

    assert sizes(shown) == sizes(done)
    assert shown.get("shared") == done.get("shared")


def another_buffer(model):
    model.bert.embeddings.token_type_ids = 1 - model.bert.embeddings.token_type_ids
    return model


def another(**options):
    def made(model):
        other = type(model)(type(model.config)(**{**model.config.to_dict(), **options}))
        other.load_state_dict(model.state_dict())
        return other.eval()

    return made


OTHERS = {
    "hidden_act": another(hidden_act="relu"),
    "num_attention_heads": another(num_attention_heads=2),
    "layer_norm_eps": another(layer_norm_eps=0.5),
    "buffer": another_buffer,
}
each_other = pytest.mark.parametrize("change", OTHERS)


@each_other
def test_what_was_found_of_another_model_of_the_same_weights_is_not_taken(change, tmp_path):
    options = {"keep_targets": 0.5, "calibration": text(), "fast": True}
    dense = build("BertForMaskedLM")
    compress(dense, cache_dir=str(tmp_path), **options)
    other = OTHERS[change](copy.deepcopy(dense))

    cached, alone = compress(other, cache_dir=str(tmp_path), **options), compress(other, **options)

    assert len(list(tmp_path.glob("statistics-*.safetensors"))) == 2
    assert all(map(torch.equal, cached.state_dict().values(), alone.state_dict().values()))


@each_other
def test_nor_is_it_in_a_comparison(change, tmp_path):
    dense = build("BertForMaskedLM")
    other = OTHERS[change](copy.deepcopy(dense))
    about = {"dataset": TEXTS, "task": "masked-lm", "tokenizer": encoder_tokenizer(), "methods": ["svd"]}

    compare(dense, **about, budgets=[0.5], work_dir=tmp_path)
    resumed = compare(other, **about, budgets=[0.5], work_dir=tmp_path)

    assert resumed.to_dict() == compare(other, **about, budgets=[0.5]).to_dict()


def test_a_moved_folder_finds_what_was_kept(tmp_path):
    options = {"keep_targets": 0.5, "calibration": text(), "fast": True, "cache_dir": str(tmp_path / "cache")}
    for folder in ("here", "there"):
        compress(saved(tmp_path / folder), **options)

    assert len(list((tmp_path / "cache").glob("statistics-*.safetensors"))) == 1


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_the_mode_of_the_caller_makes_no_difference(mode, tmp_path):
    dense = AutoModelForMaskedLM.from_pretrained(saved(tmp_path / "dense", num_hidden_layers=1))
    options = {"keep_targets": 0.5, "calibration": text()}

    with mode():
        small = compress(dense, **options)
        other = compress(AutoModelForMaskedLM.from_pretrained(tmp_path / "dense"), **options)
        found = analyze(dense, **options)

    expected = compress(dense, **options)
    assert all(map(torch.equal, small.state_dict().values(), expected.state_dict().values()))
    assert all(map(torch.equal, small.state_dict().values(), other.state_dict().values()))
    assert found.budgets == analyze(dense, **options).budgets
    small(**text(1)[0], labels=text(1)[0]["input_ids"]).loss.backward()


def test_a_model_that_another_holds_is_left_as_it_is():
    dense = build("BertForMaskedLM")
    before = {name: value.clone() for name, value in dense.state_dict().items()}

    compress(torch.nn.DataParallel(dense), method="svd", keep_targets=0.5)

    assert dense.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": "x"}, "seed must be a whole number .*got 'x'"),
        ({"seed": -1}, "seed must be .*at least 0.*got -1"),
        ({"num_calibration_samples": "many"}, "num_calibration_samples must be a whole number .*got 'many'"),
        ({"batch_size": True}, "batch_size must be a whole number .*got True"),
        ({"refine_passes": -1}, "refine_passes must be .*at least 0.*got -1"),
        ({"refine_block_passes": 10**20}, "refine_block_passes must be .*at most"),
        ({"refine_learning_rate": float("nan")}, "refine_learning_rate must be .*got nan"),
        ({"refine_learning_rate": -1}, "refine_learning_rate must be .*above 0.*got -1"),
        ({"device": "gpu9"}, "device must be one of this machine's.*'gpu9'"),
        ({"device": "meta"}, "device must be one of this machine's.*'meta'"),
        ({"fast": 1}, "fast must be true or false, got 1"),
        ({"target_modules": 3}, "target_modules must be text or a list"),
        ({"rank_pattern": {"query": 0}}, "rank_pattern must be .*at least 1"),
        ({"refine_passe": 1}, "compress has no option 'refine_passe'. Closest: 'refine_passes'"),
        ({"settings": None}, "compress has no option 'settings'"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_line_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr("hf_lowrank.compression.job.find_tokenizer", lambda model: pytest.fail("began to work"))

    with pytest.raises(InputError, match=message):
        compress(build("BertModel"), keep_targets=0.5, calibration=text(), **options)
