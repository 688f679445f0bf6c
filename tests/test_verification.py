"""A saved folder proves itself in a process that cannot import this library, and a damaged one is found out."""

import json
import re
import shutil

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2DoubleHeadsModel

from hf_lowrank import InputError, compress
from hf_lowrank.sharing import verification as proving
from hf_lowrank.sharing.saving import load_compressed
from hf_lowrank.sharing.verification import _max_difference, _problem, verify
from hf_lowrank.sharing.verification_child import realigned

BERT = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=64,
)
GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = compress(BertForMaskedLM(BERT).eval(), keep_targets=0.5, embeddings="low_rank", method="svd")
    folder = tmp_path_factory.mktemp("saved") / "bert"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module", autouse=True)
def _one_process_a_folder():
    """What another process has found in a folder is remembered."""
    ask, found = proving._ask_child, {}

    def ask_once(folder, *rest):
        if folder not in found:
            found[folder] = ask(folder, *rest)
        return found[folder]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proving, "_ask_child", ask_once)
        yield


@pytest.fixture
def copy_of(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "copy")


def test_saved_model_computes_the_same_without_this_library(saved, process_of_its_own):
    model, folder = saved

    verification = verify(folder, model)

    assert verification.ok, verification.message
    assert verification.max_difference == 0.0
    assert (verification.auto_class, verification.class_name) == ("AutoModelForMaskedLM", "LowRankBertForMaskedLM")
    assert verification.missing_keys == verification.unexpected_keys == ()


def test_head_without_an_auto_class_is_found_by_its_name(tmp_path):
    model = compress(GPT2DoubleHeadsModel(GPT2).eval(), keep_targets=0.5, method="svd")
    model.save_pretrained(tmp_path / "gpt2")

    verification = verify(tmp_path / "gpt2", model)

    assert verification.ok, verification.message
    assert (verification.auto_class, verification.class_name) == (None, "LowRankGPT2DoubleHeadsModel")


def test_another_model_than_the_saved_one_is_found_out(saved):
    folder = saved[1]
    torch.manual_seed(1)
    other = compress(BertForMaskedLM(BERT).eval(), keep_targets=0.5, embeddings="low_rank", method="svd")

    verification = verify(folder, other)

    assert not verification.ok
    assert "differ by up to" in verification.message


def test_weights_are_compared_where_no_product_is_rounded_by_its_address(saved):
    model = load_compressed(saved[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}

    realigned(model)

    assert all(weight.data_ptr() % 64 == 0 for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_missing_shipped_code_is_named(copy_of):
    (copy_of / "modeling_lowrank.py").unlink()

    verification = verify(copy_of)

    assert not verification.ok
    assert "modeling_lowrank.py, which the shipped code needs, is missing" in verification.message


def test_damaged_shipped_code_is_found(copy_of):
    (copy_of / "lowrank_linear.py").write_text("def broken(:\n")

    verification = verify(copy_of, trust_remote_code=True)

    assert not verification.ok
    assert "does not load without this library: SyntaxError" in verification.message


def truncate_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def edit_config(**changes):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


MISNAMED = {"format_version": 1, "modules": {"encoder.layer.7.output.dense": {"structure": "low_rank", "rank": 2}}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, "weights of .* cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (edit_config(hidden_size="x"), "config.json of .* is damaged: Validation error for field 'hidden_size'"),
        (edit_config(compression=MISNAMED), "names no module 'encoder.layer.7.output.dense'.*Closest"),
        (edit_config(compression={"format_version": 1, "modules": {}}), "do not fit its plan"),
    ],
    ids=["truncated weights", "no weights", "wrong type", "misnamed module", "empty plan"],
)
def test_damage_is_named_in_one_line(copy_of, damage, message):
    damage(copy_of)

    verification = verify(copy_of)

    assert not verification.ok
    assert "\n" not in verification.message
    assert re.search(message, verification.message), verification.message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").write_text("{"), "no readable config.json"),
        (edit_config(compression=None), "not a compressed model"),
        (edit_config(architectures=["LowRankNoSuchModel"]), "names the architecture 'LowRankNoSuchModel'"),
    ],
    ids=["no JSON", "no plan", "unknown class"],
)
def test_folder_that_is_no_compressed_model_is_bad_input(copy_of, damage, message):
    damage(copy_of)

    with pytest.raises(InputError, match=message):
        verify(copy_of)


def test_path_that_is_no_folder_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="is not a folder"):
        verify(tmp_path / "nowhere")


GOOD = {
    "class_name": "X",
    "class_module": "transformers_modules.x",
    "loads_untrusted": False,
    "missing_keys": [],
    "unexpected_keys": [],
}


@pytest.mark.parametrize(
    ("answer", "difference", "message"),
    [
        ({}, 0.0, ""),
        ({"class_module": "hf_lowrank.remote_code"}, 0.0, "not loaded from the shipped code"),
        ({"missing_keys": ["a.weight"]}, 0.0, "1 weights are missing, such as 'a.weight'"),
        ({"unexpected_keys": ["b"]}, 0.0, "1 weights are unexpected"),
        ({"loads_untrusted": True}, 0.0, "loads without trust_remote_code"),
        ({}, 1e-7, "differ by up to 1e-07"),
    ],
)
def test_every_failed_check_has_its_sentence(answer, difference, message):
    problem = _problem(GOOD | answer, difference)

    assert message in problem
    assert bool(problem) == bool(message)


def test_outputs_that_cannot_be_compared_differ_infinitely():
    one, nan = torch.ones(2), torch.full((2,), float("nan"))

    assert _max_difference({"a": one}, {"a": one}) == 0.0
    assert _max_difference({"a": one}, {"b": one}) == float("inf")
    assert _max_difference({"a": one}, {"a": torch.ones(3)}) == float("inf")
    assert _max_difference({"a": nan}, {"a": nan}) == float("inf")
    assert _max_difference({}, {}) == float("inf")
