"""What a number was measured on and with: the processor, and the versions of the libraries."""

import os
import platform
import re
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.version import __version__

_CPU_INFO, _MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
_GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
LIBRARIES = ("torch", "transformers", "huggingface_hub", "safetensors")


def machine_name(device: torch.device | str = "cpu") -> str:
    """The name of a device as its maker calls it: `AMD EPYC 7B13, 2 cores, 1 thread`."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    return f"{_processor()}, {_count(cores, 'core')}, {_count(threads, 'thread')}"


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        InputError: If this machine has none, or nothing can be computed on it.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise InputError(f"device must be one of this machine's, such as cpu, got {name!r}: {reason}.") from error
    return device


def versions() -> dict[str, str]:
    """Version of Python and of each library that shapes a result; those that are not installed are left out."""
    found = {"hf_lowrank": __version__, "python": platform.python_version()}
    return found | {library: number for library in LIBRARIES if (number := _installed(library)) is not None}


@cache  # which metadata takes milliseconds to say
def _installed(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine() or "unknown processor"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def free_memory() -> int:
    """Bytes that this process can still take: what the system has free, or what its group of processes may have."""
    limits = [os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMORY_INFO.read_text(encoding="utf-8"))
        limits = [int(found[1]) * 1024] if found else limits
    with suppress(OSError, ValueError):  # "max" where there is none
        limits.append(int(_GROUP_LIMIT.read_text(encoding="utf-8")))
    return min(limits)
