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
    """Name of the architecture -> its compressed model, saved in `root / name`."""
    found = {}
    for name in ARCHITECTURES:
        build_architecture(name).save_pretrained(root / f"dense-{name}")
        dense = getattr(transformers, name).from_pretrained(root / f"dense-{name}")
        found[name] = compress(dense, method="svd", keep_targets=0.5)
        found[name].save_pretrained(root / name)
    return found


@pytest.fixture(scope="module")
def elsewhere(small, root):
    run_elsewhere(CHILD, root, folders={name: str(root / name) for name in small})
    return {name: load_file(root / f"{name}.state") for name in small}


@each_architecture
def test_what_is_saved_loads_without_this_library(small, elsewhere, name):
    assert small[name].config.compression["modules"]
    assert same_state(elsewhere[name], small[name].state_dict())


@each_architecture
def test_what_was_saved_again_without_this_library_loads_with_it(small, elsewhere, root, name):
    load = getattr(hf_lowrank, f"LowRank{name}").from_pretrained
    loaded, info = load(root / f"{name}-again", output_loading_info=True)

    assert not any(info.values())
    assert same_state(loaded.state_dict(), small[name].state_dict())


@each_architecture
def test_names_on_disk_are_those_of_the_compressed_class(small, root, name):
    model = small[name]
    on_disk = load_file(root / name / "model.safetensors")

    assert {key for key, value in on_disk.items() if value.numel()} <= set(model.state_dict())


@each_architecture
def test_what_is_decompressed_and_saved_loads_as_the_stock_class(small, root, name):
    loaded_small = getattr(hf_lowrank, f"LowRank{name}").from_pretrained(root / name)
    for start, model in (("compressed", small[name]), ("loaded", loaded_small)):
        dense = decompress(model)
        dense.save_pretrained(root / f"{start}-{name}")

        loaded, info = getattr(transformers, name).from_pretrained(root / f"{start}-{name}", output_loading_info=True)

        assert not any(info.values())
        assert same_state(loaded.state_dict(), dense.state_dict())
