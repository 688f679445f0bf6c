"""Two processes (gloo) have the losses of one with the same global batch, whatever is trained."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_tokenizers
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from forks import run_forked
from sharded_elsewhere import CASES, MIXED
from trainings_elsewhere import TRAININGS

from hf_lowrank import compress
from hf_lowrank.sharing.saving import load_compressed

ROOT = Path(__file__).resolve().parents[1]
CONFIGURATIONS = ROOT / "examples" / "accelerate"
TRAININGS_ELSEWHERE = ROOT / "tests" / "trainings_elsewhere.py"
SHARDED_ELSEWHERE = ROOT / "tests" / "sharded_elsewhere.py"
MIXED_RANK = CONFIGURATIONS / "mixed_rank.py"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_end_with_one_model(tmp_path):
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        folder.mkdir()
        run_forked([TRAININGS_ELSEWHERE, folder], folder, processes=count)
        each = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]
        assert [one["processes"] for one in each] == [count] * count
        found += [one["found"] for one in each]
    alone, first, second = found

    assert list(alone) == list(TRAININGS)
    assert first == second
    for name, training in alone.items():
        assert len(training["losses"]) >= 3, name
        assert first[name]["losses"] == pytest.approx(training["losses"], abs=1e-5), name
        # Adam takes a step of one size where a gradient is rounding alone.
        assert first[name]["says"] == pytest.approx(training["says"], abs=3e-4), name


@pytest.mark.slow
def test_a_sharded_model_trains_and_says_as_the_whole_one(tmp_path):
    run_forked([SHARDED_ELSEWHERE, tmp_path], tmp_path, processes=2)
    largest = {case: max(found) for case, found in json.loads((tmp_path / "differences.json").read_text()).items()}

    assert list(largest) == [*CASES, MIXED]
    assert {case: found for case, found in largest.items() if not found < 1e-5} == {}


def launched(command, folder):
    """What a program printed that accelerate launches in two processes, as users do."""
    options = ["--main_process_port", "0", "--config_file", CONFIGURATIONS / "two_processes.yaml"]
    return run_forked([launch.__file__, *options, *command], folder)


@pytest.mark.slow
@pytest.mark.parametrize("consistency", [0.0, 0.5])
def test_mixed_rank_training_in_an_accelerate_loop(consistency, tmp_path):
    command = [MIXED_RANK, "--smoke", "--consistency", str(consistency), "--out", tmp_path / "out"]
    alone = run_forked(command, tmp_path)
    together = launched(command, tmp_path) if consistency else run_forked(command, tmp_path, processes=2)
    found = [json.loads(next(reversed([line for line in said.splitlines() if line.startswith("{")])))
             for said in (alone, together)]  # fmt: skip

    assert [one["processes"] for one in found] == [1, 2]
    assert found[1]["losses"] == pytest.approx(found[0]["losses"], abs=1e-5)
    assert len(set(found[0]["losses"])) == 6


@pytest.mark.slow
@pytest.mark.parametrize("command", ["recover", "lpaf"])
def test_a_command_in_two_processes_writes_and_prints_once(command, tmp_path):
    dense = tiny_models.build("BertForSequenceClassification", vocab_size=30)
    for model, name in ((dense, "dense"), (compress(dense, rank=4, method="svd"), "small")):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizers.encoder_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"text": f"{'abcdefgh'[i % 8]} b c", "label": i % 2} for i in range(32)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_command = {
        "recover": ["small", "out", "--teacher", "dense", "--epochs", "1"],
        "lpaf": ["dense", "out", "--keep-targets", "0.5", "--prune-epochs", "1", "--tune-epochs", "1"],
    }
    hf_lowrank = shutil.which("hf-lowrank", path=str(Path(sys.executable).parent))

    command_line = [hf_lowrank, command, *of_command[command], "--dataset", "train.jsonl"]
    said = run_forked(command_line, tmp_path, processes=2)

    assert said.count("saved:") == 1
    assert load_compressed(tmp_path / "out").num_parameters() < dense.num_parameters()


@pytest.mark.parametrize("path", sorted(CONFIGURATIONS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration(path):
    assert load_config_from_file(str(path)).num_processes == (1 if path.stem == "one_process" else 2)


def test_the_sharding_plugin_is_of_the_second_version(monkeypatch):
    settings = yaml.safe_load((CONFIGURATIONS / "fsdp2.yaml").read_text())["fsdp_config"]
    for name, value in settings.items():
        monkeypatch.setenv(name.upper(), str(value))

    assert FullyShardedDataParallelPlugin().fsdp_version == 2
