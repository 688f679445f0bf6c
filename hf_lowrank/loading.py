"""Loading dense models by Hub id or folder, with one clear line for everything that can be wrong with them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from hf_lowrank.architectures import read_config
from hf_lowrank.errors import InputError
from hf_lowrank.remote_code.lowrank_model import LowRankMixin


def load_dense(model_or_id: PreTrainedModel | str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A dense transformers model with the head it was saved with, in evaluation mode.

    Args:
        dtype: Type to load the weights in; None keeps the checkpoint's.

    Raises:
        InputError: If there is no such model, it is compressed already, its class is not one of transformers, or
            weights are missing.
    """
    if isinstance(model_or_id, PreTrainedModel):
        if isinstance(model_or_id, LowRankMixin):
            raise InputError(
                f"{type(model_or_id).__name__} is compressed already. Decompress it first, or start from its base."
            )
        return model_or_id
    path = Path(model_or_id)
    if path.is_dir():
        _check_folder(path)
    elif path.exists():
        raise InputError(f"{path} is a file. Give a folder that holds config.json and weights, or a Hub id.")
    model_class = dense_class(model_or_id)
    try:
        model, info = model_class.from_pretrained(
            model_or_id, dtype=dtype or "auto", output_loading_info=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{model_or_id} cannot be loaded: {first_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{model_or_id} lacks the weights of {missing[0].rpartition('.')[0]} ({len(missing)} tensors in all), "
            f"which {model_class.__name__} needs. Save the model again with save_pretrained."
        )
    loaded: PreTrainedModel = model.eval()
    return loaded


def find_tokenizer(model: PreTrainedModel) -> Any:
    """The tokenizer saved with a loaded model; None if there is none, or the model was built in memory."""
    source = getattr(model.config, "_name_or_path", "")
    if not source:
        return None
    try:
        return load_tokenizer(source)
    except (OSError, ValueError, KeyError):
        return None


def load_tokenizer(source: str) -> Any:
    """The tokenizer at a folder or Hub id.

    Raises:
        OSError: If there is none. Transformers makes up one that knows special tokens alone, to which every text is
            unknown.
    """
    found = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not set(found.get_vocab()) - set(found.all_special_tokens):
        raise OSError("it holds no tokenizer.")
    return found


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise InputError(f"{path} is not a model folder: it has no config.json.")
    config = read_config(path)
    if not config:
        raise InputError(f"{path / 'config.json'} is not a JSON object. Restore it.")
    if config.get("compression"):
        raise InputError(f"{path} is compressed already. Decompress it first, or start from its base.")


def dense_class(model_or_id: str | Path) -> Any:
    """The transformers class a checkpoint was saved from; `AutoModel` where it does not say.

    Raises:
        InputError: If the configuration cannot be read, or names a class that transformers does not have.
    """
    try:
        config = AutoConfig.from_pretrained(model_or_id, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"There is no usable model {str(model_or_id)!r}: {first_line(error)}") from error
    if not config.architectures:
        return AutoModel
    name = config.architectures[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise InputError(
            f"{model_or_id} is a {name}, which this transformers ({transformers.__version__}) does not have. "
            "Supported is every transformers model whose blocks are nn.Linear or Conv1D layers: BERT, GPT-2, "
            "RoBERTa, DistilBERT, Llama and their like."
        )
    return model_class


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a message of one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
