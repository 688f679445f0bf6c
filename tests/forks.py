"""Processes that cost no start of torch: forks of one that has imported it and transformers, and nothing else.

That one has never seen hf_lowrank: a fork that blocks it is the machine of whoever loads a model. Each has an
environment, a working folder and caches of its own, as if it had begun with them.
"""

import importlib
import io
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

_FORKS = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "torch._dynamo",
    "transformers.trainer",
    "transformers.pipelines",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "safetensors.torch",
]
_FORKS.set_forkserver_preload(_PRELOADED)


def run_forked(command, folder, processes=1):
    """Run a Python program with its arguments in a folder; as ranks of one job if there are several processes.

    Returns:
        What they printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    said, forks = Path(folder) / "said.txt", []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        forks.append(_start([*map(str, command)], folder, environment | ranks, said))
    codes = [_end(fork) for fork in forks]
    printed = said.read_text(encoding="utf-8")
    assert codes == [0] * processes, printed[-3000:]
    return printed


def run_in_fork(command, *, cwd=".", env=None, input="", **_):
    """What `subprocess.run` does with `[python, *options, program, *arguments]`, its two outputs in one."""
    env = dict(os.environ) if env is None else env
    program = next(place for place, word in enumerate(command[1:], 1) if word == "-c" or not word.startswith("-"))
    with TemporaryDirectory() as folder:
        said = Path(folder) / "said.txt"
        code = _end(_start(command[program:], cwd, env, said, input))
        printed = said.read_text(encoding="utf-8")
        return CompletedProcess(command, code, printed, printed)


def _start(command, folder, environment, said, given=""):
    fork = _FORKS.Process(target=_program, args=(command, str(folder), environment, said, given))
    # A fork runs its parent's main program once more, which may import hf_lowrank: it is given an empty one.
    with mock.patch.dict(sys.modules, __main__=ModuleType("__main__")):
        fork.start()
    return fork


def _end(fork):
    fork.join()
    return fork.exitcode


def _program(command, folder, environment, said, given):
    with said.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.stdin = io.StringIO(given)
    _live_in(environment)
    if command[0] == "-c":
        sys.argv = command[:1] + command[2:]
        exec(compile(command[1], "-c", "exec"), {"__name__": "__main__"})
        return
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def _live_in(environment):
    """Take an environment, and have the libraries read again what they read of one at their import."""
    os.environ.clear()
    os.environ.update(environment)
    constants = importlib.reload(sys.modules["huggingface_hub.constants"])
    sys.path = [place for place in sys.path if not Path(place, "transformers_modules").exists()]
    modules = environment.get("HF_MODULES_CACHE", str(Path(constants.HF_HOME) / "modules"))
    for name in ("transformers.utils.hub", "transformers.utils", "transformers.dynamic_module_utils"):
        sys.modules[name].HF_MODULES_CACHE = modules


def _free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]
