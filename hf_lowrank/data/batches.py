"""Batches of what models read from anything: texts, images, sounds, rows of ids, a `DataLoader`."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import FeatureExtractionMixin, ImageProcessingMixin, ProcessorMixin

from hf_lowrank.data.rows import READY, Row, is_ready, load_rows, load_texts
from hf_lowrank.errors import InputError, one_line
from hf_lowrank.extras import load_part
from hf_lowrank.hosts.outputs import IGNORED_LABEL, Batch, real_tokens, token_masks

T = TypeVar("T")

# Texts tokenized at a time: enough to be fast, few enough to stop early.
_CHUNK = 64
_UNKNOWN = "The text has no token the tokenizer knows. Give other text, or the model's own tokenizer."


def make_batches(
    source: Any,
    tokenizer: Any,
    num_calibration_samples: int = 256,
    max_seq_length: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    text_column: str | None = None,
    pack: bool | None = None,
) -> list[Batch]:
    """Batches of token ids and attention masks, of images or of sounds, the same for the same arguments.

    Packed, the texts are shuffled, joined with the end-of-sequence token after each, and cut into windows that are all
    `max_seq_length` long. Otherwise a sequence is the beginning of one text, with the tokenizer's special tokens and
    padded to the longest of its batch, which the attention mask tells; only where there are too few texts are their
    later parts used too.

    Args:
        source: See `load_rows`; or a `DataLoader` or other iterable of batches (`input_ids`, `pixel_values` and their
            like), or rows of those, whose order and other tensors, labels among them, are kept.
        tokenizer: Or an image processor, a feature extractor or a processor of several, which read images and sounds
            as `hf_lowrank.data.media.media_batch` says.
        num_calibration_samples: Sequences at most.
        pack: Whether to pack; None does so for a tokenizer without a mask token, that is for causal models.

    Raises:
        InputError: If the data is empty or unreadable, or there is no tokenizer to read text with.
    """
    if num_calibration_samples < 1 or max_seq_length < 1 or batch_size < 1:
        raise InputError("num_calibration_samples, max_seq_length and batch_size must be at least 1.")
    source = list(source) if isinstance(source, Iterator) else source
    if is_ready(source):
        return as_token_ids(lambda: _take(_collate(iter(source), batch_size), num_calibration_samples))
    tokenizer = reader_of(source, tokenizer)
    if reads_media(tokenizer):
        rows = load_rows(source, num_calibration_samples, seed)
        make_one = load_part("hf_lowrank.data.media", "train").media_batch
        return [make_one(rows[start : start + batch_size], tokenizer) for start in range(0, len(rows), batch_size)]
    if tokenizer is None:
        raise InputError("Text needs a tokenizer, and there is none. Give tokenizer=, or batches of input_ids.")
    texts = load_texts(source, text_column)
    random.Random(seed).shuffle(texts)
    pack = tokenizer.mask_token_id is None if pack is None else pack
    make = _packed_windows if pack else _passages
    sequences = [{"input_ids": ids} for ids in islice(make(texts, tokenizer, max_seq_length), num_calibration_samples)]
    if not sequences:
        raise InputError(_UNKNOWN)
    return list(_collate(iter(sequences), batch_size, tokenizer.pad_token_id or 0))


def reads_media(processor: Any) -> bool:
    """Whether what is called a tokenizer reads images or sounds."""
    return isinstance(processor, (ImageProcessingMixin, FeatureExtractionMixin, ProcessorMixin))


def reader_of(source: Any, processor: Any) -> Any:
    """The tokenizer of a processor of several kinds where data that can be read again are text alone."""
    if not hasattr(processor, "tokenizer") or is_ready(source):
        return processor
    is_media = load_part("hf_lowrank.data.media", "train").holds_media(load_rows(source)[0])
    return processor if is_media else processor.tokenizer


def as_token_ids(read: Callable[[], T]) -> T:
    """Rows or batches of token ids, as some function reads them out of what a user gave.

    Raises:
        InputError: If they hold something else; see `as_tensors`.
    """
    try:
        return read()
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:  # of torch, whatever a row holds
        rule = "must hold input_ids of whole numbers, and where they have a mask, one as long"
        raise InputError(
            f"Rows of token ids {rule}. Mend them. ({type(error).__name__}: {one_line(error)})"
        ) from error


def require_processor(model: Any, processor: Any) -> None:
    """Check that there is something to make a model's inputs with.

    Raises:
        InputError: If there is not.
    """
    wanted = model.main_input_name
    if wanted != "input_ids" and not reads_media(processor):
        raise InputError(
            f"{type(model).__name__} reads {wanted}, and there is no processor that makes it. Save one beside it, "
            f"give it as tokenizer=, or give batches of {wanted}."
        )
    if processor is None:
        raise InputError("Text needs a tokenizer, and there is none. Give tokenizer=, or rows of input_ids.")


def require_tokens(batches: Sequence[Batch], min_tokens: int) -> None:
    """Check that there is enough text, if it is text.

    Raises:
        InputError: With the number of tokens there and the number needed.
    """
    there = num_tokens(batches)
    if "input_ids" in batches[0] and there < min_tokens:
        raise InputError(f"The text has {there} tokens, and at least {min_tokens} are needed. Give more text.")


def num_tokens(batches: Iterable[Batch]) -> int:
    """How many tokens are read that are no padding."""
    return sum(int(mask.sum()) for batch in batches if (mask := real_tokens(batch)) is not None)


def require_padding(tokenizer: Any) -> None:
    """Check that rows of several lengths can be padded.

    Raises:
        InputError: If the tokenizer has no token for that.
    """
    if tokenizer.pad_token_id is None:
        raise InputError("The tokenizer has no padding token. Set one (tokenizer.pad_token = tokenizer.eos_token).")


def require_known_tokens(batches: Iterable[Mapping[str, Any]], model: Any, tokenizer: Any = None) -> None:
    """Check that a model has a row for every token id, and that the text is not of special tokens alone.

    Raises:
        InputError: With the first id that is out of bounds, or if the tokenizer knew no token.
    """
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", None)
    is_known = tokenizer is None
    every = [batch["input_ids"] for batch in batches if "input_ids" in batch]
    for ids in every:
        if vocab_size is not None and bool((bad := (ids < 0) | (ids >= vocab_size)).any()):
            rule = f"must be below {vocab_size}, the size of the model's vocabulary"
            raise InputError(f"Token id {int(ids[bad][0])} {rule}. Give the ids, or the tokenizer, of this model.")
        is_known = is_known or any_known(ids, tokenizer) or bool(ids.eq(tokenizer.mask_token_id or -1).any())
    if every and not is_known:
        raise InputError(_UNKNOWN)


def any_known(ids: torch.Tensor, tokenizer: Any) -> bool:
    """Whether any token is not special; what a tokenizer does not know becomes a special one."""
    return not bool(torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=torch.long)).all())


def special_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens the tokenizer puts before and after a text."""
    ids = tokenizer("a")["input_ids"]
    is_text = [index for index, token in enumerate(ids) if token not in tokenizer.all_special_ids]
    first, last = (is_text[0], is_text[-1]) if is_text else (len(ids), len(ids))
    return ids[:first], ids[last + 1 :]


