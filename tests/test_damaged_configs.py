"""A damaged config.json is told in one line, by the shipped code and by the library, before anything is built."""

import json
import shutil

import pytest
from elsewhere import run_elsewhere
from tiny_models import build
from transformers import AutoModelForMaskedLM

from hf_lowrank import InputError, PlanError, compress
from hf_lowrank.sharing.saving import load_compressed


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


def field(**fields):
    return lambda config: config.update(fields)


def plan(**fields):
    return lambda config: config["compression"].update(fields)


def structure(spec):
    return plan(modules={"encoder.layer.0.output.dense": spec})


# What is wrong -> how to make it so, and what the line says
DAMAGES = {
    "architectures is a number": (field(architectures=5), "architecture"),
    "architectures holds a number": (field(architectures=[5]), "architecture"),
    "architectures is an object": (field(architectures={"a": 1}), "architecture"),
    "dtype is a number": (field(dtype=5), "dtype must name a type"),
    "dtype is unknown": (field(dtype="float99"), "dtype must name a type"),
    "dtype is something else of torch": (field(dtype="nn"), "dtype must name a type"),
    "old name of dtype": (field(dtype=None, torch_dtype="float99"), "dtype must name a type"),
    "ten million layers": (field(num_hidden_layers=10**7), "num_hidden_layers must be at most 10000"),
    "deep": (field(extra=nested(150)), "nested more than"),
    "deep provenance": (plan(provenance={"deep": nested(150)}), "nested more than"),
    "no plan but a number": (field(compression=5), "compression must be a JSON object"),
    "plan of version 3": (plan(format_version=3), "format_version must be between 1 and 2, got 3"),
    "plan without a version": (plan(format_version=None), "format_version must be"),
    "plan of version true": (plan(format_version=True), "format_version must be"),
    "modules is null": (plan(modules=None), "modules must be a JSON object"),
    "modules is a list": (plan(modules=[]), "modules must be a JSON object"),
    "shared is a number": (plan(shared=5), "shared must be a JSON object"),
    "provenance is a text": (plan(provenance="me"), "provenance must be a JSON object"),
    "a spec is a list": (structure([1]), "structure must be one of"),
    "a structure is a list": (structure({"structure": ["low_rank"]}), "structure must be one of"),
    "a structure is an object": (structure({"structure": {}}), "structure must be one of"),
    "a rank is a list": (structure({"structure": "low_rank", "rank": [1]}), "rank must be a whole number"),
    "a rank is huge": (structure({"structure": "low_rank", "rank": 10**30}), "rank must be between 1 and"),
    "a list is shared": (structure({"structure": "low_rank", "rank": 3, "shared": ["a"]}), "low_rank shares nothing"),
    "head is a number": (plan(output_embeddings=0), "structure must be one of"),
}
CHILD = """
for folder in jobs["folders"]:
    try:
        transformers.AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
    except ValueError as error:
        jobs["folders"][folder] = str(error)
with open("said.json", "w") as file:
    json.dump(jobs["folders"], file)
"""
each_damage = pytest.mark.parametrize("name", DAMAGES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    compress(build("BertForMaskedLM"), keep_targets=0.5, method="svd").save_pretrained(root / "whole")
    for name, (damage, _) in DAMAGES.items():
        config = json.loads((root / "whole" / "config.json").read_text())
        damage(config)
        shutil.copytree(root / "whole", root / name)
        (root / name / "config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def said_elsewhere(folders):
    # The code is the same in all: under one name it is read once.
    paths = {}
    for name in DAMAGES:
        paths[name] = str(folders / "children" / name / "model")
        shutil.copytree(folders / name, paths[name])
    run_elsewhere(CHILD, folders, folders=dict.fromkeys(paths.values(), ""))
    said = json.loads((folders / "said.json").read_text())
    return {name: said[path] for name, path in paths.items()}


@each_damage
def test_shipped_code_says_in_one_line_what_is_wrong_in_a_config(said_elsewhere, name):
    assert DAMAGES[name][1] in said_elsewhere[name]
    assert "\n" not in said_elsewhere[name]


@each_damage
def test_the_library_says_in_one_line_what_is_wrong_in_a_config(folders, name):
    with pytest.raises((InputError, PlanError), match=DAMAGES[name][1]) as error:
        load_compressed(folders / name)
    assert "\n" not in str(error.value)


@each_damage
def test_where_the_library_is_imported_an_auto_class_says_it_in_one_line(folders, name):
    with pytest.raises(ValueError, match=DAMAGES[name][1]) as error:
        AutoModelForMaskedLM.from_pretrained(folders / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("depth", "message"), [(600, "config.json .* is damaged"), (100_000, "no readable config")])
def test_a_config_too_deep_to_be_read_is_told_in_one_line(folders, tmp_path, depth, message):
    text = (folders / "whole" / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("{", '{"deep": ' + "[" * depth + "]" * depth + ",", 1))

    with pytest.raises(InputError, match=message) as error:
        load_compressed(tmp_path)
    assert "\n" not in str(error.value)
