"""`compress` and `decompress`: what the result is, what it computes, and what happens to the model given."""

import copy
import gc
import json
import pickle
import weakref

import pytest
import torch
import transformers
from tiny_models import CONFIGURATIONS, assert_same_function, build, heads_of, inputs_for, outputs
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_lowrank import compress, decompress, make_report
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.remote_code.lowrank_structures import named_structures, structure_name

HALF = {"keep_params": 0.5, "method": "svd"}
LANGUAGE_MODELS = [
    "BertForMaskedLM",
    "GPT2LMHeadModel",
    "RobertaForMaskedLM",
    "DistilBertForMaskedLM",
    "LlamaForCausalLM",
]
each_head = pytest.mark.parametrize("head", [head for family in CONFIGURATIONS for head in heads_of(family)])
each_language_model = pytest.mark.parametrize("head", LANGUAGE_MODELS)
each_tying = pytest.mark.parametrize("tied", [True, False])


def full_rank(model, **options):
    """Every matrix of `model` at full rank, embedding and untied head too."""
    ranks = {matrix.name: min(matrix.shape) for matrix in find_matrices(model)}
    return compress(model, rank=1, rank_pattern=ranks, method="svd", **options)


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The result


@each_head
def test_full_rank_is_the_same_function_and_decompresses_to_the_same_weights(head):
    dense = build(head)

    small = full_rank(dense)
    again = decompress(small)

    assert_same_function(dense, small, inputs_for(head), tolerance=2e-5)
    assert dense.state_dict().keys() == again.state_dict().keys()
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-5, atol=2e-6)


@each_head
def test_decompressing_gives_the_stock_class_and_the_same_function(head, tmp_path):
    small = compress(build(head), **HALF)

    dense = decompress(small)
    dense.save_pretrained(tmp_path)
    loaded, info = getattr(transformers, head).from_pretrained(tmp_path, output_loading_info=True)

    assert type(dense) is getattr(transformers, head)
    assert not any(info.values())
    assert_same_function(small, dense, inputs_for(head), tolerance=2e-5)
    assert_same_function(dense, loaded.eval(), inputs_for(head))
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    assert "lowrank" not in (tmp_path / "config.json").read_text().lower()
    assert "compression" not in json.loads((tmp_path / "config.json").read_text())


@each_head
def test_compressing_leaves_the_original_and_shares_no_memory_with_it(head):
    dense = build(head)
    before, config = bits(dense), copy.deepcopy(dense.config)

    small = compress(dense, **HALF)

    assert type(dense) is getattr(transformers, head)
    assert same_bits(before, bits(dense))
    assert dense.config == config
    assert "compression" not in vars(dense.config)
    tensors = [{t.untyped_storage().data_ptr() for t in [*m.parameters(), *m.buffers()]} for m in (dense, small)]
    assert not tensors[0] & tensors[1]


@each_head
def test_the_report_counts_what_is_there(head):
    dense = build(head)

    small = compress(dense, **HALF)
    report = make_report(small)

    assert report.dense_parameters == sum(p.numel() for p in dense.parameters())
    assert report.parameters == sum(p.numel() for p in small.parameters())
    assert report.size_bytes == 4 * report.parameters
    assert report.multiply_adds < report.dense_multiply_adds
    assert json.loads(json.dumps(report.to_dict()))["kept_fraction"] == report.kept_fraction


def test_inplace_keeps_the_object_and_frees_the_dense_weights():
    model = build("GPT2LMHeadModel")
    expected = compress(model, **HALF)
    matrices = {matrix.name: weakref.ref(matrix.module.weight) for matrix in find_matrices(model)}

    small = compress(model, inplace=True, **HALF)

    assert small is model
    assert type(model) is type(expected)
    assert same_bits(bits(small), bits(expected))
    kept = make_report(small).provenance and small.config.compression["provenance"]["kept_dense"]
    gc.collect()
    assert {name for name, weight in matrices.items() if weight() is not None} == set(kept)


