"""Proof that a saved folder loads where this library does not exist and computes exactly what it computes here."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.files.scratch import temporary_folder
from hf_lowrank.hosts.config_file import read_config
from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.folder_contents import weight_files
from hf_lowrank.hosts.heads import auto_class as find_auto_class
from hf_lowrank.remote_code.lowrank_plan import PlanError
from hf_lowrank.sharing import verification_child
from hf_lowrank.sharing.saving import compressed_class, load_compressed
from hf_lowrank.sharing.shipped_code import foreign_code, missing_code

# Environment variables that decide where libraries are found and how they compute.
_PASSED_ON = (
    "PATH", "LD_", "DYLD_", "SYSTEMROOT", "TEMP", "TMP", "LANG", "LC_", "TZ", "OMP_", "KMP_", "GOMP_", "MKL_", "DNNL_",
    "ONEDNN_", "OPENBLAS_", "ATEN_", "TORCH_", "PYTORCH_", "CUDA_", "MALLOC_", "THP_", "GLIBC_",
)  # fmt: skip
_SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


@dataclass(frozen=True)
class Verification:
    """What was found of one saved folder.

    Args:
        ok: Whether everything below is as it should be.
        auto_class: The auto class that loads it; None for a head that has none, which goes by its own name.
        class_name: The class that was loaded from the shipped code.
        max_difference: Largest absolute difference between any two outputs; None where there was nothing to compare.
        message: One line: what was proved, or the first thing that is wrong.
    """

    ok: bool
    message: str
    auto_class: str | None = None
    class_name: str | None = None
    max_difference: float | None = None
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()


def verify(path: str | Path, model: PreTrainedModel | None = None, trust_remote_code: bool = False) -> Verification:
    """Load a folder in a process that cannot import this library and compare its outputs bit for bit with ours.

    That process runs the code in the folder, without tokens and without a network.

    Args:
        model: The model that was saved; its outputs are compared too. None compares only with the folder loaded here.
        trust_remote_code: Run code that no version of this library shipped. Otherwise the folder does not pass.

    Raises:
        InputError: If `path` is no folder of a compressed model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{path} is not a folder. Give the folder of a saved compressed model.")
    model_class = compressed_class(folder)
    auto_class = find_auto_class(model_class)
    try:
        weight_files(folder)
        if not trust_remote_code and (foreign := foreign_code(folder)):
            return Verification(False, _refusal(foreign), auto_class)
        ours = verification_child.realigned(load_compressed(folder))
    except (InputError, PlanError) as error:
        return Verification(False, one_line(error), auto_class)
    with temporary_folder() as scratch:
        inputs = dummy_inputs(ours)
        answer, theirs = _ask_child(folder, auto_class, inputs, scratch)
    if "error" in answer:
        return Verification(False, _explain(folder, answer["error"]), auto_class)
    difference = _max_difference(_outputs(ours, inputs), theirs)
    if model is not None:
        difference = max(difference, _max_difference(_outputs(_on_cpu(model), inputs), theirs))
    keys = {name: tuple(answer[name]) for name in ("missing_keys", "unexpected_keys")}
    problem = _problem(answer, difference)
    proved = f"{answer['class_name']} loads without this library and its outputs are equal (difference {difference})."
    return Verification(not problem, problem or proved, auto_class, answer["class_name"], difference, **keys)


def _refusal(foreign: list[str]) -> str:
    return (
        f"{foreign[0]} is not code that hf_lowrank ships, so it was not run. Save the model again or, if you have "
        f"read {' and '.join(foreign)}, trust it (--trust-remote-code)."
    )


def _problem(answer: dict[str, Any], difference: float) -> str:
    """The first thing that is wrong with what the other process found, or nothing."""
    if not answer["class_module"].startswith("transformers_modules."):
        return f"{answer['class_name']} was not loaded from the shipped code but from {answer['class_module']}."
    for name in ("missing_keys", "unexpected_keys"):
        if keys := answer[name]:
            return f"Without this library {len(keys)} weights are {name.partition('_')[0]}, such as {keys[0]!r}."
    if answer["loads_untrusted"]:
        return "The folder loads without trust_remote_code=True, so its weights may be random."
    if difference != 0:
        return f"Outputs with and without this library differ by up to {difference:g}."
    return ""


def _ask_child(
    folder: Path, auto_class: str | None, inputs: dict[str, torch.Tensor], scratch: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a process without this library finds, and the outputs it computes."""
    architecture = read_config(folder)["architectures"][0]
    request: dict[str, Any] = {
        "folder": str(folder.resolve()),
        "auto_class": auto_class,
        "class_reference": f"modeling_lowrank.{architecture}",
        "inputs": str(scratch / "inputs.safetensors"),
        "outputs": str(scratch / "outputs.safetensors"),
        "answer": str(scratch / "answer.json"),
        "num_threads": torch.get_num_threads(),
        # An isolated Python does not see packages that came by PYTHONPATH or lie in a user's own folder.
        "packages": sorted({str(Path(str(package.__file__)).parents[1]) for package in (torch, transformers)}),
    }
    save_file(inputs, request["inputs"])
    (scratch / "request.json").write_text(json.dumps(request), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-I", str(verification_child.__file__), str(scratch / "request.json")],
        cwd=scratch,
        env=_child_environment(scratch),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer = json.loads(Path(request["answer"]).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not written, or not to its end
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"error": f"The process without this library died: {last[0]}"}, {}
    return answer, {} if "error" in answer else load_file(request["outputs"])


def _child_environment(scratch: Path) -> dict[str, str]:
    """What the other process needs to compute the same; nothing that opens a door, such as a token or a key."""
    kept = {
        name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON) and not _SECRET.search(name)
    }
    return {
        **kept,
        # What it could read from the user's own folders lies elsewhere for it: tokens, credentials, configurations.
        **dict.fromkeys(
            ("HOME", "USERPROFILE", "HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(scratch / "home")
        ),
        "HF_TOKEN_PATH": str(scratch / "home" / "token"),
        "HF_MODULES_CACHE": str(scratch / "modules"),
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }


def _outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        return verification_child.tensors_of(model(**inputs))


def _on_cpu(model: Any) -> Any:
    """The model as it will be used: on the CPU, where the folder is loaded, and in evaluation mode."""
    return copy.deepcopy(model).cpu().eval()  # a copy even of such a model: its weights are where those compared are


def _max_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Infinite where outputs are missing, of another shape or not numbers."""
    if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
        return float("inf")
    differences = [
        (ours[name].double() - theirs[name].double()).abs().nan_to_num(nan=float("inf")).max() for name in ours
    ]
    return float(torch.stack(differences).max()) if differences else float("inf")


def _explain(folder: Path, error: str) -> str:
    """The other process's error, led by the shipped file that is missing or damaged, if that is why."""
    if missing := missing_code(folder):
        return (
            f"{folder / missing[0]}, which the shipped code needs, is missing or odd. Save the model again. ({error})"
        )
    return f"{folder} does not load without this library: {error}"
