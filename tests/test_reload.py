"""A saved folder is loaded anywhere: as any head, in a process that cannot import this library."""

import copy
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import transformers
from elsewhere import run_elsewhere
from every_structure import build_every_structure
from forks import run_in_fork
from safetensors.torch import load_file
from tiny_models import CONFIGURATIONS, build, family_of, heads_of, inputs_for, largest_difference, outputs

import hf_lowrank
from hf_lowrank import PlanError, compress, decompress
from hf_lowrank.registration import FAMILIES
from hf_lowrank.remote_code.lowrank_structures import named_shared_parts, named_structures
from hf_lowrank.sharing.verification import verify


def prefix_of(head):
    return getattr(transformers, head).base_model_prefix


# One head of every family is loaded as each of its heads; of these two, each head is.
EVERY_PAIR = ("bert", "gpt2")
SAVED = {
    family: heads_of(family) if family in EVERY_PAIR else [next(h for h in heads_of(family) if "LM" in h)]
    for family in CONFIGURATIONS
}

PAIRS = [(saved, head) for family, heads in SAVED.items() for saved in heads for head in heads_of(family)]
# Not even stock transformers loads one as the other where the base model has another name in them.
STRANGERS = [(saved, head) for saved, head in PAIRS if prefix_of(saved) != prefix_of(head)]
CASES = [pair for pair in PAIRS if pair not in STRANGERS]
FIRST = [(saved, head) for saved, head in CASES if saved == SAVED[family_of(saved)][0]]
each_case = pytest.mark.parametrize(("saved", "head"), CASES)
each_first = pytest.mark.parametrize(("saved", "head"), FIRST)

# Read by a Python that cannot import this library; loads each folder as each head, and saves and loads it once more.
CHILD = """
from tiny_models import inputs_for, outputs

results = {}
for folder, head, auto, is_first in jobs["cases"]:
    torch.manual_seed(0)
    if hasattr(transformers, auto):
        load = getattr(transformers, auto).from_pretrained
    else:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        load = get_class_from_dynamic_module(f"modeling_lowrank.{auto}", folder).from_pretrained
    # A classifier of one output (multiple choice) is no classifier of two: such a head is drawn anew, as in stock.
    model, info = load(folder, trust_remote_code=True, output_loading_info=True, ignore_mismatched_sizes=True)
    found = results[folder, head] = {
        "class": (type(model).__name__, type(model).__module__),
        "info": {kind: sorted(map(str, keys)) for kind, keys in info.items()},
        "outputs": outputs(model.eval(), inputs_for(head)),
    }
    if is_first:
        model.save_pretrained(f"{folder}-again-{head}")
        again, info = load(f"{folder}-again-{head}", trust_remote_code=True, output_loading_info=True)
        found["info again"] = {kind: sorted(map(str, keys)) for kind, keys in info.items()}
        found["outputs again"] = outputs(again.eval(), inputs_for(head))
torch.save(results, jobs["results"])
"""


def auto_name(head):
    """The auto class that loads a head, or the name of our class where transformers has none."""
    heads = hf_lowrank.remote_code.lowrank_model.auto_classes(family_of(head))
    return next((auto for auto, host in heads.items() if host == head), f"LowRank{head}")


def child_environment(tmp_path):
    allowed = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**allowed, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}


@pytest.fixture(scope="module")
def small():
    return {saved: compress(build(saved), keep_params=0.5, method="svd") for saved in {saved for saved, _ in CASES}}


