"""What a host model can do, its compressed one can: attention kernels, caches, checkpointing, resizing, compilers."""

import copy
import io

import pytest
import torch
from tiny_models import CONFIGURATIONS, VOCABULARY, assert_same_function, build, heads_of, inputs_for, outputs

import hf_lowrank
from hf_lowrank import compress, decompress
from hf_lowrank.remote_code.lowrank_structures import named_structures, structure_name

ENCODER_HEADS = ["BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "ElectraForMaskedLM"]
DECODER_HEADS = ["GPT2LMHeadModel", "LlamaForCausalLM", "OPTForCausalLM"]
each_decoder = pytest.mark.parametrize("head", DECODER_HEADS)
each_language_model = pytest.mark.parametrize("head", [*ENCODER_HEADS, *DECODER_HEADS])
each_tying = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])

# What may be compressed of a table and its head: the budget that does so.
PARTS = {
    "both": {"keep_params": 0.5, "method": "svd"},
    "blocks": {"keep_params": 0.8, "embeddings": "dense", "method": "svd"},
    "table": {"rank": 4, "method": "svd"},
}


def parts(model, wanted):
    if wanted == "table":
        names = {name for name, module in model.base_model.named_modules() if module is model.get_input_embeddings()}
        return compress(model, target_modules=sorted(names), **PARTS[wanted])
    return compress(model, **PARTS[wanted])


def loss_of(model, inputs):
    logits = model(**inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["input_ids"].flatten())


@each_language_model
def test_sdpa_and_eager_attention_agree_and_can_be_switched(head):
    small = compress(build(head, attn_implementation="sdpa"), keep_params=0.6, method="svd")
    eager = compress(build(head, attn_implementation="eager"), keep_params=0.6, method="svd")
    switched = copy.deepcopy(small)

    switched.set_attn_implementation("eager")

    assert small.config._attn_implementation == "sdpa"
    assert {eager.config._attn_implementation, switched.config._attn_implementation} == {"eager"}
    assert_same_function(small, eager, inputs_for(head), tolerance=1e-5)
    assert_same_function(eager, switched, inputs_for(head))


@each_language_model
def test_eager_attention_gives_its_weights(head):
    small = compress(build(head, attn_implementation="eager"), keep_params=0.6, method="svd")

    attentions = small(**inputs_for(head), output_attentions=True).attentions

    assert len(attentions) == 2
    assert all(weights is not None for weights in attentions)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor is too new
@each_language_model
def test_gradient_checkpointing_gives_the_same_gradients(head):
    plain = compress(build(head), keep_params=0.6, method="svd").train()
    checkpointed = copy.deepcopy(plain)

    checkpointed.gradient_checkpointing_enable()
    for model in (plain, checkpointed):
        torch.manual_seed(0)  # the same dropout
        loss_of(model, inputs_for(head)).backward()

    for (name, first), (_, second) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert all(p.grad is not None for _, structure in named_structures(checkpointed) for p in structure.parameters())


@each_decoder
@pytest.mark.parametrize("beams", [1, 3])
def test_generating_with_a_cache_is_generating_without(head, beams):
    small = compress(build(head), keep_params=0.6, method="svd")
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    inputs = inputs_for(head, length=5)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    with_cache, without = (small.generate(**inputs, **options, use_cache=use) for use in (True, False))

    assert with_cache.shape == (2, 17)
    assert torch.equal(with_cache, without)


@each_decoder
def test_a_decompressed_model_generates_the_same(head):
    small = compress(build(head), keep_params=0.6, method="svd")
    inputs = inputs_for(head, length=5)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    first, second = (m.generate(**inputs, max_new_tokens=8, do_sample=False) for m in (small, decompress(small)))

    assert torch.equal(first, second)


@each_tying
@pytest.mark.parametrize("wanted", PARTS)
@pytest.mark.parametrize("size", [VOCABULARY - 4, VOCABULARY + 7])
@each_language_model
def test_resizing_keeps_old_tokens_and_ties(tmp_path, head, size, wanted, tied):
    small = parts(build(head, tie_word_embeddings=tied), wanted)
    inputs = {"input_ids": inputs_for(head)["input_ids"] % (VOCABULARY - 4)}
    before = outputs(small, inputs)["logits"][..., :size]

    small.resize_token_embeddings(size)
    after = outputs(small, inputs)["logits"]
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path)

    assert after.shape[-1] == small.config.vocab_size == size
    torch.testing.assert_close(after[..., : before.shape[-1]], before, rtol=1e-5, atol=1e-5)
    assert outputs(small, {"input_ids": torch.full((1, 3), size - 1)})
    assert_same_function(small, again.eval(), inputs)
    assert is_tied(small) == is_tied(again) == tied


def is_tied(model):
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if structure_name(table) and structure_name(head):
        return table.codes.weight is head.up.weight and table.basis is head.down.weight
    return bool(not structure_name(table) and not structure_name(head) and table.weight is head.weight)


def test_resizing_to_a_multiple_rounds_up():
    small = compress(build("GPT2LMHeadModel"), keep_params=0.6, method="svd")

    small.resize_token_embeddings(pad_to_multiple_of=64)

    assert small.get_input_embeddings().num_embeddings == small.config.vocab_size == 128


@each_language_model
def test_a_saved_state_dict_is_the_model(head):
    small, buffer = compress(build(head), keep_params=0.5, method="svd"), io.BytesIO()

    torch.save(small.state_dict(), buffer)
    buffer.seek(0)
    again = type(small)(small.config)
    again.load_state_dict(torch.load(buffer, weights_only=True), strict=True)

    assert_same_function(small, again.eval(), inputs_for(head))


@pytest.mark.parametrize("head", [heads_of(family)[-1] for family in CONFIGURATIONS])
def test_a_model_from_its_configuration_starts_with_the_hosts_deviation(head):
    config = compress(build(head), keep_params=0.5, method="svd").config

    fresh = getattr(hf_lowrank, f"LowRank{head}")._from_config(config)

    stds = [structure.to_dense().std().item() for _, structure in named_structures(fresh)]
    assert stds
    assert all(0.01 < std < 0.04 for std in stds)


@each_language_model
def test_torch_compile_runs_it_without_a_graph_break(head):
    small = compress(build(head), keep_params=0.6, method="svd")
    inputs = {**inputs_for(head), "use_cache": False} if head in DECODER_HEADS else inputs_for(head)

    compiled = torch.compile(small, backend="eager", fullgraph=True)

    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, small(**inputs).logits)


@pytest.mark.parametrize("head", ENCODER_HEADS)
def test_torch_export_takes_it(head):
    small = compress(build(head), keep_params=0.6, method="svd")
    inputs = inputs_for(head)

    program = torch.export.export(small, (), kwargs=inputs, strict=False)

    torch.testing.assert_close(program.module()(**inputs).logits, small(**inputs).logits)
