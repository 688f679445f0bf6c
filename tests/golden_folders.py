"""Folders that this library saved once, kept to be loaded for ever; loaded where it cannot be imported.

    python tests/golden_folders.py    # loads each with the transformers of this Python, and says what went wrong

An archive holds the `config.json` and the weights of a tiny model with its inputs and outputs. The code that was
shipped with it lies beside it, once for all folders that shipped the same. Written by `make_golden_folders.py`.
"""

import sys
import tempfile
import traceback
import zipfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load

ROOT = Path(__file__).parent / "golden"
HEADS = {  # encoder, `Conv1D`, an untied head
    "BertForMaskedLM": "AutoModelForMaskedLM",
    "GPT2LMHeadModel": "AutoModelForCausalLM",
    "LlamaForCausalLM": "AutoModelForCausalLM",
}
AUTO_CLASSES = {**HEADS, "MixtralForCausalLM": "AutoModelForCausalLM"}
ARCHIVES = sorted(ROOT.glob("*/*-*.zip"))
# On another processor sums are added up in another order.
TOLERANCE = 1e-5


def unpack(archive, folder):
    """Write a golden folder as it was saved; the inputs and the outputs of its model."""
    folder.mkdir(parents=True)
    with zipfile.ZipFile(archive) as packed:
        code = packed.read("code.txt").decode()
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes(packed.read(name))
        expected = load(packed.read("expected.safetensors"))
    with zipfile.ZipFile(archive.parent / code) as packed:
        packed.extractall(folder)
    return {"input_ids": expected.pop("input_ids")}, expected


def load_golden(archive, scratch):
    """The class, the loading report and the largest error of a golden folder's model, loaded by its auto class."""
    folder = scratch / archive.parent.name / archive.stem
    inputs, expected = unpack(archive, folder)
    auto = getattr(transformers, AUTO_CLASSES[archive.stem.partition("-")[2]])
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    with torch.no_grad():
        found = model.eval()(**inputs)
    error = max(float((found[name] - value).abs().max()) for name, value in expected.items())
    return type(model), {kind: sorted(map(str, keys)) for kind, keys in info.items()}, error


def main(archives=ARCHIVES):
    """Load golden folders without this library; exit status 1 if one does not compute what it did."""
    sys.modules["hf_lowrank"] = None  # importing it raises
    transformers.utils.logging.set_verbosity_error()
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for archive in archives:
            try:
                model_class, info, error = load_golden(archive, Path(scratch))
                assert model_class.__module__.startswith("transformers_modules."), model_class
                assert not any(info.values()), info
                assert error <= TOLERANCE, f"outputs differ by {error}"
            except Exception:
                failed.append(f"{archive.parent.name}/{archive.stem}: {traceback.format_exc().splitlines()[-1]}")
    loaded = f"{len(archives) - len(failed)} of {len(archives)} golden folders load"
    sys.stdout.write("\n".join([f"transformers {transformers.__version__}: {loaded}", *failed, ""]))
    sys.exit(bool(failed) or not archives)


if __name__ == "__main__":
    main()