def tokenize(texts: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """The token ids of each text that has some, without special tokens."""
    for start in range(0, len(texts), _CHUNK):
        # A text may be longer than the model reads: it is cut afterwards, so no warning.
        found = tokenizer(texts[start : start + _CHUNK], add_special_tokens=False, verbose=False)["input_ids"]
        yield from (ids for ids in found if ids)


def _packed_windows(texts: Sequence[str], tokenizer: Any, length: int) -> Iterator[torch.Tensor]:
    """Full windows over the joined texts, each text followed by the end-of-sequence token if there is one.

    What is left at the end is dropped, unless it is all there is.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    waiting: list[int] = []
    is_first = True
    for ids in tokenize(texts, tokenizer):
        waiting += [*ids, *end]
        while len(waiting) >= length:
            yield torch.tensor(waiting[:length])
            waiting, is_first = waiting[length:], False
    if is_first and waiting:
        yield torch.tensor(waiting)


def _passages(texts: Sequence[str], tokenizer: Any, length: int) -> Iterator[torch.Tensor]:
    """The beginnings of all texts, then their later parts, with special tokens."""
    start, end = special_frame(tokenizer)
    room = length - len(start) - len(end)
    if room < 1:
        raise InputError(f"max_seq_length={length} leaves no room beside the special tokens. Raise it.")
    later = []
    for ids in tokenize(texts, tokenizer):
        yield torch.tensor([*start, *ids[:room], *end])
        later += [ids[first : first + room] for first in range(room, len(ids), room)]
    for ids in later:
        yield torch.tensor([*start, *ids, *end])


def _collate(items: Iterator[Row], batch_size: int, padding: int = 0) -> Iterator[Batch]:
    """Batches as they are; single sequences padded together."""
    waiting: list[dict[str, torch.Tensor]] = []
    for item in items:
        tensors = as_tensors(item)
        if is_batch(tensors):
            yield tensors
            continue
        waiting.append(tensors)
        if len(waiting) == batch_size:
            yield padded(waiting, padding)
            waiting = []
    if waiting:
        yield padded(waiting, padding)


def as_tensors(row: Row) -> dict[str, torch.Tensor]:
    """The columns of a row or batch that are no text, and a mask where token ids, (T) or (B, T), have none.

    Raises:
        ValueError: If there is nothing a model reads, or the mask is of another shape; torch raises others of its own.
    """
    needed = (*READY, "attention_mask")
    tensors = {name: torch.as_tensor(value) for name, value in row.items() if name in needed or not _is_text(value)}
    if "input_ids" not in tensors:
        if not READY.keys() & tensors.keys():
            raise ValueError("nothing that models read")
        return tensors
    ids = tensors["input_ids"]
    tensors.setdefault("attention_mask", torch.ones_like(ids))
    is_whole = not ids.is_floating_point() and ids.dtype != torch.bool
    if not is_whole or ids.dim() not in (1, 2) or not ids.numel() or tensors["attention_mask"].shape != ids.shape:
        raise ValueError(f"{tuple(ids.shape)} of {ids.dtype}")
    return tensors


def padded(rows: Sequence[Mapping[str, torch.Tensor]], padding: int) -> Batch:
    """Sequences of unequal lengths as one batch; labels of tokens are filled up with the ignored one."""
    fill = {"input_ids": padding, "decoder_input_ids": padding, "labels": IGNORED_LABEL}
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: pad_sequence(values, batch_first=True, padding_value=fill.get(name, 0))
        if values[0].dim()
        else torch.stack(values)
        for name, values in columns.items()
    }


def is_batch(tensors: Batch) -> bool:
    """Whether tensors hold several rows rather than one."""
    return any(tensors[name].dim() > READY[name] for name in READY if name in tensors)


def rows_of(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """The rows of a batch without their padding, where that is on the right."""
    masks = {mask.shape: mask for mask in token_masks(batch)}  # of both sides of an encoder-decoder
    return [
        {name: value[row][_kept(masks.get(value.shape), row)] for name, value in batch.items()}
        for row in range(len(next(iter(batch.values()))))
    ]


def _kept(mask: torch.Tensor | None, row: int) -> Any:
    length = 0 if mask is None else int(mask[row].sum())
    return slice(length) if mask is not None and bool(mask[row, :length].all()) else ...


def _take(batches: Iterable[Batch], num_sequences: int) -> list[Batch]:
    """The first batches that hold that many sequences, the last one cut."""
    taken: list[Batch] = []
    for batch in batches:
        taken.append({name: tensor[:num_sequences] for name, tensor in batch.items()})
        num_sequences -= len(next(iter(batch.values())))
        if num_sequences <= 0:
            break
    return taken


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], str))
