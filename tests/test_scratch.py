"""Every file and folder appears whole or not at all, and what a dead process left is cleared by the next."""

import ast
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build
from tiny_tokenizers import encoder_tokenizer

import hf_lowrank
from hf_lowrank import InputError, compress
from hf_lowrank.files.checkpoint import Checkpoint
from hf_lowrank.files.scratch import REPLACED, claimed, scratch_folder, temporary_folder, workshop, write_text
from hf_lowrank.methods.matrix.stored import store_decomposition
from hf_lowrank.methods.matrix.svd import SVD
from hf_lowrank.records.report import QualityReport, make_report
from hf_lowrank.sharing import saving
from hf_lowrank.sharing.record import write_record
from hf_lowrank.sharing.saving import save_folder
from hf_lowrank.statistics.running_sums import RunningSums
from hf_lowrank.studies.comparison_record import append_line
from hf_lowrank.training.callbacks.best import BestStateCallback

QUALITY = QualityReport(
    "causal-lm", "a/b", None, "test", True, None, "perplexity", False, {}, {"perplexity": 2.0}, {}, ""
)


@pytest.fixture(scope="module")
def small():
    return compress(build("BertModel"), keep_params=0.6, method="svd")


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def full_disk():
    """No file can grow beyond a few bytes: what the kernel says of a disk that is full, for every way to write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def keep_best(folder, number):
    best = BestStateCallback()
    model = torch.nn.Linear(8, 8)
    args, state = SimpleNamespace(output_dir=folder), SimpleNamespace(is_world_process_zero=True, global_step=number)
    best.on_evaluate(args, state, None, metrics={"eval_loss": float(number)}, model=model)


def sum_up(folder, number):
    with RunningSums(folder / "sums", {}) as sums:
        sums.add("a", torch.full((1,), float(number)))
        sums.commit()
        sums.save({"format": f"number {number}"})


def write_report(small, number):
    report = make_report(small)
    return lambda folder: write_record(folder, replace(report, quality=(replace(QUALITY, dataset=f"a/{number}"),)))


def writers(small):
    """What the library keeps -> its writer, given a folder and a number that the content depends on."""
    return {
        "record, card and results": lambda folder, number: write_report(small, number)(folder),
        "text": lambda folder, number: write_text(folder / "text.json", f"{number}" * 40),
        "checkpoint": lambda folder, number: Checkpoint(folder, "state").save({"step": number}),
        "decomposition": lambda folder, number: store_decomposition(
            SVD().decompose(torch.eye(4) * number), folder / "matrix.safetensors"
        ),
        "statistics": sum_up,
        "best state": keep_best,
        "line of a comparison": lambda folder, number: append_line(folder / "lines", {"line": f"{number}" * 40}),
    }


@pytest.mark.parametrize("name", list(writers(None)))
def test_on_a_full_disk_what_was_written_before_stays_whole(small, tmp_path, name):
    write = writers(small)[name]
    write(tmp_path, 1)
    before = tree(tmp_path)

    with full_disk(), pytest.raises(Exception, match=r"large|EFBIG|failed|error|27"):
        write(tmp_path, 2)

    assert before.items() <= tree(tmp_path).items() or name == "line of a comparison"
    assert all(now.startswith(before[key]) for key, now in tree(tmp_path).items() if key in before)
    assert not list(tmp_path.glob(".hf_lowrank-*"))
    write(tmp_path, 2)
    assert tree(tmp_path) != before


# Calls that write, and the functions of the package that may make one without `write_file`: what they write is in a
# workshop that nobody keeps, or added to the end of a file.
WRITES = {"write_text", "write_bytes", "save", "save_file", "savefig", "mkdtemp", "TemporaryDirectory", "rename"}
MAY_WRITE = {
    ("scratch", "write_text"), ("scratch", "_new_folder"), ("scratch", "_clear"), ("saving", "_swap"),
    ("kept_on_disk", "__call__"),
    ("verification", "_ask_child"), ("verification_child", "main"), ("probes", "__init__"), ("plots", "save_page"),
}  # fmt: skip


def test_no_other_module_writes_a_file_in_its_place():
    found = set()
    for path in Path(hf_lowrank.__file__).parent.rglob("*.py"):
        if path.parent.name == "remote_code":
            continue
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                drafts = {id(node) for kept in ast.walk(function) if is_draft(kept) for node in ast.walk(kept)}
                calls = [node for node in ast.walk(function) if isinstance(node, ast.Call) and id(node) not in drafts]
                found |= {(path.stem, function.name) for call in calls if called(call) in WRITES and writes(call)}

    assert found <= MAY_WRITE


def is_draft(node):
    return isinstance(node, ast.Call) and called(node) == "write_file"


def called(call):
    return getattr(call.func, "attr", None) or getattr(call.func, "id", None)


def writes(call):
    """A method `save` of an object of this library is not the one that writes; `torch.save` is."""
    owner = getattr(getattr(call.func, "value", None), "id", None)
    is_ours = isinstance(call.func, ast.Name) and called(call) == "write_text"
    return not is_ours and (called(call) != "save" or owner == "torch")


def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "blob").write_text("of the cache")
    (tmp_path / "README.md").symlink_to(tmp_path / "blob")

    write_text(tmp_path / "README.md", "new")

    assert (tmp_path / "blob").read_text() == "of the cache"
    assert (tmp_path / "README.md").read_text() == "new"


def killed(function, *arguments, wait_for):
    """Run in a forked process, killed with -9 as soon as `wait_for()`."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    while not wait_for():
        time.sleep(0.01)
    child.kill()
    child.join()


