"""Model folders: written whole or not at all, the tokenizer beside the weights, and read back with clear errors."""

import json
import shutil
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_lowrank.errors import InputError, Note, one_line
from hf_lowrank.files.redaction import config_without_tokens
from hf_lowrank.files.scratch import REPLACED, workshop, write_text
from hf_lowrank.hosts.config_file import read_config
from hf_lowrank.hosts.disk.offloaded import offloaded
from hf_lowrank.hosts.folder_contents import (
    SIDE_FILES,
    VOCABULARY_FILES,
    all_files,
    is_inside,
    is_runtime_file,
    links_out,
    module_folders,
    side_files_of,
    tokenizer_files,
    weight_files,
)
from hf_lowrank.hosts.loading import require_finite, unusable
from hf_lowrank.records.report import make_report
from hf_lowrank.remote_code import modeling_lowrank
from hf_lowrank.remote_code.lowrank_model import LowRankMixin
from hf_lowrank.remote_code.lowrank_plan import PlanError
from hf_lowrank.sharing.cards.metadata import RESULTS_FILE
from hf_lowrank.sharing.record import RECORD_FILES, write_record

# Of a model that does not fit in memory.
_SHARD = "200MB"
# `save_pretrained` writes these itself; a card is rendered, not copied.
_SAVED = ("config.json", "generation_config.json", *RECORD_FILES)


def check_output(out: str | Path, overwrite: bool = False, source: str | Path | None = None) -> None:
    """Refuse an output folder that cannot be written, before any long work.

    Args:
        overwrite: Whether a model folder that is there may be replaced.
        source: The folder that is read meanwhile, or a Hub id; the output may be neither it, nor in it, nor around it.

    Raises:
        InputError: If the folder must not be written.
    """
    try:
        target = Path(out).resolve()
    except (OSError, RuntimeError) as error:  # the second of a circle, before Python 3.13
        raise InputError(f"{out} leads round in a circle of links. Choose another output folder.") from error
    if source is not None and Path(source).is_dir():
        read = Path(source).resolve()
        if target == read or read in target.parents or target in read.parents:
            raise InputError(f"The output {out} and the input {source} overlap. Choose another output folder.")
    existing = next(path for path in (target, *target.parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f"{existing} is a file; the output must be a folder. Choose another name.")
    if existing != target or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"{out} exists and is not empty. Choose another folder, or overwrite it (--overwrite).")
    if not (target / "config.json").is_file():
        raise InputError(f"{out} is not a model folder (no config.json), so it is not overwritten. Choose another.")


