"""What the decoder of an encoder-decoder is to write: the labels there are, or what the model writes by itself."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from hf_lowrank.data.batches import padded, rows_of
from hf_lowrank.data.rows import Row, as_text, find_text_column, require_columns
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.blocks import frozen
from hf_lowrank.hosts.loading import vocabulary_size
from hf_lowrank.hosts.outputs import IGNORED_LABEL, Batch, inputs_of, longest_input

# What a text to be written is looked for under where no column is named, in this order.
_TARGET_COLUMNS = ("target", "summary", "highlights")
# Tokens that a model writes at most, and the rows that write at once.
_MOST_WRITTEN, _AT_ONCE = 64, 64


def reads_targets(model: PreTrainedModel) -> bool:
    """Whether a model's decoder has to be given what it is to write; heads of classes give it the text itself."""
    writes = model.get_output_embeddings() is not None or model.base_model is model
    takes = "decoder_input_ids" in inspect.signature(model.forward).parameters
    return bool(getattr(model.config, "is_encoder_decoder", False)) and writes and takes


def with_targets(batches: Sequence[Batch], model: PreTrainedModel) -> list[Batch]:
    """The batches with `labels` and, shifted by one as the host does it, `decoder_input_ids` and their mask.

    Where there are neither, labels are what the model writes by greedy decoding (sequence-level distillation, Kim and
    Rush, 2016): what its decoder reads when it is used. A model without a head is given the text that it reads.
    """
    if not any({"labels", "decoder_input_ids"} & batch.keys() for batch in batches):
        batches = list(_answered(batches, model))
    return [told_apart(_with_decoder_inputs(batch, model)) for batch in batches]


def target_column(row: Row, label_column: str = "") -> str | None:
    """The column of the text that is to be written, named or known by its name; None where there is none."""
    names = (label_column, *_TARGET_COLUMNS)
    return next((name for name in names if isinstance(row.get(name), str)), None)


def pair_batches(
    rows: Sequence[Row], tokenizer: Any, text_column: str | None, target: str, max_seq_length: int, batch_size: int
) -> list[Batch]:
    """Texts to read and, as `labels`, texts to write, cut to `max_seq_length` tokens each.

    Raises:
        InputError: If a row lacks one of them.
    """
    source = find_text_column({name: value for name, value in rows[0].items() if name != target}, text_column)
    require_columns(rows, [source, target])
    form: dict[str, Any] = {"truncation": True, "max_length": max_seq_length, "padding": True, "return_tensors": "pt"}
    batches: list[Batch] = []
    for start in range(0, len(rows), batch_size):
        some = rows[start : start + batch_size]
        read = tokenizer([as_text(row[source], source) for row in some], **form)
        written = tokenizer(text_target=[as_text(row[target], target) for row in some], **form)
        labels = written["input_ids"].masked_fill(written["attention_mask"] == 0, IGNORED_LABEL)
        batches.append({"input_ids": read["input_ids"], "attention_mask": read["attention_mask"], "labels": labels})
    return batches


def told_apart(batch: Batch) -> Batch:
    """The batch with one more token of padding for the decoder if both sides have as many: lengths tell sides."""
    ids = batch.get("decoder_input_ids")
    if ids is None or "input_ids" not in batch or batch["input_ids"].shape != ids.shape:
        return batch
    fill = {"decoder_input_ids": 0, "decoder_attention_mask": 0, "labels": IGNORED_LABEL}
    return {name: F.pad(value, (0, 1), value=fill[name]) if name in fill else value for name, value in batch.items()}


def _with_decoder_inputs(batch: Batch, model: PreTrainedModel) -> Batch:
    labels, ids = batch.get("labels"), batch.get("decoder_input_ids")
    if ids is None and labels is not None:
        ids = _shifted(labels, model)
    if ids is None:
        raise InputError("Some batches have labels or decoder_input_ids, and some have none. Give all of them some.")
    mask = torch.ones_like(ids) if labels is None else labels.ne(IGNORED_LABEL).long()
    mask[:, 0] = 1  # or what attends to nothing would be no number
    return {"decoder_attention_mask": mask, **batch, "decoder_input_ids": ids}


def _shifted(labels: torch.Tensor, model: Any) -> torch.Tensor:
    """Labels (B, T) as inputs of the decoder: one token to start with, and all labels but the last."""
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    named = [getattr(model.config, name, None) for name in ("decoder_start_token_id", "pad_token_id")]
    if shift is not None and None not in named:  # a wrapper of two models may name neither
        found: torch.Tensor = shift(labels=labels)
        return found
    padding = _setting(model, "pad_token_id", "eos_token_id")
    return F.pad(labels, (1, -1), value=_start(model)).masked_fill(F.pad(labels, (1, -1)) == IGNORED_LABEL, padding)


def _start(model: Any) -> int:
    return _setting(model, "decoder_start_token_id", "bos_token_id", "pad_token_id")


def _setting(model: Any, *names: str) -> int:
    holders = (model.generation_config or GenerationConfig(), model.config, model.config.get_text_config(decoder=True))
    found = (getattr(holder, name, None) for name in names for holder in holders)
    return next((value for value in found if isinstance(value, int)), 0)


def _answered(batches: Sequence[Batch], model: Any) -> Iterator[Batch]:
    """The batches with what the model writes as labels; many rows write at once, for each token takes a pass."""
    rows = [row for batch in batches for row in rows_of(batch)]
    labels: list[torch.Tensor] = []
    for start in range(0, len(rows), _AT_ONCE):
        labels += _written(padded(rows[start : start + _AT_ONCE], _setting(model, "pad_token_id")), model)
    for batch in batches:
        count = len(next(iter(batch.values())))
        longest = max(int(one.ne(IGNORED_LABEL).sum()) for one in labels[:count])
        yield {
            **batch,
            "labels": torch.stack([F.pad(one, (0, longest), value=IGNORED_LABEL)[:longest] for one in labels[:count]]),
        }
        labels = labels[count:]


def _written(batch: Batch, model: Any) -> list[torch.Tensor]:
    """A row of labels for each row of a batch."""
    ids = batch.get("input_ids")
    if not model.can_generate():
        if ids is None:
            size = (len(next(iter(batch.values()))), _most_written(model))
            return list(torch.randint(vocabulary_size(model), size, generator=torch.Generator().manual_seed(0)))
        return list(ids.masked_fill(batch.get("attention_mask", torch.ones_like(ids)) == 0, IGNORED_LABEL))
    placed: dict[str, Any] = {name: value.to(model.device) for name, value in inputs_of(model, batch).items()}
    settings: Any = {"max_new_tokens": _most_written(model), "do_sample": False, "num_beams": 1}
    settings["decoder_start_token_id"] = _start(model)
    with frozen(model), torch.no_grad():
        # Whisper's own also cuts long sounds, finds languages and takes out what it started with.
        written: Any = GenerationMixin.generate(model, **placed, **settings)
    tokens = written[:, 1:].cpu()  # the first one it was given
    ends = torch.isin(tokens, torch.tensor(_ends(model)))
    return list(tokens.masked_fill(ends.cumsum(dim=1) - ends.long() > 0, IGNORED_LABEL))


def _most_written(model: Any) -> int:
    limits = (longest_input(model), getattr(model.config, "max_target_positions", None) or _MOST_WRITTEN)
    return min(_MOST_WRITTEN, *(limit - 1 for limit in limits))


def _ends(model: Any) -> list[int]:
    end = getattr(model.generation_config, "eos_token_id", None)
    return [] if end is None else end if isinstance(end, list) else [end]
