"""Every example runs, at a size for a test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from tiny_models import build

from hf_lowrank import compress
from hf_lowrank.saving import save_folder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMOKE = sorted(path for path in EXAMPLES.glob("*.py") if "--smoke" in path.read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("path", SMOKE, ids=lambda path: path.name)
def test_it_runs_at_its_smoke_size(path, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, path, "--smoke"]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.strip()


def test_every_example_has_a_smoke_size_or_is_run_otherwise():
    others = {"demo.py", "share_on_the_hub.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} - {path.name for path in SMOKE} <= others


@pytest.mark.slow
def test_a_model_is_shared_and_loaded_by_name(tmp_path):
    small = compress(build("BertModel"), keep_params=0.6, method="svd")
    folder = save_folder(small, tmp_path / "small")

    with HubServer() as server:
        environment = {**os.environ, **server.environment(), "PYTHONPATH": str(EXAMPLES.parent)}
        command = [sys.executable, EXAMPLES / "share_on_the_hub.py", folder, "user/small", "--private"]
        found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert found.returncode == 0, found.stderr[-2000:]
    assert "model.safetensors" in found.stdout
    assert f"loaded: LowRankBertModel of {sum(p.numel() for p in small.parameters()):,} parameters" in found.stdout
    assert server.repos["user/small"].private
