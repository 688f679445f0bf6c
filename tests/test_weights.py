"""A weight of a plan that is missing, left over or of another shape is an error, however the model is loaded."""

import shutil

import pytest
import torch
from elsewhere import run_elsewhere
from every_structure import OF_ANY_MODEL, build_every_structure, structures_with
from safetensors.torch import load_file, save_file
from safetensors.torch import load_model as safetensors_load_model
from tiny_models import build, inputs_for, outputs
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_lowrank
from hf_lowrank import PlanError, compress
from hf_lowrank.remote_code.lowrank_structures import named_shared_parts, named_structures
from hf_lowrank.remote_code.lowrank_table import SHARED_PARTS, STRUCTURES
from hf_lowrank.sharing.saving import save_folder

HEAD = "BertForMaskedLM"
TABLES = [name for name, structure in STRUCTURES.items() if structure.HOSTS == "embedding"]
CHOSEN = [name for name in OF_ANY_MODEL if not name.endswith("_head")]  # these stand with the table they are tied to

# Ways to load a folder, as code.
_TRUSTED = "from_pretrained(folder, trust_remote_code=True"
WAYS = {
    "class": f"get_class_from_dynamic_module('modeling_lowrank.LowRank{HEAD}', folder).from_pretrained(folder)",
    "base": f"transformers.AutoModel.{_TRUSTED})",
    "same head": f"transformers.AutoModelForMaskedLM.{_TRUSTED})",
    "other head": f"transformers.AutoModelForTokenClassification.{_TRUSTED})",
    "device map": f"transformers.AutoModel.{_TRUSTED}, device_map='cpu')",
    "low memory": f"transformers.AutoModel.{_TRUSTED}, low_cpu_mem_usage=True)",
    "any shapes": f"transformers.AutoModel.{_TRUSTED}, ignore_mismatched_sizes=True)",
    "pipeline": "transformers.pipeline('feature-extraction', model=folder, trust_remote_code=True)",
}
CHILD = """
from transformers.dynamic_module_utils import get_class_from_dynamic_module

loaded = []
for folder, way in jobs["cases"]:
    try:
        eval(way)
    except ValueError as error:
        assert "do not fit its plan" in str(error), (folder, way, error)
    else:
        loaded.append((folder, way))
assert not loaded, loaded
"""


def of_structures(model):
    """Names of the stored numbers of every structure and shared part."""
    tied = set(model.all_tied_weights_keys)
    members = [*named_structures(model), *named_shared_parts(model)]
    return [f"{name}.{key}" for name, module in members for key in module.state_dict() if f"{name}.{key}" not in tied]


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def renamed(name):
    return lambda weights: {key if key != name else f"{key}_old": value for key, value in weights.items()}


def reshaped(name):
    return lambda weights: {**weights, name: torch.zeros(*weights[name].shape, 1)}


def beside(name):
    return lambda weights: {**weights, f"{name}_stray": torch.zeros(2)}


def damaged(folder, copy, damage):
    """A copy of a saved folder whose weights were damaged."""
    shutil.copytree(folder, copy)
    for path in copy.glob("*.safetensors"):
        save_file(damage(load_file(path)), path, {"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def models():
    return {name: build_every_structure(HEAD, structures_with(name)) for name in CHOSEN}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return root


def damages(model):
    """One damage of each kind to the numbers of a structure or of what structures share; and to the host's."""
    names = of_structures(model)
    shared = [name for name, _ in named_shared_parts(model)]
    yield from (without(names[0]), renamed(names[-1]), beside(names[0]), without("bert.embeddings.LayerNorm.weight"))
    yield from (without(next(name for name in names if name.startswith(part))) for part in shared[:1])


def refused(folders, models, root):
    for name, model in models.items():
        for number, damage in enumerate(damages(model)):
            yield damaged(folders / name, root / f"{name}-{number}", damage)


def test_weights_that_do_not_fit_are_refused_with_the_library(folders, models, tmp_path):
    for folder in refused(folders, models, tmp_path):
        with pytest.raises(PlanError, match="do not fit its plan"):
            getattr(hf_lowrank, f"LowRank{HEAD}").from_pretrained(folder)


def test_weights_that_do_not_fit_are_refused_without_the_library_in_every_way_of_loading(folders, models, tmp_path):
    every = [(str(folder), WAYS["base"]) for folder in refused(folders, models, tmp_path)]
    cases = [case for case in every if case[0].endswith("-0") or "joint" in case[0]]  # missing; and of all kinds
    lost = damaged(folders / "low_rank", tmp_path / "lost", without(of_structures(models["low_rank"])[0]))
    other = damaged(folders / "low_rank", tmp_path / "other", reshaped(of_structures(models["low_rank"])[0]))
    models["low_rank"].save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = damaged(tmp_path / "shards", tmp_path / "lost-shards", without(of_structures(models["low_rank"])[0]))
    cases += [(str(lost), way) for way in WAYS.values()]
    cases += [(str(other), WAYS["any shapes"]), (str(shards), WAYS["base"])]

    run_elsewhere(CHILD, tmp_path, cases=cases)


def test_a_head_that_was_saved_may_not_be_missing_but_another_may(folders, tmp_path):
    folder = damaged(folders / "low_rank", tmp_path / "headless", without("cls.predictions.transform.dense.weight"))

    with pytest.raises(PlanError, match=r"missing, such as 'cls\.predictions\.transform\.dense\.weight'"):
        hf_lowrank.LowRankBertForMaskedLM.from_pretrained(folder)
    assert hf_lowrank.LowRankBertForTokenClassification.from_pretrained(folder)


def test_another_number_of_labels_is_drawn_anew_where_the_user_says_so(tmp_path):
    compress(build("BertForSequenceClassification"), keep_targets=0.5, method="svd").save_pretrained(tmp_path)
    load = hf_lowrank.LowRankBertForSequenceClassification.from_pretrained

    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path, num_labels=5)
    assert load(tmp_path, num_labels=5, ignore_mismatched_sizes=True).classifier.out_features == 5


@pytest.mark.parametrize("name", TABLES)
def test_an_untied_head_that_was_not_saved_is_drawn_and_the_table_is_not(name, models, tmp_path):
    models[name].bert.save_pretrained(tmp_path)

    model, info = hf_lowrank.LowRankBertForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)

    assert all(key.startswith("cls.") for key in info["missing_keys"])
    assert all(
        torch.equal(value, model.bert.state_dict()[key]) for key, value in models[name].bert.state_dict().items()
    )


