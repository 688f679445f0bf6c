"""Every example runs, at a size for a test."""

import runpy
import sys
import warnings
from pathlib import Path

import pytest
from forks import run_in_fork
from tiny_models import build

from hf_lowrank import compress
from hf_lowrank.sharing.saving import save_folder

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Other rows would be more of the same: one of each way through the program.
OPTIONS = {
    "benchmark_compression_time.py": ["--tiers", "fast"],
    "benchmark_runtimes.py": ["--keep-targets", "0.5"],
    "benchmark_quality.py": ["--methods", "plain SVD, uniform", "synthetic text", "default"],
    "benchmark_modules.py": [
        "--studies", "causal", "--methods", "row-normalised SVD, separate", "Tucker, heads together",
        "two-sided SVD, separate", "offline autoencoder, together",
    ],
}  # fmt: skip
SMOKE = sorted(path for path in EXAMPLES.glob("*.py") if "--smoke" in path.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example as a program of this process and those it starts as forks, for a start of torch costs more than
    most examples; says what it printed."""
    monkeypatch.setattr("subprocess.run", run_in_fork)

    def run(name, *options):
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a user's program does not stop at
            main = runpy.run_path(str(EXAMPLES / name))["main"]
            assert not main()
        return capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in SMOKE])
def test_it_runs_at_its_smoke_size(run, name):
    assert run(name, "--smoke", *OPTIONS.get(name, ())).strip()


def test_every_example_has_a_smoke_size_or_is_run_otherwise():
    others = {"demo.py", "share_on_the_hub.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} - {path.name for path in SMOKE} <= others


@pytest.mark.slow
def test_a_model_is_shared_and_loaded_by_name(run, tmp_path, our_hub):
    small = compress(build("BertModel"), keep_params=0.6, method="svd")
    folder = save_folder(small, tmp_path / "small")

    said = run("share_on_the_hub.py", folder, "me/small", "--private")

    assert "model.safetensors" in said
    assert f"loaded: LowRankBertModel of {sum(p.numel() for p in small.parameters()):,} parameters" in said
    assert our_hub.repos["me/small"].private
