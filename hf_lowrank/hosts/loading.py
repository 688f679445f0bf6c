"""Loading dense models by Hub id or folder, with one clear line for everything that can be wrong with them."""

import copy
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.hosts.config_file import read_config
from hf_lowrank.hosts.disk.stored import is_away
from hf_lowrank.hosts.folder_contents import TOKENIZER_FILES
from hf_lowrank.remote_code.lowrank_model import LowRankMixin

# Where wrappers keep the model they run: DataParallel and its kin, torch.compile.
_HELD_AS = ("module", "_orig_mod")
# What a model reads besides text -> what makes inputs of it.
_MEDIA: dict[str, Any] = {"image": AutoImageProcessor, "audio": AutoFeatureExtractor}
_MOST_LAYERS = 10_000
_MERGE = (
    "Merge it first: PeftModel.from_pretrained(BASE, ADAPTER).merge_and_unload() gives the model to pass "
    "(save_pretrained of a model with an adapter writes ADAPTER)."
)


def load_dense(model_or_id: PreTrainedModel | str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A dense transformers model with the head it was saved with; one that is loaded is in evaluation mode.

    Args:
        model_or_id: A folder or Hub id, or what `held_model` takes.
        dtype: Type to load the weights in; None keeps the checkpoint's.

    Raises:
        InputError: If there is no such model, it is compressed already or has an adapter, its class is not one of
            transformers, or weights are missing or not finite.
    """
    if not isinstance(model_or_id, (str, Path)):
        return _dense(held_model(model_or_id))
    _check_folder(Path(model_or_id))
    model_class = dense_class(model_or_id)
    try:
        model, info = model_class.from_pretrained(
            model_or_id, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:  # constructors of all families, readers of all formats: anything is raised
        raise InputError(f"{model_or_id} cannot be loaded: {one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{model_or_id} lacks the weights of {missing[0].rpartition('.')[0]} ({len(missing)} tensors in all), "
            f"which {model_class.__name__} needs. Save the model again with save_pretrained."
        )
    return _dense(held_model(model.eval()))


def held_model(given: Any) -> PreTrainedModel:
    """The transformers model in what was given: one, or what wraps it.

    A compiled, `DataParallel` or `DistributedDataParallel` model and a `SentenceTransformer` hold one; a subclass of
    the user's that adds no weights stands for the class of transformers it was derived from.

    Raises:
        InputError: If there is none, it has an adapter, or a weight is not finite.
    """
    model: Any = given
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "peft_config"):
            raise InputError(f"{type(model).__name__} is a model with an adapter. {_MERGE}")
        inner = next((held for name in _HELD_AS if isinstance(held := getattr(model, name, None), nn.Module)), None)
        if inner is None and type(model).__name__ == "SentenceTransformer":
            inner = getattr(model[0], "auto_model", None)
        if inner is None:
            raise InputError(f"{type(given).__name__} holds no transformers model. Pass one, its folder or a Hub id.")
        model = inner
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(f"{type(model).__name__} has an adapter attached. {_MERGE}")
    require_finite(model)
    return model if isinstance(model, LowRankMixin) else _of_stock_class(model)


def held_compressed_model(given: Any, purpose: str) -> Any:
    """The compressed model in what was given; see `held_model`.

    Args:
        purpose: What it is wanted for, as in "nothing to decompress".

    Raises:
        InputError: If there is none.
    """
    model = held_model(given)
    if not isinstance(model, LowRankMixin):
        raise InputError(f"{type(model).__name__} is not a compressed model; there is nothing to {purpose}.")
    return model


def require_finite(model: nn.Module) -> None:
    """Check every weight and buffer in memory, each read once; others are checked whenever they are read.

    Raises:
        InputError: Naming the first that holds NaN, or that is saved and holds Inf.
    """
    saved = model.state_dict(keep_vars=True)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point() or tensor.is_meta or is_away(tensor) or not tensor.numel():
            continue
        ends = torch.stack(tensor.detach().aminmax())  # NaN if there is one anywhere, and no copy of the tensor
        # A mask made by the constructor may hold -Inf.
        if bool((~ends.isfinite() if name in saved else ends.isnan()).any()):
            raise InputError(f"{name!r} of {type(model).__name__} holds NaN or Inf. Repair it, or load another copy.")


def _dense(model: PreTrainedModel) -> PreTrainedModel:
    if isinstance(model, LowRankMixin):
        raise InputError(f"{type(model).__name__} is compressed already. Decompress it first, or start from its base.")
    return model


def _of_stock_class(model: PreTrainedModel) -> PreTrainedModel:
    """The model as the class of transformers that a saved folder is loaded by."""
    hosts = [base for base in type(model).__mro__ if getattr(transformers, base.__name__, None) is base]
    host: Any = hosts[0] if hosts else PreTrainedModel
    if host is type(model):
        return model
    name = type(model).__name__
    if host is PreTrainedModel:
        raise InputError(f"{name} is not a class of transformers, nor derived from one. Pass a model that is.")
    with torch.device("meta"):
        keys = host(model.config).state_dict().keys()
    if keys != model.state_dict().keys():
        raise InputError(
            f"{name} has other weights than {host.__name__}, its class in transformers. Pass one of those."
        )
    stock = copy.copy(model)
    stock.__class__ = host
    return stock


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens a model knows.

    Raises:
        InputError: If it reads images or sounds, or does not say.
    """
    if model.main_input_name != "input_ids":
        raise _not_run(model, f"it reads {model.main_input_name}, not tokens")
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if size is None:  # CANINE reads characters
        raise _not_run(model, "its configuration names no vocab_size to draw tokens from")
    return int(size)


def require_runs(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> None:
    """Run a model once on inputs of the kind it will be run on.

    Raises:
        InputError: If it does not take them.
    """
    try:
        # In training mode it would draw: the caller's generators are as they were.
        with torch.no_grad(), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            model(**{name: value.to(model.device) for name, value in batch.items()})
    except Exception as error:  # hosts of all families, each with errors of its own
        raise _not_run(model, one_line(error)) from error


def _not_run(model: PreTrainedModel, why: str) -> InputError:
    return InputError(
        f"{type(model).__name__}, which reads {model.main_input_name}, cannot be run on this: {why}. What looks "
        "at its weights alone works: compress with method svd."
    )


def find_tokenizer(model: PreTrainedModel, given: Any = None) -> Any:
    """The one given, or that saved with a loaded model; None if there is none, or the model was built in memory.

    Of a model of images or sounds it is what makes inputs of those; see `load_processor`.

    Raises:
        InputError: If what was given is no tokenizer.
    """
    if given is not None:
        return require_tokenizer(given)
    source = getattr(model.config, "_name_or_path", "")
    if not source:
        return None
    try:
        return load_processor(source, model)
    except (OSError, ValueError, KeyError, TypeError, ImportError):  # the last of a package that its kind needs
        return None


def require_tokenizer(given: Any) -> Any:
    """What was given, if it can be one.

    Raises:
        InputError: If it is none.
    """
    if not callable(given):
        raise InputError(f"tokenizer must be a tokenizer of transformers, got {given!r}. Load it first.")
    return given


def load_processor(source: str, model: PreTrainedModel) -> Any:
    """What makes inputs of a model at a folder or Hub id: of text a tokenizer, of images or sounds a processor.

    Raises:
        OSError: If there is none, or it is damaged.
    """
    reads = [model.input_modalities] if isinstance(model.input_modalities, str) else model.input_modalities
    media = [loader for name, loader in _MEDIA.items() if name in reads]
    for loader in [AutoProcessor, *media] if media and "text" in reads else media:
        with suppress(OSError, ValueError, KeyError, TypeError, ImportError, AttributeError):
            found = loader.from_pretrained(source, trust_remote_code=False)
            if not isinstance(found, PreTrainedTokenizerBase):
                return found
    return load_tokenizer(source)


def load_tokenizer(source: str) -> Any:
    """The tokenizer at a folder or Hub id.

    Raises:
        OSError: If there is none, or it is damaged. Where there is none, transformers makes up one that knows special
            tokens alone or little more, to which every text is unknown.
    """
    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        is_empty = not set(found.get_vocab()) - set(found.all_special_tokens)
    except Exception as error:  # the parsers of all kinds raise anything
        raise OSError(f"the tokenizer of {source} cannot be loaded: {one_line(error)}") from error
    files = {*found.vocab_files_names.values(), *TOKENIZER_FILES} if found.vocab_files_names else set()
    if is_empty or (files and Path(source).is_dir() and not any((Path(source) / name).is_file() for name in files)):
        raise OSError("it holds no tokenizer.")
    return found


def _check_folder(path: Path) -> None:
    """Refuse what is not the folder of a dense model; a Hub id passes."""
    if path.is_file():
        raise InputError(f"{path} is a file. Give a folder that holds config.json and weights, or a Hub id.")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise InputError(f"{path} is an adapter without its model. {_MERGE}")
        raise InputError(f"{path} is not a model folder: it has no config.json.")
    config = read_config(path) if path.is_dir() else {}
    if path.is_dir() and not config:
        raise InputError(f"{path / 'config.json'} is not a JSON object. Restore it.")
    if config.get("compression"):
        raise InputError(f"{path} is compressed already. Decompress it first, or start from its base.")
    if (path / "adapter_config.json").is_file():
        raise InputError(f"{path} holds an adapter beside the model. {_MERGE}")


def dense_class(model_or_id: str | Path) -> Any:
    """The transformers class a checkpoint was saved from; `AutoModel` where it does not say.

    Raises:
        InputError: If the configuration cannot be read, or names a class that transformers does not have.
    """
    try:
        config = AutoConfig.from_pretrained(model_or_id, trust_remote_code=False)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    except Exception as error:  # a configuration's own code, met with any value
        raise unusable(model_or_id, error) from error
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise InputError(f"{model_or_id} says num_hidden_layers {layers}; it must be at most {_MOST_LAYERS}. Mend it.")
    if not config.architectures:
        return AutoModel
    name = config.architectures[0]
    model_class = getattr(transformers, str(name), None)
    if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
        raise InputError(
            f"{model_or_id} is a {name}, which this transformers ({transformers.__version__}) does not have. "
            "Supported is every transformers model whose blocks are nn.Linear or Conv1D layers: BERT, GPT-2, "
            "RoBERTa, DistilBERT, Llama and their like."
        )
    return model_class


def unusable(path: str | Path, error: BaseException) -> InputError:
    """What is wrong with a model folder or Hub id whose configuration could not be read."""
    if isinstance(error, OSError) and not Path(path).is_dir():
        return InputError(f"There is no folder {str(path)!r}, and the Hub gave no model of that name. Check the name.")
    return InputError(f"There is no usable model {str(path)!r}: {one_line(error)}")
