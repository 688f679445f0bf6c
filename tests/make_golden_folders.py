"""Writes golden folders, one a structure and kind of model, of what this library saves now; see `golden_folders.py`.

PYTHONPATH=tests:. python tests/make_golden_folders.py NAME [STRUCTURE ...]    # tests/golden/NAME, which must be new

Instead of a structure, `rounded` is a model that keeps its matrices in fewer bits.
"""

import hashlib
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from every_structure import OF_ANY_MODEL, build_every_structure, host_of, structures_with
from golden_folders import HEADS, ROOT
from safetensors.torch import save
from tiny_models import build, outputs

from hf_lowrank import compress
from hf_lowrank.compression import rounding
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

ROUNDED = "rounded"
VOCABULARY, POSITIONS = 23, 9
_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 12,
    "intermediate_size": 14,
    "max_position_embeddings": POSITIONS,
}
_TINY = {
    "BertForMaskedLM": _ENCODER,
    "GPT2LMHeadModel": {"vocab_size": VOCABULARY, "n_embd": 12, "n_positions": POSITIONS},
    "LlamaForCausalLM": _ENCODER,
}
# What a spec may say besides what it must.
_OPTIONS = {
    "pivoted": {"moved": 2},
    "nonlinear_autoencoder_embedding": {"added": 2},
    "linear_decoder": {"rows": "input"},
    "tucker": {"input_side": "right"},
}


def _say_all_(plan):
    for spec in [*plan["modules"].values(), *plan["shared"].values()]:
        spec |= _OPTIONS.get(spec["structure"], {})
    plan["output_embeddings"] = {"structure": "low_rank", "rank": 3}  # where the head is not tied


def _rounded(head):
    rounding.LEAST_NUMBERS = 100  # also matrices as small as these
    return compress(build(head, **_TINY[head]), bits=6, method="svd")


def _structured(head, name):
    return build_every_structure(head, structures_with(name), adjust_=_say_all_, **_TINY.get(head, {}))


def _write(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)


def _pack(folder, expected, archive):
    texts = {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))}
    code = hashlib.sha256(b"\0".join(texts.values())).hexdigest()[:12] + ".zip"
    _write(archive.parent / code, texts)
    members = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    _write(archive, {**members, "expected.safetensors": save(expected), "code.txt": code.encode()})


def main(target, names):
    """Save one folder for each head and structure; a head's structure is in the folder of the table it is tied to."""
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))}
    for name in (name for name in names if not name.endswith("_head")):
        for head in HEADS if name in (*OF_ANY_MODEL, ROUNDED) else [host_of(name, None)]:
            model = _rounded(head) if name == ROUNDED else _structured(head, name)
            expected = {key: value.contiguous() for key, value in outputs(model, inputs).items()}
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                _pack(Path(folder), {**inputs, **expected}, target / f"{name}-{head}.zip")


if __name__ == "__main__":
    if (ROOT / sys.argv[1]).exists():
        sys.exit(f"{ROOT / sys.argv[1]} exists: golden folders are never written again.")
    main(ROOT / sys.argv[1], sys.argv[2:] or [*STRUCTURES, ROUNDED])