@pytest.mark.parametrize("damage", [without, reshaped, beside])
@pytest.mark.parametrize("name", CHOSEN)
def test_weights_that_do_not_fit_are_not_saved(name, damage, models, tmp_path):
    model = models[name]
    state = damage(of_structures(model)[0])(model.state_dict())

    with pytest.raises(PlanError, match="The weights to be saved do not fit its plan"):
        model.save_pretrained(tmp_path, state_dict=state)

    assert not list(tmp_path.glob("*.safetensors"))


def test_a_folder_whose_weights_do_not_fit_never_appears(models, tmp_path):
    model = build_every_structure(HEAD, ["low_rank"])
    model.bert.encoder.layer[0].output.dense = nn.Linear(70, 36)

    with pytest.raises(PlanError, match="do not fit its plan"):
        save_folder(model, tmp_path / "out")

    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("load", ["load_state_dict", "load_model"])
@pytest.mark.parametrize("name", CHOSEN)
def test_a_saved_file_is_loaded_strictly_by_torch_and_by_safetensors(name, load, models, folders):
    model = build_every_structure(HEAD, structures_with(name))
    inputs, file = inputs_for(HEAD), folders / name / "model.safetensors"
    for parameter in model.parameters():
        nn.init.zeros_(parameter)

    if load == "load_model":
        safetensors_load_model(model, file, strict=True)
    else:
        tied = {key: value for key, value in model.state_dict().items() if key not in load_file(file)}
        model.load_state_dict({**tied, **load_file(file)}, strict=True)

    assert all(torch.equal(outputs(model, inputs)[key], value) for key, value in outputs(models[name], inputs).items())


def test_every_structure_and_shared_part_is_damaged_here(models):
    members = [module for model in models.values() for module in model.modules()]
    expected = {*(STRUCTURES[name] for name in OF_ANY_MODEL), *SHARED_PARTS.values()}
    assert expected <= {type(module) for module in members}


class PutsNewParameters(ConversionOps):
    """What quantizers do to weights they load: a new parameter, without transformers' mark, takes their place."""

    def __init__(self, hf_quantizer):
        pass

    def convert(self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs):
        module = model.get_submodule(full_layer_name.rpartition(".")[0])
        module.weight = nn.Parameter(next(iter(input_dict.values()))[0].clone())
        module._is_hf_initialized = True
        missing_keys.discard(full_layer_name)
        return {}


@register_quantization_config("puts_new_parameters")
class NewParametersConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        self.quant_method = "puts_new_parameters"


@register_quantizer("puts_new_parameters")
class NewParametersQuantizer(HfQuantizer):
    requires_calibration = False
    is_trainable = True

    def is_serializable(self):
        return False

    def param_needs_quantization(self, model, param_name, **kwargs):
        name, _, leaf = param_name.rpartition(".")
        return leaf == "weight" and isinstance(model.get_submodule(name), nn.Linear)

    def get_quantize_ops(self):
        return PutsNewParameters(self)


@pytest.mark.parametrize("name", CHOSEN)
def test_what_a_quantizer_puts_in_the_place_of_loaded_weights_is_not_drawn_again(name, models, folders):
    load = getattr(hf_lowrank, f"LowRank{HEAD}").from_pretrained
    model = load(folders / name, quantization_config=NewParametersConfig())

    expected = models[name].state_dict()
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, expected[key])} == set()
