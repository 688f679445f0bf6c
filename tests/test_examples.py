"""Every example runs, at a size for a test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_example_has_a_smoke_size_or_is_the_demo():
    assert {path.name for path in EXAMPLES.glob("*.py")} - {path.name for path in SMOKE} <= {"demo.py"}