def test_a_conv1d_and_the_turned_linear_get_the_same_factors():
    turned, straight = build("GPT2Model"), build("GPT2Model")
    for name, module in list(straight.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.load_state_dict({"weight": module.weight.T.contiguous(), "bias": module.bias})
            straight.set_submodule(name, linear)

    first, second = compress(turned, **HALF), compress(straight, **HALF)

    assert first.config.plan["modules"] == second.config.plan["modules"]
    assert_same_function(first, second, inputs_for("GPT2Model"), tolerance=1e-5)


@each_language_model
@each_tying
def test_tied_and_untied_heads_are_the_same_function_at_full_rank(head, tied):
    dense = build(head, tie_word_embeddings=tied)

    small = full_rank(dense)

    embedding, output = small.get_input_embeddings(), small.get_output_embeddings()
    assert structure_name(embedding)
    assert structure_name(output)
    assert tied == (embedding.codes.weight is output.up.weight) == (embedding.basis is output.down.weight)
    assert_same_function(dense, small, inputs_for(head), tolerance=2e-5)


@each_language_model
@each_tying
def test_the_bias_of_the_head_is_kept(head, tied):
    dense = build(head, tie_word_embeddings=tied)
    bias = dense.get_output_embeddings().bias

    found = full_rank(dense).get_output_embeddings().up.bias

    assert (found is None) == (bias is None)
    assert bias is None or torch.equal(found, bias)


@each_language_model
def test_embeddings_dense_leaves_table_and_head_as_they_were(head):
    dense = build(head)

    small = compress(dense, keep_params=0.8, embeddings="dense", method="svd")

    assert type(small.get_input_embeddings()) is nn.Embedding
    assert torch.equal(small.get_output_embeddings().weight, dense.get_output_embeddings().weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@each_language_model
def test_a_16_bit_model_stays_one_and_is_decomposed_in_32(head, dtype):
    model = build(head).to(dtype)

    small, expected = compress(model, **HALF), compress(model.float(), **HALF)

    assert {p.dtype for p in small.parameters()} == {small.dtype} == {dtype}
    for (name, ours), (_, theirs) in zip(named_structures(small), named_structures(expected), strict=True):
        torch.testing.assert_close(ours.to_dense().float(), theirs.to_dense(), rtol=0.02, atol=0.02, msg=name)
    assert all(bool(torch.isfinite(value).all()) for value in outputs(small, inputs_for(head)).values())


def test_dtype_is_the_type_of_the_result_alone():
    dense = build("BertForMaskedLM")

    small = compress(dense, dtype="bfloat16", **HALF)

    assert {p.dtype for p in small.parameters()} == {small.dtype} == {torch.bfloat16}
    assert {p.dtype for p in dense.parameters()} == {torch.float32}


@pytest.mark.parametrize("training", [True, False])
def test_frozen_parameters_and_the_mode_are_kept(training):
    model = build("BertForMaskedLM").train(training)
    model.bert.encoder.layer[0].requires_grad_(False)

    small = compress(model, rank=3, method="svd")

    for result in (small, decompress(small)):
        assert {module.training for module in result.modules()} == {training}
        assert not any(p.requires_grad for p in result.bert.encoder.layer[0].parameters())
        assert all(p.requires_grad for p in result.bert.encoder.layer[1].parameters())


@pytest.mark.parametrize("trainable", ["weight", "bias"])
def test_weight_and_bias_are_frozen_each_for_itself(trainable):
    model = build("BertModel").requires_grad_(False)
    model.encoder.layer[0].output.dense.get_parameter(trainable).requires_grad_(True)

    small = compress(model, rank=3, method="svd")
    layer, again = small.encoder.layer[0].output.dense, decompress(small).encoder.layer[0].output.dense

    assert layer.down.weight.requires_grad == layer.up.weight.requires_grad == (trainable == "weight")
    assert layer.up.bias.requires_grad == (trainable == "bias")
    assert again.get_parameter(trainable).requires_grad
    assert sum(p.requires_grad for p in again.parameters()) == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@each_language_model
def test_copies_are_the_same_function_with_tied_factors(head, clone):
    small = compress(build(head, tie_word_embeddings=True), **HALF)

    again = clone(small)

    assert type(again) is type(small)
    assert_same_function(small, again, inputs_for(head))
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in small.parameters())