def hold(target):
    with workshop(target) as shop:
        (shop / "new").write_text("half")
        time.sleep(60)


@pytest.mark.parametrize("make", ["file", "folder", "scratch"])
def test_what_a_killed_process_left_goes_with_the_next_and_what_lives_stays(tmp_path, monkeypatch, make):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with workshop(tmp_path / "alive") as alive:
        (alive / "new").write_text("mine")
        others = lambda: [left for left in tmp_path.glob(".hf_lowrank-*/new") if left.parent != alive]  # noqa: E731
        killed(hold, tmp_path / "scratch", wait_for=others)
        assert others()

        if make == "file":
            write_text(tmp_path / "text", "text")
        elif make == "folder":
            with workshop(tmp_path / "other"):
                pass
        else:
            scratch_folder(SimpleNamespace)

        assert not others()
        assert (alive / "new").read_text() == "mine"
    assert not alive.exists()


def test_a_folder_that_was_about_to_be_replaced_is_put_back(tmp_path):
    left = tmp_path / ".hf_lowrank-my-model-abcdefgh"
    (left / REPLACED).mkdir(parents=True)
    (left / REPLACED / "config.json").write_text("old")

    with temporary_folder(), workshop(tmp_path / "my-model"):
        assert (tmp_path / "my-model" / "config.json").read_text() == "old"
    assert not left.exists()


def write_often(path, number):
    for index in range(40):
        Checkpoint(path, "shared").save({"by": number, "index": index, "numbers": torch.zeros(2000)})


def test_processes_that_write_the_same_files_do_not_meet(tmp_path):
    processes = [
        multiprocessing.get_context("fork").Process(target=write_often, args=(tmp_path, number)) for number in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()

    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert Checkpoint(tmp_path, "shared").load()["index"] == 39
    assert [path.name for path in tmp_path.iterdir()] == ["shared.pt"]


def compress_with(cache):
    torch.set_num_threads(1)  # OpenMP's threads are not forked
    text = ["a film that is too long but never dull"] * 40
    dense = build("BertForMaskedLM")
    made = compress(dense, keep_params=0.6, cache_dir=cache, calibration=text, tokenizer=encoder_tokenizer())
    return sum(float(value.double().sum()) for value in made.state_dict().values())


def test_processes_that_share_a_cache_all_end_with_the_same(tmp_path):
    with ProcessPoolExecutor(3, multiprocessing.get_context("fork")) as pool:
        found = list(pool.map(compress_with, [str(tmp_path / "cache")] * 6))

    assert len(set(found)) == 1
    assert not [
        path for path in (tmp_path / "cache").rglob("*") if "partial" in path.name or "hf_lowrank" in path.name
    ]


def test_of_two_runs_that_began_before_either_ended_the_second_refuses(small, tmp_path, monkeypatch):
    out, copy = tmp_path / "out", saving._copy_side_files

    def other_run_ends(source, draft):
        monkeypatch.setattr(saving, "_copy_side_files", copy)
        save_folder(small, out)

    monkeypatch.setattr(saving, "_copy_side_files", other_run_ends)

    with pytest.raises(InputError, match="written meanwhile by another run"):
        save_folder(small, out, tmp_path / "source")

    assert (out / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def claim(target):
    with claimed(target):
        (target.parent / "claimed").touch()
        time.sleep(60)


def test_a_claim_is_of_one_run_and_ends_with_it(tmp_path):
    target = tmp_path / "new" / "out"
    with claimed(target):
        with pytest.raises(InputError, match="is being written by another run"), claimed(target):
            pass
        with claimed(tmp_path / "new" / "other"), temporary_folder():
            pass
    with claimed(target):
        pass
    assert not list(target.parent.iterdir())

    killed(claim, target, wait_for=(target.parent / "claimed").exists)
    with claimed(target):
        pass
    assert [path.name for path in target.parent.iterdir()] == ["claimed"]


TERMINATED = """
import sys, time
from hf_lowrank import cli
from hf_lowrank.files.scratch import scratch_folder, workshop
from pathlib import Path
def run(command, arguments):
    folder = scratch_folder(run)
    with workshop(Path(sys.argv[1]) / "out") as shop:
        (shop / "new").touch()
        time.sleep(60)
cli._run = run
sys.exit(cli.main(["inspect", "x"]))
"""


def test_sigterm_ends_a_run_as_an_interrupt_does(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    run = subprocess.Popen(
        [sys.executable, "-c", TERMINATED, str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(".hf_lowrank-out-*/new")):
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    complaint = run.communicate()[1]

    assert run.returncode == 143
    assert complaint == "hf-lowrank: terminated; no half-written folder is left.\n"
    assert not list(tmp_path.iterdir())
