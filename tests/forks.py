"""Programs in processes that cost no start of torch: forks of one that has imported it and done nothing else."""

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch._dynamo", "transformers.trainer", "hf_lowrank.training.lpaf", "hf_lowrank.cli"])


def run_forked(command, folder, processes=1):
    """Run a Python program with its arguments in a folder; as ranks of one job if there are several processes.

    Returns:
        What they printed.
    """
    environment = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    said = Path(folder) / "said.txt"
    if processes > 1:
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    forks = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        fork = _FORKS.Process(target=_program, args=([*map(str, command)], str(folder), environment | ranks, said))
        fork.start()
        forks.append(fork)
    for fork in forks:
        fork.join()
    printed = said.read_text(encoding="utf-8")
    assert [fork.exitcode for fork in forks] == [0] * processes, printed[-3000:]
    return printed


def _program(command, folder, environment, said):
    with said.open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


def _free_port():
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return door.getsockname()[1]
