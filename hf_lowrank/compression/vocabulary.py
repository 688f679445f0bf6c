"""A model and a tokenizer of only the tokens that a task uses: exact on them, in far fewer rows."""

import copy
import json
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.data.batches import tokenize
from hf_lowrank.data.rows import load_texts
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.hosts.targets import is_tied
from hf_lowrank.options import checked
from hf_lowrank.remote_code.lowrank_dense import dense_kind
from hf_lowrank.remote_code.lowrank_structures import module_name, token_table

# Tokenizer models, by their `type` in tokenizer.json, and where a token that is gone ends up.
TOKENIZER_MODELS = ("WordPiece", "BPE", "Unigram", "WordLevel")
# Fields of a configuration that hold token ids, besides all that end in `_token_id`.
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")


@checked
def reduce_vocabulary(
    model: Any, tokenizer: Any, vocabulary: Any, *, text_column: str | None = None
) -> tuple[Any, Any]:
    """A copy of a dense model and its tokenizer with the tokens that some texts use, and the special ones.

    Texts of these tokens are split as before, and the model gives the same outputs for them: rows are left out, none
    is changed. Ids are numbered anew, in their old order, in tables, head, configuration and tokenizer alike. What
    cannot be spelt any more becomes the unknown token; byte-level and byte-fallback tokenizers keep all their bytes
    and so spell everything. Shorter pieces take the place of a missing one where there are any.

    Args:
        model: A dense transformers model, a Hub id or a folder.
        tokenizer: Its fast tokenizer.
        vocabulary: Texts (see `hf_lowrank.data.rows.load_rows`), or the ids of the tokens to keep.
        text_column: Where the text is.

    Returns:
        The model and the tokenizer. Compress the model as any other; `save_folder(..., tokenizer=...)` saves both.

    Raises:
        InputError: If the model, the tokenizer or an id cannot be used.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{type(tokenizer).__name__} is no fast tokenizer, and only those can be reduced.")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] not in TOKENIZER_MODELS:
        raise InputError(
            f"The tokenizer's model must be one of {', '.join(TOKENIZER_MODELS)}, got {state['model']['type']}."
        )
    dense = load_dense(model)
    embedding: Any = token_table(dense)
    if embedding is None or dense_kind(embedding) != "embedding":
        raise InputError(f"{type(dense).__name__} has no token table of a kind that can be reduced.")
    wanted = _wanted_ids(tokenizer, vocabulary, text_column)
    num_tokens = min(len(tokenizer), embedding.num_embeddings)
    if outside := sorted(index for index in wanted if not 0 <= index < num_tokens):
        raise InputError(f"vocabulary must hold ids from 0 to {num_tokens - 1}, got {outside[0]}.")
    always = _always_kept(tokenizer, state) | _before_padding(dense, embedding)
    kept = sorted(_closure(state, wanted | always) & set(range(embedding.num_embeddings)))
    number = {old: new for new, old in enumerate(kept)}
    return _reduced_model(dense, kept, number), _reduced_tokenizer(tokenizer, state, number)


def _wanted_ids(tokenizer: Any, vocabulary: Any, text_column: str | None) -> set[int]:
    if isinstance(vocabulary, torch.Tensor):
        vocabulary = vocabulary.tolist()
    if isinstance(vocabulary, Iterable) and not isinstance(vocabulary, str):
        vocabulary = list(vocabulary)
        if vocabulary and all(isinstance(item, int) and not isinstance(item, bool) for item in vocabulary):
            return set(vocabulary)
    return {index for ids in tokenize(load_texts(vocabulary, text_column), tokenizer) for index in ids}


def _always_kept(tokenizer: Any, state: dict[str, Any]) -> set[int]:
    """Special and added tokens, the unknown one, and the alphabet of bytes where the tokenizer has one."""
    ids = tokenizer.get_vocab()
    names = {token["content"] for token in state["added_tokens"]} | set(tokenizer.all_special_tokens)
    model = state["model"]
    if model["type"] == "Unigram":
        names |= {model["vocab"][model["unk_id"]][0]} if model.get("unk_id") is not None else set()
    elif model.get("unk_token") is not None:
        names.add(model["unk_token"])
    if model["type"] == "BPE":
        names |= set(ByteLevel.alphabet())
    names |= {f"<0x{byte:02X}>" for byte in range(256)}
    return {ids[name] for name in names if name in ids}


def _before_padding(dense: PreTrainedModel, embedding: Any) -> set[int]:
    """All ids before that of padding where positions are counted from it, as in RoBERTa: it must not move."""
    others = (module for module in dense.modules() if isinstance(module, nn.Embedding) and module is not embedding)
    counts_from_it = any(module.padding_idx is not None for module in others)
    return set(range(embedding.padding_idx)) if counts_from_it and embedding.padding_idx else set()


def _closure(state: dict[str, Any], wanted: set[int]) -> set[int]:
    """With them, of BPE, all that they are merged from: what a text was split into on the way is needed again."""
    model = state["model"]
    if model["type"] != "BPE":
        return wanted
    ids = model["vocab"]
    parts: dict[int, list[int]] = {}
    for first, second in map(_pair, model["merges"]):
        parts.setdefault(ids[_joined(model, first, second)], []).extend((ids[first], ids[second]))
    found, waiting = set(wanted), list(wanted)
    while waiting:
        new = set(parts.get(waiting.pop(), ())) - found
        found |= new
        waiting += new
    return found


def _pair(merge: Any) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _joined(model: dict[str, Any], first: str, second: str) -> str:
    prefix = model.get("continuing_subword_prefix") or ""
    return first + second.removeprefix(prefix)


def _reduced_tokenizer(tokenizer: Any, state: dict[str, Any], number: dict[int, int]) -> Any:
    model = state["model"]
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            model["unk_id"] = number[model["unk_id"]]
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in number]
    else:
        model["vocab"] = {name: number[index] for name, index in model["vocab"].items() if index in number}
    if model["type"] == "BPE":
        names = model["vocab"]
        model["merges"] = [merge for merge in model["merges"] if _joined(model, *_pair(merge)) in names]
    for token in state["added_tokens"]:
        token["id"] = number[token["id"]]
    if state.get("padding"):
        state["padding"]["pad_id"] = number[state["padding"]["pad_id"]]
    _renumber_frame(state.get("post_processor"), number)
    reduced = copy.deepcopy(tokenizer)
    reduced._tokenizer = Tokenizer.from_str(json.dumps(state))
    return reduced


def _renumber_frame(processor: dict[str, Any] | None, number: dict[int, int]) -> None:
    """In what puts special tokens around a text: templates name them by id, BERT's and RoBERTa's by name and id."""
    if processor is None:
        return
    for part in processor.get("processors", []):
        _renumber_frame(part, number)
    if isinstance(processor.get("special_tokens"), dict):
        for token in processor["special_tokens"].values():
            token["ids"] = [number[index] for index in token["ids"]]
    for role in ("sep", "cls"):
        if role in processor:
            name, index = processor[role]
            processor[role] = [name, number[index]]


def _reduced_model(dense: PreTrainedModel, kept: list[int], number: dict[int, int]) -> Any:
    rows = torch.tensor(kept)
    reduced = copy.deepcopy(dense)
    old: Any = reduced.get_input_embeddings()
    padding = number.get(old.padding_idx) if old.padding_idx is not None else None
    weight = old.weight.detach()[rows.to(old.weight.device)].clone()
    reduced.set_input_embeddings(
        _replacing(nn.Embedding(weight.shape[0], weight.shape[1], padding, device="meta"), old, weight=weight)
    )
    head: Any = reduced.get_output_embeddings()
    if head is not None:
        weight = weight if is_tied(reduced) else head.weight.detach()[rows.to(head.weight.device)].clone()
        shape = (weight.shape[1], weight.shape[0])
        bias = None if head.bias is None else head.bias.detach()[rows.to(head.bias.device)].clone()
        new = _replacing(nn.Linear(*shape, head.bias is not None, device="meta"), head, weight=weight, bias=bias)
        _reduce_other_bias_(reduced, head, new, rows)
        reduced.set_output_embeddings(new)
    configs = [reduced.config, reduced.config.get_text_config(), getattr(reduced, "generation_config", None)]
    for config in {id(config): config for config in configs if config is not None}.values():
        _renumber_config_(config, number)
    reduced.config.get_text_config().vocab_size = len(kept)
    if hasattr(reduced, "vocab_size"):
        reduced.vocab_size = len(kept)
    reduced.tie_weights()
    return reduced


def _replacing(new: Any, old: Any, **tensors: torch.Tensor | None) -> Any:
    new.load_state_dict(
        {name: value for name, value in tensors.items() if value is not None}, strict=True, assign=True
    )
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(old.get_parameter(name).requires_grad)
    return new.train(old.training)


def _reduce_other_bias_(model: Any, old: Any, new: Any, rows: torch.Tensor) -> None:
    """BERT and its like keep the head's bias beside the head too, tied to it or not."""
    parent = model.get_submodule((module_name(model, old) or "").rpartition(".")[0])
    beside = getattr(parent, "bias", None)
    if isinstance(beside, nn.Parameter):
        is_same = beside is old.bias
        parent.bias = new.bias if is_same else nn.Parameter(beside.detach()[rows.to(beside.device)].clone())


def _renumber_config_(config: Any, number: dict[int, int]) -> None:
    for name, value in list(vars(config).items()):
        if not (name.endswith("_token_id") or name in _ID_LISTS):
            continue
        if isinstance(value, int):
            setattr(config, name, number.get(value, value))
        elif isinstance(value, list):
            setattr(config, name, [number[index] for index in value if index in number])
