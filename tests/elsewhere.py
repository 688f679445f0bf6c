"""Runs Python where hf_lowrank cannot be imported, with caches of its own: the machine of whoever loads a model."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


def run_elsewhere(code, folder, environment=None, **jobs):
    """Run `code`, which finds what it is given in `jobs`; its caches are made in `folder`, which it runs in."""
    allowed = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    caches = {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules"), "PYTHONNOUSERSITE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + code],
        input=json.dumps({"tests": str(Path(__file__).parent), **jobs}),
        env={**allowed, **caches, **(environment or {})},
        cwd=folder,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
