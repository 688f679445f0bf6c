"""Looks for what commonly stands in the way: old libraries, idle cores, slow memory, a cache nobody can write."""

import importlib.metadata
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from packaging.requirements import Requirement
from safetensors import SafetensorError
from transformers.utils.hub import HF_MODULES_CACHE

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.hosts.config_file import read_config
from hf_lowrank.hosts.folder_contents import saved_shapes, tokenizer_files
from hf_lowrank.records.machine import machine_name, versions
from hf_lowrank.records.wording import megabytes
from hf_lowrank.remote_code.lowrank_plan import PlanError
from hf_lowrank.sharing.inspection import check_weights, make_skeleton
from hf_lowrank.sharing.record import read_record
from hf_lowrank.sharing.shipped_code import foreign_code, missing_code

OK, HINT, PROBLEM = "ok", "hint", "problem"
_DISTRIBUTION = "hf-lowrank"
_ENOUGH_DISK = 2_000_000_000  # bytes: a model of BERT's size, its copy, and room for statistics
_LARGE_OUTPUT = 1 << 26  # bytes, as BERT-base makes of 43 x 128 tokens: more than glibc keeps for the next use, 32 MiB
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # of Linux: `always [madvise] never`


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        verdict: `ok`, `hint` (works, could be better) or `problem`.
        remedy: What to do; empty where nothing is to be done.
    """

    name: str
    verdict: str
    found: str
    remedy: str = ""


def diagnose(path: str | Path | None = None) -> list[Finding]:
    """Look at this installation and machine and, if there is a path, at the model folder there."""
    findings = [*_libraries(), _threads(), *_memory(), _accelerator(), *_caches(), _hub()]
    return findings if path is None else [*findings, *_folder(Path(path))]


def _libraries() -> Iterator[Finding]:
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    yield Finding("versions", OK, installed)
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires(_DISTRIBUTION) or []]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("requirements", HINT, "run from its sources, so versions were not checked", "pip install -e .")
        return
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        number = _version(requirement.name)
        if number is None or not requirement.specifier.contains(number, prereleases=True):
            found = f"{requirement.name} is {number or 'missing'}, needed is {requirement.specifier}"
            yield Finding("requirements", PROBLEM, found, f"pip install '{requirement.name}{requirement.specifier}'")
    extras = sorted({extra for requirement in wanted if (extra := _missing_extra(requirement))})
    if extras:
        found = f"not installed: what {', '.join(extras)} needs"
        yield Finding("extras", HINT, found, f"pip install 'hf-lowrank[{','.join(extras)}]'")


def _missing_extra(requirement: Requirement) -> str | None:
    """The extra a requirement belongs to, if it is one for users and is not installed."""
    extra = re.search(r"""extra == ['"](\w+)['"]""", str(requirement.marker or ""))
    missing = extra is not None and extra[1] != "dev" and _version(requirement.name) is None
    return extra[1] if extra is not None and missing else None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _threads() -> Finding:
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    found = machine_name()
    if threads < cores // 2:
        limit = os.environ.get("OMP_NUM_THREADS")
        remedy = f"unset OMP_NUM_THREADS (it is {limit})" if limit else f"torch.set_num_threads({cores})"
        return Finding("processor", HINT, f"{found}: most cores stay idle", remedy)
    return Finding("processor", OK, found)


def _memory() -> Iterator[Finding]:
    """Whether each large output is new memory, which the system fills with zeros page by page at its first use."""
    if not _LARGE_PAGES.is_file() or "[never]" in _LARGE_PAGES.read_text(encoding="utf-8"):
        return
    if _faults_of_large_output() < _LARGE_OUTPUT // mmap.PAGESIZE // 2:
        yield Finding("memory", OK, "large outputs are no work for the system")
        return
    found = "large outputs are new memory each time, in small pages: batches wait for the system"
    yield Finding("memory", HINT, found, "export THP_MEM_ALLOC_ENABLE=1 (torch then asks for large pages)")


