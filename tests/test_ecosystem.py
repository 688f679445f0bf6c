"""Other libraries meet a compressed model and see ordinary layers: accelerate, PEFT, the Trainer, pipelines."""

import copy
import json
import subprocess
import sys
import time

import accelerate
import peft
import pytest
import torch
from every_structure import build_every_structure
from tiny_models import VOCABULARY, assert_same_function, build, inputs_for, outputs
from torch import nn
from transformers import BertTokenizer, Trainer, TrainingArguments, pipeline

import hf_lowrank
from hf_lowrank import compress
from hf_lowrank.remote_code.lowrank_structures import install_plan_, named_structures
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

HEADS = ["BertForMaskedLM", "GPT2LMHeadModel", "DistilBertForMaskedLM", "LlamaForCausalLM", "OPTForCausalLM"]
each_head = pytest.mark.parametrize("head", HEADS)
each_tying = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
each_structure = pytest.mark.parametrize(
    "structure", [name for name, kind in STRUCTURES.items() if kind.HOSTS == "linear"]
)


def small_model(head, **options):
    return compress(build(head, **options), keep_params=0.6, method="svd")


def full_tables(head, tied):
    """A compressed model whose token embedding and head are low-rank too."""
    return compress(build(head, tie_word_embeddings=tied), rank=9, embeddings="low_rank", method="svd")


# accelerate


@each_tying
@each_head
def test_offloading_to_cpu_gives_the_same_function(head, tied):
    small = small_model(head, tie_word_embeddings=tied)
    expected = outputs(small, inputs_for(head))

    offloaded = accelerate.cpu_offload(copy.deepcopy(small), execution_device=torch.device("cpu"))

    found = outputs(offloaded, inputs_for(head))
    assert {p.device.type for p in offloaded.parameters()} == {"meta"}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@each_structure
def test_every_structure_is_offloaded(structure):
    model = build_every_structure("BertForMaskedLM", [structure])
    expected = outputs(model, inputs_for("BertForMaskedLM"))["logits"]

    offloaded = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))

    assert torch.equal(outputs(offloaded, inputs_for("BertForMaskedLM"))["logits"], expected)


def all_but_one_block_on_cpu(model):
    """A device map, and the name of the block that is put on disk."""
    blocks = next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    names = [name for name, _ in model.named_modules() if name and not f"{blocks}.".startswith(f"{name}.")]
    tops = [name for name in names if f"{name.rpartition('.')[0]}." not in {f"{other}." for other in names}]
    return {name: "disk" if name == f"{blocks}.1" else "cpu" for name in tops}, f"{blocks}.1"


@each_tying
@each_head
def test_a_device_map_puts_blocks_on_disk(tmp_path, head, tied):
    small = small_model(head, tie_word_embeddings=tied)
    small.save_pretrained(tmp_path / "model")
    device_map, block = all_but_one_block_on_cpu(small)

    loaded = type(small).from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )

    assert {p.device.type for p in loaded.get_submodule(block).parameters()} == {"meta"}
    assert_same_function(small, loaded.eval(), inputs_for(head))


@each_head
def test_an_automatic_device_map_loads_it(tmp_path, head):
    small = small_model(head)
    small.save_pretrained(tmp_path)

    loaded = type(small).from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GB"})

    assert_same_function(small, loaded.eval(), inputs_for(head))


def test_a_model_of_seven_billion_parameters_is_planned_and_built_without_numbers():
    layers = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    modules = {f"h.{i}.{name}": {"structure": "low_rank", "rank": 512} for i in range(32) for name in layers}
    modules["wte"] = {"structure": "low_rank_embedding", "rank": 1024}
    plan = {"format_version": 1, "modules": modules}
    start = time.perf_counter()

    with torch.device("meta"):
        config = hf_lowrank.LowRankGPT2Config(n_embd=4096, n_layer=32, n_head=32, compression=plan)
        model = hf_lowrank.LowRankGPT2LMHeadModel(config)
    seconds = time.perf_counter() - start

    dense = sum(shape[0] * shape[1] for shape in [(12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384)]) * 32
    assert dense > 6.4e9
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}
    assert len(named_structures(model)) == 32 * 4 + 2
    assert seconds < 5  # a second on an idle machine; reading or drawing 7 billion numbers takes a minute


def test_installing_a_plan_twice_changes_nothing():
    small = small_model("GPT2LMHeadModel")
    before = dict(small.named_modules())

    install_plan_(small, small.config.plan)

    assert dict(small.named_modules()) == before


# PEFT


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:fan_in_fan_out")  # of peft
@each_tying
@each_head
def test_lora_on_all_linear_trains_and_merges(head, tied):
    small, inputs = full_tables(head, tied), inputs_for(head)
    adapted = peft.get_peft_model(small, peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=True))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)

    names = {name.split(".")[-3] for name, _ in adapted.named_modules() if name.endswith("lora_A.default")}
    losses = [train_step(adapted, optimizer, inputs) for _ in range(8)]
    expected = outputs(adapted.eval(), inputs)["logits"]
    merged = adapted.merge_and_unload()

    assert losses[-1] < losses[0]
    assert names >= {"up", "down"}
    assert type(merged) is type(small)
    torch.testing.assert_close(outputs(merged, inputs)["logits"], expected, rtol=1e-4, atol=1e-4)


def train_step(model, optimizer, inputs):
    optimizer.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    optimizer.step()
    return loss.item()


@each_structure
def test_every_structure_trains(structure):
    model, inputs = build_every_structure("BertForMaskedLM", [structure]).train(), inputs_for("BertForMaskedLM")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    losses = [train_step(model, optimizer, inputs) for _ in range(8)]

    assert losses[-1] < losses[0]


# transformers


@each_head
def test_a_trainer_trains_it_and_its_checkpoint_reloads(tmp_path, head):
    small, inputs = small_model(head), inputs_for(head)
    data = [{"input_ids": ids, "labels": ids} for ids in inputs["input_ids"]] * 2
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )

    Trainer(small, arguments, train_dataset=data).train()
    again, info = type(small).from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)

    assert not any(info.values())
    assert (tmp_path / "checkpoint-2" / "modeling_lowrank.py").exists()
    assert_same_function(small.eval(), again.eval(), inputs)


@pytest.fixture
def folder_with_tokenizer(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    tokenizer.save_pretrained(tmp_path)
    small_model("BertForMaskedLM").save_pretrained(tmp_path)
    return tmp_path


def test_a_pipeline_fills_a_mask(folder_with_tokenizer):
    fill = pipeline("fill-mask", model=str(folder_with_tokenizer), device="cpu")

    answers = fill("w1 w2 [MASK] w4", top_k=3)

    assert len(answers) == 3
    assert 0 < answers[0]["score"] <= 1


def test_a_pipeline_gives_features(folder_with_tokenizer):
    features = pipeline("feature-extraction", model=str(folder_with_tokenizer), device="cpu")("w1 w2")

    assert len(features[0]) == 4


IMPORTS = """
import json, sys
import hf_lowrank
first = [name for name in ("torch", "transformers", "numpy", "rich") if name in sys.modules]
from transformers import AutoConfig
config = AutoConfig.for_model("lowrank_bert")
print(json.dumps([first, type(config).__name__, type(config).__module__, "torch" in sys.modules]))
"""


def test_importing_the_library_imports_no_other_and_registers_its_families():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)

    first, name, module, _ = json.loads(done.stdout)

    assert first == []
    assert (name, module) == ("LowRankBertConfig", "hf_lowrank.remote_code.configuration_lowrank")
