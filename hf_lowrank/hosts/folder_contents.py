"""What a model folder is made of: its weights, its tokenizer and later modules, its code; nothing else is taken."""

import hashlib
import json
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.config_file import read_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights in formats that hold code or belong to other libraries.
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.ot", "*.ckpt", "*.gguf", "*.bin.index.json")
# What slow tokenizers read; a fast one can be made of these again, with another vocabulary.
VOCABULARY_FILES = (
    "vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", *VOCABULARY_FILES)
# What tokenizers, processors and sentence-transformers keep beside weights, and what the law of a model is.
SIDE_FILES = (
    *TOKENIZER_FILES, "*vocab*.json", "*vocab*.txt", "special_tokens_map.json", "added_tokens.json", "*.model",
    "*.spm", "bpe.codes", "dict.txt", "entity_vocab.json", "tokenization_*.py", "chat_template.*",
    "additional_chat_templates/*.jinja", "*processor_config.json", "modules.json", "*sentence*config.json",
    "config_sentence_transformers.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
# What `export` writes: of these very weights, so that no other folder gets them.
RUNTIME_FILES = ("onnx/*.onnx", "onnx/*.onnx_data", "openvino/*.xml", "openvino/*.bin")
_MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin", *SIDE_FILES)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a file, links followed, lies in the folder or, of a Hub cache's snapshot, in that repository's cache."""
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        root = root.parents[1]
    return path.resolve().is_relative_to(root)


def weight_files(folder: Path) -> list[Path]:
    """The files a model folder's weights are loaded from, all safetensors, and their index if there is one.

    Raises:
        InputError: If there are none, some lie elsewhere or are missing, or the index is damaged.
    """
    if named := read_config(folder).get("transformers_weights"):
        raise InputError(f"config.json of {folder} names {named!r} as weights; {WEIGHTS} or {INDEX} must hold them.")
    if (folder / WEIGHTS).exists():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).exists():
        files = [folder / INDEX, *(folder / name for name in _indexed(folder / INDEX))]
    else:
        found = sorted(path.name for path in folder.iterdir() if _is_one_of(path.name, _OTHER_WEIGHTS))
        beside = f"; {found[0]} is not loaded, as such a file can run code" if found else ""
        raise InputError(f"{folder} has no {WEIGHTS}{beside}. Save the model again with save_pretrained.")
    for path in files:
        if not path.is_file():
            raise InputError(f"{path.name}, a part of the weights of {folder}, is missing. Save the model again.")
        if not is_inside(path, folder):
            raise InputError(f"{path.name} of {folder} is a link that leads out of it. Put the file itself there.")
    return files


def saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor among a folder's weights, from the headers alone.

    Raises:
        InputError: As `weight_files`.
        SafetensorError: If a file is damaged or cut short.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def _indexed(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted(set(names))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} is damaged: it has no readable weight_map. Save the model again.") from error
    for name in files:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(f"{index} must name safetensors files beside it, got {name!r}. Save the model again.")
    if not files:
        raise InputError(f"{index} names no file. Save the model again.")
    return files


def side_files_of(folder: Path) -> dict[str, Path]:
    """Path inside the folder -> file, for all that belongs to a model besides its weights, configuration and card."""
    modules = module_folders(folder)
    found = {}
    for name, path in all_files(folder):
        module = next((one for one in modules if name.startswith(f"{one}/")), None)
        is_side = _is_one_of(name, SIDE_FILES) if module is None else _is_one_of(path.name, _MODULE_FILES)
        if is_side and is_inside(path, folder):
            found[name] = path
    return found


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    update_with_file(digest, path)
    return digest.hexdigest()


def update_with_file(digest: Any, path: Path) -> None:
    """Add what a file holds to a hash."""
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)


def links_out(folder: Path) -> list[str]:
    """Paths inside the folder of the links, to files or folders, that lead out of it."""
    links = (path for path in sorted(folder.rglob("*")) if path.is_symlink() and not is_inside(path, folder))
    return [path.relative_to(folder).as_posix() for path in links]


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a model folder that a tokenizer is loaded from."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def all_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Path inside the folder and file, sorted, hidden ones and what lies in hidden folders left out."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            yield name, path


def module_folders(folder: Path) -> list[str]:
    """Folders of the modules that follow the transformer in a sentence-transformers model."""
    try:
        modules: Any = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    return [path.rstrip("/") for path in paths if path and is_inside(folder / path, folder)]


def is_runtime_file(name: str) -> bool:
    """Whether a path inside a folder is of what `export` writes."""
    return _is_one_of(name, RUNTIME_FILES)


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, one) and name.count("/") == one.count("/") for one in patterns)
