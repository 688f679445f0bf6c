"""`doctor` fits one screen, names what is wrong and what to do, and fails only where something does not work."""

import importlib.metadata
import json
import mmap
import os
import platform
import subprocess
import sys

import huggingface_hub
import pytest
import torch
from tiny_models import build
from tiny_tokenizers import encoder_tokenizer

from hf_lowrank import compress
from hf_lowrank.cli import main
from hf_lowrank.studies import doctor


@pytest.fixture
def folder(tmp_path):
    compress(build("BertModel"), keep_params=0.6, method="svd").save_pretrained(tmp_path)
    encoder_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def finding(name, path=None):
    return next((found for found in doctor.diagnose(path) if found.name == name), None)


def test_it_fits_one_screen(folder, capsys):
    assert main(["doctor", str(folder)]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert 6 <= len(lines) <= 20
    assert f"torch {torch.__version__}" in lines[0]


def test_every_finding_that_is_not_ok_says_what_to_do(folder, capsys):
    main(["doctor", str(folder), "--json"])

    findings = json.loads(capsys.readouterr().out)["findings"]
    assert all(found["remedy"] for found in findings if found["verdict"] != doctor.OK)


@pytest.mark.parametrize(
    ("installed", "expected"),
    [("4.40.0", "transformers is 4.40.0, needed is >=5.10"), (None, "transformers is missing")],
)
def test_a_library_that_is_too_old_or_missing_is_a_problem(monkeypatch, capsys, installed, expected):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["transformers>=5.10", 'x>=1; extra == "plot"'])
    monkeypatch.setattr(importlib.metadata, "version", version)

    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert expected in printed
    assert "pip install 'transformers>=5.10'" in printed


def test_an_extra_that_is_not_installed_is_a_hint(monkeypatch):
    requires = ['no-such-thing>=1; extra == "plot"', 'nor-this>=1; extra == "dev"', "transformers>=5.0"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: requires)

    found = finding("extras")

    assert (found.verdict, found.remedy) == (doctor.HINT, "pip install 'hf-lowrank[plot]'")


def test_idle_cores_are_a_hint(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    assert finding("processor").remedy == "unset OMP_NUM_THREADS (it is 1)"


def test_a_cache_that_cannot_be_written_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "_is_writable", lambda folder: folder != tmp_path)

    found = finding("Hub cache")

    assert (found.verdict, found.remedy) == (doctor.PROBLEM, "set HF_HOME to a folder of yours")


@pytest.mark.parametrize(
    ("pages", "faults", "verdict"),
    [("always [madvise] never", 16384, doctor.HINT), ("always [madvise] never", 32, doctor.OK), ("[never]", 1, None)],
)
def test_large_outputs_in_small_pages_are_named_where_there_are_large_ones(
    monkeypatch, tmp_path, pages, faults, verdict
):
    (tmp_path / "enabled").write_text(pages)
    monkeypatch.setattr(doctor, "_LARGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr(doctor, "_faults_of_large_output", lambda: faults)

    found = finding("memory")

    assert (found and found.verdict) == verdict
    assert verdict != doctor.HINT or "THP_MEM_ALLOC_ENABLE=1" in found.remedy


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the variables are of glibc")
def test_memory_that_is_kept_is_not_faulted_in_again():
    code = "from hf_lowrank.studies import doctor; print(doctor._faults_of_large_output())"
    kept = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}

    run = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | kept, capture_output=True, text=True, check=True
    )

    assert int(run.stdout) < doctor._LARGE_OUTPUT // mmap.PAGESIZE / 100


@pytest.mark.parametrize(("is_offline", "verdict"), [(True, doctor.HINT), (False, doctor.OK)])
def test_being_offline_is_said(monkeypatch, is_offline, verdict):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)

    assert finding("Hub").verdict == verdict


def test_a_token_is_said_to_be_there_and_not_shown(monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecret")

    main(["doctor"])

    printed = capsys.readouterr().out
    assert "with a token" in printed
    assert "hf_secret" not in printed


def test_a_dense_model_may_have_its_weights_in_the_older_format(tmp_path):
    model = build("BertModel")
    model.save_pretrained(tmp_path)
    assert finding("weights", tmp_path).verdict == doctor.OK

    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert finding("weights", tmp_path) is None
    (tmp_path / "pytorch_model.bin").unlink()
    assert finding("weights", tmp_path).verdict == doctor.PROBLEM


@pytest.mark.parametrize(
    ("lost", "name", "expected"),
    [
        ("tokenizer", "tokenizer", "pipelines do not load"),
        ("modeling_lowrank.py", "shipped code", "modeling_lowrank.py is missing"),
        ("config.json", "model", "no readable config.json"),
    ],
)
def test_what_a_folder_lacks_is_a_problem(folder, capsys, lost, name, expected):
    for path in folder.glob(f"{lost}*"):
        path.unlink()

    found = finding(name, folder)

    assert found.verdict == doctor.PROBLEM
    assert expected in found.found
    assert main(["doctor", str(folder)]) == 1


@pytest.mark.parametrize(
    "odd", [5, "x", [], {}, None, {"AutoModel": 5}, {"AutoModel": "lost.Model"}, [[]], [{"a": 1}]]
)
def test_an_odd_map_of_classes_is_a_problem_by_its_own_name(folder, odd):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": odd}))

    found = finding("shipped code", folder)

    assert found.verdict == doctor.PROBLEM
    assert found.found.startswith("lost.py is" if "lost" in str(odd) else "auto_map is")
