"""Whatever names a host's weights have on disk: what is compressed and saved loads, and what is decompressed too.

Every model is loaded from disk first, as users load theirs: only then does transformers know it by other names.
"""

import pytest
import torch
import transformers
from elsewhere import run_elsewhere
from safetensors.torch import load_file
from tiny_architectures import ARCHITECTURES, build_architecture

import hf_lowrank
from hf_lowrank import compress, decompress

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers' and torch's own
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)

# Read by a Python that cannot import this library: the state of each folder's model, which it also saves again.
CHILD = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from safetensors.torch import save_file

for name, folder in jobs["folders"].items():
    load = get_class_from_dynamic_module(f"modeling_lowrank.LowRank{name}", folder).from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), (name, info)
    save_file({key: value.clone().contiguous() for key, value in model.state_dict().items()}, f"{folder}.state")
    model.save_pretrained(f"{folder}-again")
"""


def same_state(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], value) for key, value in second.items())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def small(root):
    """Name of the architecture -> its compressed model, saved in `root / name / "model"`: one name, code read once."""
    found = {}
    for name in ARCHITECTURES:
        build_architecture(name).save_pretrained(root / f"dense-{name}")
        dense = getattr(transformers, name).from_pretrained(root / f"dense-{name}")
        found[name] = compress(dense, method="svd", keep_targets=0.5)
        found[name].save_pretrained(root / name / "model")
    return found


@pytest.fixture(scope="module")
def elsewhere(small, root):
    run_elsewhere(CHILD, root, folders={name: str(root / name / "model") for name in small})
    return {name: load_file(root / name / "model.state") for name in small}


@each_architecture
def test_what_is_saved_loads_without_this_library(small, elsewhere, name):
    assert small[name].config.compression["modules"]
    assert same_state(elsewhere[name], small[name].state_dict())


@each_architecture
def test_what_was_saved_again_without_this_library_loads_with_it(small, elsewhere, root, name):
    load = getattr(hf_lowrank, f"LowRank{name}").from_pretrained
    loaded, info = load(root / name / "model-again", output_loading_info=True)

    assert not any(info.values())
    assert same_state(loaded.state_dict(), small[name].state_dict())


@each_architecture
def test_names_on_disk_are_those_of_the_compressed_class(small, root, name):
    model = small[name]
    on_disk = load_file(root / name / "model" / "model.safetensors")

    assert {key for key, value in on_disk.items() if value.numel()} <= set(model.state_dict())


@each_architecture
def test_what_is_decompressed_and_saved_loads_as_the_stock_class(small, root, name):
    loaded_small = getattr(hf_lowrank, f"LowRank{name}").from_pretrained(root / name / "model")
    for start, model in (("compressed", small[name]), ("loaded", loaded_small)):
        dense = decompress(model)
        dense.save_pretrained(root / f"{start}-{name}")

        loaded, info = getattr(transformers, name).from_pretrained(root / f"{start}-{name}", output_loading_info=True)

        assert not any(info.values())
        assert same_state(loaded.state_dict(), dense.state_dict())


# Inputs of the models that read tokens, and the budgets under which each kind of matrix is replaced.
READERS = {
    "T5ForConditionalGeneration": ("input_ids", "decoder_input_ids"),
    "BartForConditionalGeneration": ("input_ids", "decoder_input_ids"),
    "PegasusForConditionalGeneration": ("input_ids", "decoder_input_ids"),
    "MarianMTModel": ("input_ids", "decoder_input_ids"),
    "GPTNeoXForCausalLM": ("input_ids",),
    "Gemma3ForCausalLM": ("input_ids",),
    "MambaForCausalLM": ("input_ids",),
    "EsmForMaskedLM": ("input_ids",),
    "ModernBertForMaskedLM": ("input_ids",),
}
WAYS = {
    "blocks": {"keep_targets": 0.6},
    "tables": {"keep_params": 0.8, "storage": "low_rank"},
    "bfloat16": {"keep_targets": 0.6, "dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def readers(root):
    for name in READERS:
        build_architecture(name).save_pretrained(root / f"reader-{name}")
    return root


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", READERS)
def test_what_is_compressed_can_be_run_and_computes_as_what_is_loaded(readers, name, way, tmp_path):
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    model = compress(readers / f"reader-{name}", method="svd", **WAYS[way])
    model.save_pretrained(tmp_path)

    loaded = type(model).from_pretrained(tmp_path).eval()

    with torch.no_grad():
        first, second = (one(**dict.fromkeys(READERS[name], ids)).logits for one in (model, loaded))
    assert torch.equal(first, second)


def test_statistics_are_of_every_user_of_a_shared_table(readers, tmp_path):
    model = compress(readers / "reader-T5ForConditionalGeneration", keep_targets=0.6)

    assert any("decoder" in name for name in model.config.compression["modules"])


def test_a_tokenizer_whose_package_is_missing_is_no_tokenizer(monkeypatch, readers):
    def missing(source):
        raise ImportError("needs a package")

    monkeypatch.setattr("hf_lowrank.hosts.loading.load_tokenizer", missing)

    assert compress(readers / "reader-EsmForMaskedLM", method="svd", keep_targets=0.6).config.compression["modules"]
