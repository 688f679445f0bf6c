"""Two processes with gloo have the losses of one with the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATIONS = ROOT / "examples" / "accelerate"


def run(command, tmp_path):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("consistency", [0.0, 0.5])
def test_mixed_rank_training_in_an_accelerate_loop(consistency, tmp_path):
    losses = []
    for name in ("one_process", "two_cpu_processes"):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGURATIONS / f"{name}.yaml",
                  "--main_process_port", "0"]  # fmt: skip
        script = [CONFIGURATIONS / "mixed_rank.py", "--smoke", "--consistency", str(consistency)]
        found = run([*launch, *script, "--out", tmp_path / name], tmp_path)
        losses.append(json.loads(next(line for line in found.splitlines() if line.startswith("["))))

    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert len(set(losses[0])) == 6


@pytest.mark.slow
def test_distillation_with_a_trainer(tmp_path):
    script = ROOT / "tests" / "distillation_elsewhere.py"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    losses = []
    for start in ([sys.executable], launch):
        found = run([*start, script, tmp_path / "out"], tmp_path)
        line = next(line for line in found.splitlines() if "LOSSES" in line)
        losses.append(json.loads(line.partition("LOSSES")[2]))

    assert len(losses[0]) == 4
    for one, two in zip(*losses, strict=True):
        assert two == pytest.approx(one, abs=1e-5)


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    assert load_config_from_file(str(path)).num_processes == (1 if path.stem == "one_process" else 2)


def test_the_sharding_plugin_is_of_the_second_version(monkeypatch):
    settings = yaml.safe_load((CONFIGURATIONS / "fsdp2.yaml").read_text())["fsdp_config"]
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(value))

    assert FullyShardedDataParallelPlugin().fsdp_version == 2
