"""What every test gets: no network, one thread, a fixed seed, and a cache of its own."""

import atexit
import gc
import os
import random
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

# Read by the libraries when they are imported; subprocesses of the tests inherit it.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf_lowrank-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Else MKL rounds by where operands lie in memory on some processors, and equal models differ in their last bits.
os.environ["MKL_CBWR"] = "AUTO,STRICT"

import huggingface_hub
import hypothesis
import numpy as np
import pytest
import torch
import transformers
from forks import run_in_fork
from fuzzing import SEED
from hub_server import HubServer
from laws import FOLDERS, folder_of

from hf_lowrank import progress
from hf_lowrank.methods.rows import nonlinear_method
from hf_lowrank.methods.rows.nonlinear_autoencoder import RowTraining
from hf_lowrank.methods.trains import tensor_train
from hf_lowrank.sharing import verification

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("fixed")

progress.SECONDS_A_LINE = float("inf")  # what is written on standard error is not to hang on how fast a test is
os.fsync = lambda descriptor: None  # no test takes the power away, and disks are slow
# The proof's own process is a fork, but where a test says that it is to be none.
verification.subprocess = SimpleNamespace(run=run_in_fork, DEVNULL=subprocess.DEVNULL)

SHARED = Path(__file__).resolve().parents[2] / "shared"
# Files of tests that take the most time, the longest first: begun last, one would keep its worker busy alone.
LONGEST_FIRST = (
    "test_training_processes", "test_docs", "test_training_recovery", "test_reload", "test_fuzz", "test_export",
    "test_streaming", "test_tensor_compression", "test_planning", "test_architectures", "test_hub_round_trip",
    "test_every_architecture",
    "test_data_aware_compression", "test_training_lpaf", "test_host_features", "test_examples", "test_compression",
    "test_nonlinear_table", "test_autoencoder_linear", "test_verification", "test_training_pruning", "test_evaluate",
    "test_weights", "test_training_mixed_rank", "test_solvers",
)  # fmt: skip


def pytest_configure(config):
    for name in FOLDERS:
        config.addinivalue_line("markers", f"{name}: of hf_lowrank/{name}")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    folders = {path: folder_of(path) for path in {item.path for item in items}}
    for item in items:
        if {"data_dir", "models_dir"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("realdata")
        if not any(item.iter_markers("slow")) and not any(item.iter_markers("realdata")):
            item.add_marker("laws")
        if folders[item.path]:
            item.add_marker(folders[item.path])
    rank = {name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # what was imported stays: it need not be looked through again and again


@pytest.fixture
def process_of_its_own(monkeypatch):
    """A folder is verified as users have it: in a process that starts from nothing."""
    monkeypatch.setattr(verification, "subprocess", subprocess)


@pytest.fixture(autouse=True)
def seed():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (the libraries under test use the global generator)
    torch.manual_seed(0)
    return 0


@pytest.fixture
def hardly_trained(monkeypatch):
    """Non-linear decoders and tensor trains are fitted in a few steps, for laws that hold however good they are."""
    few = partial(nonlinear_method.train_rows, training=RowTraining(steps=6))
    monkeypatch.setattr(nonlinear_method, "train_rows", few)
    monkeypatch.setattr(tensor_train, "_MOST_SWEEPS", 3)
    monkeypatch.setattr(tensor_train, "_CONJUGATE_STEPS", 6)


def folder_or_skip(variable, default):
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"no folder {folder} ({variable})")
    return folder


@pytest.fixture(scope="session")
def data_dir():
    """Real data sets; a test that asks for it is marked `realdata`."""
    return folder_or_skip("HF_LOWRANK_DATA", SHARED / "data")


@pytest.fixture(scope="session")
def models_dir():
    """Real trained models; a test that asks for it is marked `realdata`."""
    return folder_or_skip("HF_LOWRANK_MODELS", SHARED / "models")


@pytest.fixture
def our_hub(monkeypatch):
    """The Hub of this process, on loopback, where we are `me`."""
    with HubServer() as server:
        server.users[server.token] = "me"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"  # of the downloads; made at import
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


def pytest_terminal_summary(terminalreporter):
    terminalreporter.line(f"fuzz tests: HF_LOWRANK_FUZZ_SEED={SEED}")