def save_folder(
    model: PreTrainedModel,
    out: str | Path,
    side_files_from: str | Path | None = None,
    overwrite: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Save a model and what belongs to it as one folder, which appears complete or not at all.

    Everything is written beside `out` and renamed at the end: an error, a full disk or an interrupt leaves neither a
    half-written folder nor a lost old one.

    Args:
        side_files_from: Folder or Hub id whose tokenizer and other files are copied along.
        overwrite: Replace the model folder that is there.
        tokenizer: Takes the place of the one there.

    Returns:
        The folder.

    Raises:
        InputError: If `out` must not be written.
    """
    check_output(out, overwrite, side_files_from)
    target = Path(out).resolve()
    with workshop(target) as shop:
        draft = shop / "new"
        draft.mkdir()
        _save_weights(model, draft)
        if side_files_from is not None:
            _copy_side_files(side_files_from, draft)
        if tokenizer is not None:
            for name in VOCABULARY_FILES:
                (draft / name).unlink(missing_ok=True)
            tokenizer.save_pretrained(draft)
        config = draft / "config.json"
        write_text(config, config_without_tokens(config.read_text(encoding="utf-8")))
        if isinstance(model, LowRankMixin):
            write_record(draft, make_report(model), target.name)
        # Weights are written readable by their owner only; a folder to share has one mode throughout.
        mode = config.stat().st_mode
        for path in draft.glob("*.safetensors"):
            path.chmod(mode)
        _swap(draft, target, shop, overwrite)
    return target


def _save_weights(model: PreTrainedModel, draft: Path) -> None:
    """As `save_pretrained`; of a model whose weights are in files, no more than a shard at a time is in memory."""
    if offloaded(model) is None:
        model.save_pretrained(draft)
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(draft, max_shard_size=_SHARD)


def _swap(new: Path, target: Path, shop: Path, overwrite: bool) -> None:
    """Put `new` in the place of `target`; if that fails, what was there is back."""
    old = shop / REPLACED
    try:
        if overwrite and target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError) and not overwrite and target.is_dir() and any(target.iterdir()):
            raise InputError(f"{target} was written meanwhile by another run, and stays. Choose another.") from error
        raise


def side_files(source: str | Path) -> dict[str, Path]:
    """Path inside the folder -> file, for all that belongs to a model besides its weights, configuration and card.

    That is its tokenizer and, for sentence-transformers, `modules.json` and the later modules with their weights; not
    what a link leads to outside of the folder. Empty where `source` is a Hub id that cannot be reached.
    """
    folder = Path(source) if Path(source).is_dir() else _snapshot(str(source))
    return {} if folder is None else side_files_of(folder)


def folder_files(folder: Path, include: Sequence[str] = ()) -> tuple[dict[str, Path], list[str]]:
    """What of a saved compressed model is worth sharing, path inside the folder -> file; and what is left out.

    Args:
        include: Patterns of more files to take, such as `"*.md"`.

    Raises:
        InputError: If the folder has no weights, or its configuration, code or record is a link that leads out.
    """
    every = dict(all_files(folder))
    if needed := [name for name in links_out(folder) if _is_needed(name)]:
        raise InputError(f"{needed[0]} of {folder} is a link that leads out of it. Put the file itself there.")
    ours = {path.name: path for path in weight_files(folder)} | side_files_of(folder)
    for name, path in every.items():
        if (_is_needed(name) or any(fnmatchcase(name, one) for one in include)) and is_inside(path, folder):
            ours[name] = path
    if (folder / RESULTS_FILE).is_file():
        ours[RESULTS_FILE] = folder / RESULTS_FILE
    return dict(sorted(ours.items())), [name for name in every if name not in ours]


def _is_needed(name: str) -> bool:
    """Whether a path inside a folder is of what this library or `save_pretrained` writes there."""
    return name in (*_SAVED, RESULTS_FILE) or ("/" not in name and name.endswith(".py")) or is_runtime_file(name)


def side_file_bytes(source: str | Path) -> int:
    """Bytes of the side files of a folder or Hub id: what a saved folder holds besides what the model writes."""
    return sum(path.stat().st_size for path in side_files(source).values())


def _snapshot(repo: str) -> Path | None:
    """The local copy of a Hub repository without its weights, None where there is none and the Hub is out of reach."""
    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*SIDE_FILES]))
        if modules := module_folders(folder):
            snapshot_download(repo, allow_patterns=[f"{name}/*" for name in modules])
    except (OSError, ValueError):
        return None
    return folder


def _copy_side_files(source: str | Path, draft: Path) -> None:
    for name, path in side_files(source).items():
        copy = draft / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if links := links_out(Path(source)):
        warnings.warn(f"Left out, as links that lead out of {source}: {', '.join(links)}.", Note, stacklevel=2)
    _name_tokenizer_class(source, draft)


def _name_tokenizer_class(source: str | Path, draft: Path) -> None:
    """Write down the tokenizer's class where only the model type told it: ours is not one transformers knows."""
    file = draft / "tokenizer_config.json"
    if not tokenizer_files(draft):
        return
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if "tokenizer_class" in settings:
            return
        settings["tokenizer_class"] = type(AutoTokenizer.from_pretrained(source, trust_remote_code=False)).__name__
    except Exception:
        return  # a tokenizer that the source folder cannot load either
    write_text(file, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def compressed_class(path: str | Path) -> Any:
    """The class of the compressed model in a folder or a Hub repository.

    Raises:
        InputError: If there is none.
    """
    if not isinstance(path, (str, Path)):
        raise InputError(f"A model's folder or Hub id must be a string or path, got {path!r}. Save the model first.")
    if Path(path).is_dir():
        config = read_config(Path(path))
        if not config:
            raise InputError(f"{path} is not a model folder: it has no readable config.json.")
    else:
        try:
            config = PreTrainedConfig.get_config_dict(str(path))[0]
        except (OSError, ValueError) as error:
            raise unusable(path, error) from error
    if not config.get("compression"):
        raise InputError(f"{path} is not a compressed model: its config.json has no 'compression'.")
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    found = getattr(modeling_lowrank, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, LowRankMixin)):
        raise InputError(f"{path} names the architecture {name!r:.50}, which this library does not know.")
    return found


def load_skeleton_config(path: str | Path) -> tuple[Any, Any]:
    """Class and configuration of a saved compressed model, without its weights.

    Raises:
        InputError: If the folder holds no compressed model or its configuration is damaged.
    """
    model_class = compressed_class(path)
    try:
        return model_class, model_class.config_class.from_pretrained(path)
    except (OSError, ValueError, TypeError, RecursionError, StrictDataclassError) as error:
        raise InputError(f"The config.json of {path} is damaged: {one_line(error)}") from error


def load_compressed(path: str | Path) -> Any:
    """A compressed model from its folder or Hub id, by the code of this library, in evaluation mode.

    Raises:
        InputError: If the folder holds no compressed model, or its configuration or weights are damaged or not
            finite.
        PlanError: If its plan does not fit.
    """
    model_class, config = load_skeleton_config(path)
    try:
        if Path(path).is_dir():
            weight_files(Path(path))
        model, info = model_class.from_pretrained(path, config=config, dtype="auto", output_loading_info=True)
    except PlanError:
        raise
    except Exception as error:  # readers of all formats: anything is raised
        if "ignore_mismatched_sizes" in str(error):
            raise InputError(f"The weights of {path} do not fit its plan: some have other shapes.") from error
        raise InputError(f"The weights of {path} cannot be loaded: {one_line(error)}") from error
    if keys := sorted(info["unexpected_keys"]):  # of the host, to which the shipped code leaves its own
        raise InputError(f"The weights of {path} do not fit its plan: {len(keys)} unexpected, such as {keys[0]!r}.")
    require_finite(model)
    return model.eval()
