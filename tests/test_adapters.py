"""A LoRA of PEFT goes into the factors of a compressed model: exactly where ranks grow, and told where they do not."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, inputs_for, outputs

from hf_lowrank import InputError, compress, decompress
from hf_lowrank.compression.adapters import merge_adapter_
from hf_lowrank.sharing.saving import load_compressed

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # of peft

# Head -> what its adapter changes.
ADAPTED = {
    "BertForMaskedLM": ["query", "value", "intermediate.dense"],
    "GPT2LMHeadModel": ["c_attn", "mlp.c_proj"],
    "LlamaForCausalLM": ["q_proj", "down_proj"],
    "BertModel": ["key", "pooler.dense"],
}
each_head = pytest.mark.parametrize("head", ADAPTED)
each_storage = pytest.mark.parametrize("storage", ["low_rank", "pivoted"])


def adapter_of(dense, folder, **options):
    """An adapter whose matrices are all drawn, as if trained, in a folder."""
    targets = ADAPTED[type(dense).__name__]
    config = peft.LoraConfig(target_modules=targets, r=3, lora_alpha=5, fan_in_fan_out="GPT2" in type(dense).__name__)
    adapted = peft.get_peft_model(dense, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    if options:
        about = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(about | options))
    return folder


def compressed(head, storage, folder):
    compress(build(head), rank=5, method="svd", storage=storage).save_pretrained(folder)
    return load_compressed(folder)


@each_storage
@each_head
def test_merged_it_says_what_it_says_unmerged_and_loads_as_such(head, storage, tmp_path):
    adapter = adapter_of(build(head), tmp_path / "adapter")
    small, inputs = compressed(head, storage, tmp_path / "small"), inputs_for(head)
    stock = peft.PeftModel.from_pretrained(decompress(small), adapter).eval()

    lost = merge_adapter_(small, adapter)
    small.save_pretrained(tmp_path / "merged")
    found = outputs(load_compressed(tmp_path / "merged").eval(), inputs)

    assert set(lost.values()) == {0.0}
    assert {small.config.plan["modules"][name]["rank"] for name in lost} == {8}
    for name, value in outputs(stock, inputs).items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)


@each_storage
def test_cut_to_the_ranks_there_were_nothing_grows_and_the_loss_is_told(storage, tmp_path):
    adapter = adapter_of(build("BertForMaskedLM"), tmp_path / "adapter")
    kept, grown = (compressed("BertForMaskedLM", storage, tmp_path / "small") for _ in range(2))
    before = kept.num_parameters()

    lost = merge_adapter_(kept, adapter, keep_ranks=True)
    merge_adapter_(grown, adapter)

    assert kept.num_parameters() == before < grown.num_parameters()
    for name, loss in lost.items():
        whole, cut = (model.base_model.get_submodule(name).to_dense().detach().double() for model in (grown, kept))
        assert loss == pytest.approx(float((whole - cut).norm() / whole.norm()), abs=1e-5)
        values = torch.linalg.svdvals(whole)
        assert loss == pytest.approx(float(values[5:].norm() / values.norm()), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "Only a plain LoRA can be merged into factors, got LoRA with use_dora"),
        ({"peft_type": "IA3"}, "got IA3"),
    ],
)
def test_what_is_no_plain_lora_is_one_line(options, message, tmp_path):
    adapter = adapter_of(build("BertModel"), tmp_path / "adapter", **options)
    small = compressed("BertModel", "low_rank", tmp_path / "small")

    with pytest.raises(InputError, match=message):
        merge_adapter_(small, adapter)


def test_what_cannot_hold_it_and_what_is_no_adapter_are_one_line(tmp_path):
    adapter = adapter_of(build("BertModel"), tmp_path / "adapter")
    shared = compress(build("BertModel"), method="tucker", keep_targets=0.5)

    with pytest.raises(InputError, match=r"which is \w+ here: it can be merged into two factors"):
        merge_adapter_(shared, adapter)
    with pytest.raises(InputError, match="holds no readable adapter"):
        merge_adapter_(shared, tmp_path)


def without_a_second_factor(weights):
    return dict(list(weights.items())[:-1])


def with_a_table(weights):
    return weights | {"base_model.model.embeddings.word_embeddings.lora_embedding_A": torch.zeros(3, 97)}


def of_another_width(weights):
    return {name: value[..., :-1] if ".lora_A." in name else value for name, value in weights.items()}


@pytest.mark.parametrize("spoiled", [without_a_second_factor, with_a_table, of_another_width])
def test_an_adapter_that_cannot_be_merged_whole_is_not_merged_in_part(spoiled, tmp_path):
    file = adapter_of(build("BertModel"), tmp_path / "adapter") / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in spoiled(load_file(file)).items()}, file)
    small = compressed("BertModel", "low_rank", tmp_path / "small")
    before = {name: value.clone() for name, value in small.state_dict().items()}

    with pytest.raises(InputError, match=r"^[^\n]+$"):
        merge_adapter_(small, tmp_path / "adapter")
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