def _faults_of_large_output() -> int:
    """Pages the system has to provide for an output as large as one that was freed before, at best."""
    import resource  # Unix alone has it, as has Linux what calls this

    faults = []
    for _ in range(5):  # the first are new in any case, and a small block in the way makes another one new
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(_LARGE_OUTPUT, dtype=torch.uint8)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(faults)


def _accelerator() -> Finding:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found = f"{machine_name('cuda')}, {megabytes(free)} of {megabytes(total)} free"
        return Finding("accelerator", OK, found, "--device cuda decomposes there")
    if torch.version.cuda is not None:
        remedy = "nvidia-smi says whether there is one and which driver it has"
        return Finding("accelerator", HINT, f"torch is built for CUDA {torch.version.cuda} and sees no GPU", remedy)
    return Finding("accelerator", OK, "none; none is needed")


def _caches() -> Iterator[Finding]:
    places = {"Hub cache": (huggingface_hub.constants.HF_HUB_CACHE, "HF_HOME")}
    places["code cache"] = (HF_MODULES_CACHE, "HF_MODULES_CACHE")
    for name, (place, variable) in places.items():
        existing = next(path for path in (Path(place), *Path(place).absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        found = f"{place}, {megabytes(free)} free"
        if not _is_writable(existing):
            yield Finding(name, PROBLEM, f"{place} cannot be written", f"set {variable} to a folder of yours")
        elif free < _ENOUGH_DISK:
            yield Finding(name, HINT, found, "`hf cache prune` makes room")
        else:
            yield Finding(name, OK, found)


def _is_writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _hub() -> Finding:
    endpoint = huggingface_hub.constants.ENDPOINT
    if huggingface_hub.is_offline_mode():
        return Finding(
            "Hub", HINT, "offline: only what is cached is found", "unset HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE"
        )
    if huggingface_hub.get_token() is None:
        return Finding("Hub", OK, f"{endpoint}, not logged in", "`hf auth login`, to push or to load private models")
    return Finding("Hub", OK, f"{endpoint}, with a token")


def _folder(folder: Path) -> Iterator[Finding]:
    config = read_config(folder)
    if not config:
        yield Finding("model", PROBLEM, f"{folder} has no readable config.json", "give the folder of a saved model")
        return
    kind = "a compressed model" if config.get("compression") is not None else "a dense model"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else "of no class"
    yield Finding("model", OK, f"{folder} holds {kind}, {name}")
    if config.get("compression") is not None or not list(folder.glob("pytorch_model*.bin*")):
        yield _weights(folder, config)
    if not tokenizer_files(folder) and not list(folder.glob("*processor_config.json")):
        remedy = "AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)"
        yield Finding("tokenizer", PROBLEM, "missing, so pipelines do not load", remedy)
    if config.get("compression") is not None:
        yield _shipped_code(folder)


def _weights(folder: Path, config: dict[str, Any]) -> Finding:
    """Whether a model's plan can be installed, and its weights are whole and those of the plan."""
    again = "save the model again, or restore the folder"
    try:
        if config.get("compression") is None:
            count = len(saved_shapes(folder))
        else:
            count = check_weights(folder, make_skeleton(folder))
            read_record(folder)
    except (InputError, PlanError, SafetensorError, OSError, ValueError) as error:
        return Finding("weights", PROBLEM, one_line(error), again)
    return Finding("weights", OK, f"{count} tensors in safetensors files")


def _shipped_code(folder: Path) -> Finding:
    if missing := missing_code(folder):
        found = f"{', '.join(missing)} is missing or odd, so it loads only where hf_lowrank is"
        return Finding("shipped code", PROBLEM, found, "save the model again with save_pretrained")
    if foreign := foreign_code(folder):
        return Finding("shipped code", PROBLEM, f"{foreign[0]} is not of hf_lowrank", "read it before you load it")
    return Finding("shipped code", OK, "complete; `hf-lowrank verify` proves that it loads")