@pytest.fixture(scope="module")
def folders(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("saved")
    for saved, model in small.items():
        model.save_pretrained(root / saved)
    return root


@pytest.fixture(scope="module")
def elsewhere(folders):
    """What a process without this library saw, by folder and head."""
    cases = [(str(folders / saved), head, auto_name(head), (saved, head) in FIRST) for saved, head in CASES]

    run_elsewhere(CHILD, folders, cases=cases, results=str(folders / "results.pt"))

    return torch.load(folders / "results.pt")


def load_here(folder, head):
    torch.manual_seed(0)
    model, info = getattr(hf_lowrank, f"LowRank{head}").from_pretrained(
        folder, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return model.eval(), {kind: sorted(map(str, keys)) for kind, keys in info.items()}


@each_case
def test_every_head_is_the_same_function_without_this_library(folders, elsewhere, saved, head):
    found = elsewhere[str(folders / saved), head]

    here, info = load_here(folders / saved, head)

    assert found["class"][0] == type(here).__name__ == f"LowRank{head}"
    assert found["class"][1].startswith("transformers_modules.")
    assert found["info"] == info
    assert largest_difference(found["outputs"], outputs(here, inputs_for(head))) == 0.0


@each_case
def test_only_what_belongs_to_a_head_is_missing_or_left_over(folders, elsewhere, saved, head):
    info = elsewhere[str(folders / saved), head]["info"]
    dense, wanted = build(saved), build(head)

    body = [f"{model.base_model_prefix}." if model.base_model is not model else "" for model in (dense, wanted)]
    in_body = {name for name, _ in wanted.base_model.named_parameters()}
    keys = [key for kind in info.values() for key in kind]
    stripped = {key.removeprefix(body[0]).removeprefix(body[1]) for key in keys}

    assert not [key for key in stripped if key in in_body and not key.startswith("pooler.")]
    assert not any("classifier" not in key and "score" not in key for key in info["mismatched_keys"])
    assert saved != head or not keys


@pytest.mark.parametrize(("saved", "head"), STRANGERS)
def test_a_head_that_would_find_none_of_the_weights_is_refused(folders, saved, head):
    with pytest.raises(PlanError, match="do not fit its plan"):
        load_here(folders / saved, head)


@each_first
def test_what_was_loaded_without_this_library_is_saved_and_loaded_again(folders, elsewhere, saved, head):
    found = elsewhere[str(folders / saved), head]

    assert not any(found["info again"].values())
    assert largest_difference(found["outputs"], found["outputs again"]) == 0.0


@pytest.mark.parametrize("saved", sorted({saved for saved, _ in CASES}))
def test_the_saved_head_is_the_compressed_model(small, folders, saved):
    here, info = load_here(folders / saved, saved)

    assert not any(info.values())
    assert largest_difference(outputs(small[saved], inputs_for(saved)), outputs(here, inputs_for(saved))) == 0.0


@pytest.mark.parametrize("saved", sorted({saved for saved, _ in CASES}))
def test_the_auto_map_holds_every_head(folders, saved):
    config = json.loads((folders / saved / "config.json").read_text())

    named = {entry.split(".")[-1] for entry in config["auto_map"].values()}

    in_auto = {f"LowRank{head}" for head in heads_of(family_of(saved)) if hasattr(transformers, auto_name(head))}
    assert named >= in_auto
    assert config["compression"]["format_version"] == 1
    assert config["model_type"] == f"lowrank_{family_of(saved)}"
    assert config["architectures"] == [f"LowRank{saved}"]


def again_in(folders, saved, head):
    return Path(f"{folders / saved}-again-{head}")


@each_first
def test_a_folder_saved_without_this_library_is_as_complete(folders, elsewhere, saved, head):
    assert elsewhere
    first, second = folders / saved, again_in(folders, saved, head)

    maps = [json.loads((folder / "config.json").read_text())["auto_map"] for folder in (first, second)]
    shipped = [{path.name: path.read_text() for path in folder.glob("*.py")} for folder in (first, second)]

    assert shipped[0] == shipped[1]
    assert maps[1].items() >= {key: value for key, value in maps[0].items() if hasattr(transformers, key)}.items()


@pytest.mark.parametrize("head", [head for saved, head in FIRST if family_of(saved) in FAMILIES])
def test_no_flag_is_needed_where_the_library_is_imported(folders, head):
    saved = SAVED[family_of(head)][0]
    if not hasattr(transformers, auto_name(head)):
        pytest.skip("no auto class loads this head of any model")

    model = getattr(transformers, auto_name(head)).from_pretrained(folders / saved)

    assert type(model) is getattr(hf_lowrank, f"LowRank{head}")


WITHOUT_FLAG = """
import sys, transformers
for folder in sys.argv[1:]:
    for auto in (transformers.AutoModel, transformers.AutoConfig, transformers.AutoModelForSequenceClassification):
        try:
            auto.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            sys.exit(f"{auto.__name__} loaded {folder}")
"""


def test_without_the_flag_and_without_the_library_loading_raises(folders):
    saved = [str(folders / heads[0]) for heads in SAVED.values()]

    done = run_in_fork([sys.executable, "-c", WITHOUT_FLAG, *saved], env=child_environment(folders), cwd=folders)

    assert done.returncode == 0, done.stderr[-3000:]


def test_a_family_in_no_table_is_among_those_proved_here():
    assert {"electra", "opt"} <= set(SAVED) - set(FAMILIES)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_every_structure_is_saved_once_and_reloads_elsewhere(head, tmp_path):
    model = build_every_structure(head)

    model.save_pretrained(tmp_path)

    found = verify(tmp_path, model)
    assert (found.ok, found.max_difference) == (True, 0.0), found.message
    assert not found.missing_keys
    saved = load_file(tmp_path / "model.safetensors").values()
    assert sum(t.numel() for t in saved if t.is_floating_point()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_every_structure_can_be_copied_moved_and_decompressed(head):
    model = build_every_structure(head)
    inputs = inputs_for(head)
    expected = outputs(model, inputs)

    copied = copy.deepcopy(model)
    dense = decompress(model).eval()

    assert largest_difference(outputs(copied, inputs), expected) == 0.0
    assert not {p.data_ptr() for p in copied.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert {p.dtype for p in copied.to(torch.float64).parameters()} == {torch.float64}
    assert largest_difference(outputs(copied.float(), inputs), expected) == 0.0
    assert largest_difference(outputs(dense, inputs), expected) < 1e-4
    assert not named_shared_parts(dense)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_every_structure_gets_gradients_from_every_user(head):
    model = build_every_structure(head)

    model(**inputs_for(head)).logits.square().mean().backward()

    used = [name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())]
    ours = [f"{name}.{key}" for name, part in named_shared_parts(model) for key, _ in part.named_parameters()]
    ours += [f"{name}.{key}" for name, part in named_structures(model) for key, _ in part.named_parameters()]
    assert ours
    tied = set(model.all_tied_weights_keys)
    assert {name for name in ours if name not in tied and not name.endswith("bias")} <= set(used)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_every_structure_says_of_what_shape_type_and_place_the_weight_is_that_it_replaces(head):
    for _, structure in named_structures(build_every_structure(head).to(torch.float64)):
        gone, dense = structure.weight, structure.to_dense()
        assert (gone.shape, gone.dtype, gone.device) == (dense.shape, dense.dtype, dense.device)
        for compute in (torch.t, torch.clone, lambda weight: weight.div_(2), lambda weight: weight.data.zero_()):
            with pytest.raises(PlanError, match="exclude_modules"):
                compute(gone)
