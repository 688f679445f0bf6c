"""Runs Python where hf_lowrank cannot be imported, with caches of its own: the machine of whoever loads a model."""

import json
import os
import sys
from pathlib import Path

import torch
from forks import run_in_fork
from tiny_models import inputs_for, outputs

PREAMBLE = """
import json, sys
from importlib.abc import MetaPathFinder

class Blocked(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_lowrank":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)")

sys.meta_path.insert(0, Blocked())
jobs = json.loads(sys.stdin.read())
sys.path.insert(0, jobs["tests"])
import torch
import transformers

torch.set_num_threads(1)
"""

COMPUTING = """
from tiny_models import inputs_for, outputs
from transformers.dynamic_module_utils import get_class_from_dynamic_module

results = {}
for folder, head in jobs["cases"]:
    load = get_class_from_dynamic_module(f"modeling_lowrank.LowRank{head}", folder).from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), (folder, info)
    results[folder] = outputs(model.eval(), inputs_for(head))
torch.save(results, "results.pt")
"""


def run_elsewhere(code, folder, environment=None, **jobs):
    """Run `code`, which finds what it is given in `jobs`; its caches are made in `folder`, which it runs in."""
    allowed = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    caches = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONNOUSERSITE": "1"}
    done = run_in_fork(
        [sys.executable, "-c", PREAMBLE + code],
        input=json.dumps({"tests": str(Path(__file__).parent), **jobs}),
        env={**allowed, **caches, **(environment or {})},
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def assert_same_elsewhere(cases, folder):
    """Models are saved in the folder, and one process without this library computes the same with them.

    Args:
        cases: Name of a case -> the dense model's class and the compressed model.
    """
    for name, (_, model) in cases.items():
        model.save_pretrained(folder / name)
    run_elsewhere(COMPUTING, folder, cases=[(str(folder / name), head) for name, (head, _) in cases.items()])
    results = torch.load(folder / "results.pt")
    for name, (head, model) in cases.items():
        expected, found = outputs(model, inputs_for(head)), results[str(folder / name)]
        assert expected.keys() == found.keys(), name
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), name
