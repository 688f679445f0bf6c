"""Commands that are killed at any moment lose nothing, and the next run leaves nothing of them behind.

Each command is run once to its end, to know how long it takes, and then killed with -9 at random moments, and ended by
the two signals that it listens to, in processes forked from this one, which has imported everything. The seed is
printed where a test fails: HF_LOWRANK_KILLS=SEED.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from tiny_files import write_data, write_models

from hf_lowrank import compress
from hf_lowrank.cli import INTERRUPTED, TERMINATED, card, evaluate, main, push, recover
from hf_lowrank.cli import compress as compress_command
from hf_lowrank.sharing import hub
from hf_lowrank.sharing.saving import load_compressed, save_folder
from hf_lowrank.sharing.verification import Verification

IMPORTED = (card, compress_command, evaluate, push, recover)
# Of each command; twenty in all. Half of a push is the upload of its weights.
KILLS = {"card": 4, "evaluate": 4, "compress": 4, "recover": 2, "push": 6}
SEED = int(os.environ.get("HF_LOWRANK_KILLS", random.SystemRandom().getrandbits(32)))
# Exit statuses: of a run that was over, of one that a signal ended and, before it listens to them, of one cut off.
ENDS = {signal.SIGKILL: (0, -9), signal.SIGTERM: (0, TERMINATED, -15), signal.SIGINT: (0, INTERRUPTED, -2, 1)}
REPO = "user/small"
COMMANDS = {
    "card": ["card", "small", "--license", "mit"],
    "evaluate": [
        "evaluate", "small", "--dataset", "dev.tsv", "--task", "text-classification", "--record", "--no-cost",
    ],
    "compress": ["compress", "my-bert", "small", "--keep-params", "0.7", "--method", "svd", "--overwrite"],
    "recover": [
        "recover", "small", "out", "--teacher", "my-bert", "--dataset", "train.tsv", "--epochs", "1",
        "--max-examples", "8", "--overwrite",
    ],
    "push": ["push", "small", REPO],
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_models(folder)
    write_data(folder)
    small = compress(folder / "my-bert", keep_params=0.6, method="svd")
    save_folder(small, folder / "small", folder / "my-bert")
    save_folder(small, folder / "out", folder / "my-bert")
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A working folder with models and data, and a folder of temporary files."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "work"))
    return tmp_path


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture
def client(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub, "verify", lambda *_: Verification(True, "proved"))
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


def run(argv):
    torch.set_num_threads(1)  # OpenMP's threads are not forked
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(main(argv))


def start(argv):
    process = multiprocessing.get_context("fork").Process(target=run, args=(argv,))
    process.start()
    return process


def finish(argv):
    began = time.monotonic()
    process = start(argv)
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - began


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_whole(folder):
    """Old or new, a folder is one that loads, and its record is whole."""
    if not folder.exists():  # killed in the instant between two renames: the next run puts it back
        folder = next(folder.parent.glob(".hf_lowrank-*/replaced"))
    load_compressed(folder)
    assert json.loads((folder / "compression_report.json").read_text())["modules"]
    assert "hf_lowrank" in (folder / "README.md").read_text()


def check_published(server):
    """All files of a commit, or none."""
    for files in server.repos[REPO].commits.values() if REPO in server.repos else ():
        assert set(files) == {".gitattributes"} or {"config.json", "model.safetensors", "README.md"} <= set(files)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_kill_loses_nothing_and_the_next_run_leaves_nothing(place, server, client, command):
    print(f"HF_LOWRANK_KILLS={SEED}")  # noqa: T201
    draw, work = random.Random(f"{SEED} {command}"), place / "work"
    sources = {name: tree(work / name) for name in ("my-bert", "small") if name not in COMMANDS[command][1:3]}
    lasts = finish(COMMANDS[command])
    names = set(os.listdir(work))  # noqa: PTH208
    for one in [signal.SIGKILL] * KILLS[command] + [signal.SIGTERM, signal.SIGINT]:
        process = start(COMMANDS[command])
        time.sleep(draw.uniform(0, lasts))
        os.kill(process.pid, one)
        process.join()
        assert process.exitcode in ENDS[one], one
        check_whole(work / "small")
        check_whole(work / "out")
        check_published(server)

    finish(COMMANDS[command])

    check_whole(work / "small")
    assert set(os.listdir(work)) == names  # noqa: PTH208
    assert not list(place.rglob(".hf_lowrank-*"))
    assert not list((place / "tmp").iterdir())
    assert all(tree(work / name) == before for name, before in sources.items())
