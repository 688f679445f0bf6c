"""What a model is watched on: real text, images or sounds where there are some, else such as are made up."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
)

from hf_lowrank.data.batches import (
    make_batches,
    num_tokens,
    reader_of,
    reads_media,
    require_known_tokens,
    require_processor,
    require_tokens,
)
from hf_lowrank.data.rows import is_ready, load_rows, load_texts, source_name
from hf_lowrank.data.synthetic import synthetic_batches
from hf_lowrank.data.target_texts import pair_batches, reads_targets, target_column, with_targets
from hf_lowrank.data.two_texts import every_text, judges_pairs, pair_columns, text_batches
from hf_lowrank.errors import InputError
from hf_lowrank.files.digests import fingerprint
from hf_lowrank.hosts.loading import require_runs, vocabulary_size
from hf_lowrank.hosts.outputs import IGNORED_LABEL, Batch, inputs_of, longest_input
from hf_lowrank.remote_code.configuration_lowrank import PREFIX

# Of all batches, the share that ranks are measured on; the others make the statistics.
_PROBE_SHARE = 1 / 9
_MASKED_FRACTION = 0.15
_SHORT_TEXT = (4, 100)  # words


@dataclass(frozen=True)
class Text:
    """How much text is looked at, and how it is drawn.

    Args:
        num_samples: Sequences.
        max_seq_length: Tokens a sequence may have; longer ones are cut.
        batch_size: Sequences run at once.
        text_column: Column of a data set that holds the text.
        seed: Of every draw.
    """

    num_samples: int = 384
    max_seq_length: int = 128
    batch_size: int = 8
    text_column: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Calibration:
    """Batches to collect statistics from, and others to measure ranks on."""

    batches: tuple[Batch, ...]
    probes: tuple[Batch, ...]


def make_calibration(model: PreTrainedModel, source: Any, tokenizer: Any, text: Text) -> Calibration:
    """Batches from `source` (see `hf_lowrank.data.batches.make_batches`), or synthetic ones if it is None.

    A masked-language-model head is given inputs with 15 % of the tokens masked, as it was trained on; the decoder of
    an encoder-decoder what it is to write (see `with_targets`).

    Raises:
        InputError: If the source is empty, or too little for statistics.
    """
    if source is None:
        batches = synthetic_batches(model, tokenizer, text.batch_size, text.seed)
    else:
        batches = _read(model, source, tokenizer, text)
    if is_masked_lm(model) and "labels" not in batches[0]:
        batches = mask_tokens(batches, model, tokenizer, text.seed)
    if reads_targets(model):
        batches = with_targets(batches, model)
    require_runs(model, inputs_of(model, batches[0]))
    num_probes = max(1, round(len(batches) * _PROBE_SHARE))
    if len(batches) < 2:
        raise InputError("Calibration needs two batches at least, one to measure ranks on; got 1. Give more text.")
    return Calibration(tuple(batches[:-num_probes]), tuple(batches[-num_probes:]))


def _read(model: PreTrainedModel, source: Any, tokenizer: Any, text: Text) -> list[Batch]:
    source = list(source) if isinstance(source, Iterator) else source
    if isinstance(source, (list, tuple)) and not source:
        raise InputError("The calibration text holds nothing. Give some, or none at all for synthetic tokens.")
    text_column, length = text.text_column, min(text.max_seq_length, longest_input(model))
    tokenizer = reader_of(source, tokenizer)
    is_text = not is_ready(source) and not reads_media(tokenizer)
    if is_text:
        require_processor(model, tokenizer)
    if is_text and reads_targets(model):
        rows = load_rows(source, text.num_samples, text.seed)
        if target := target_column(rows[0]):
            return pair_batches(rows, tokenizer, text_column, target, length, text.batch_size)
    if is_text and text_column is None and (columns := pair_columns(load_rows(source)[0])):
        rows = load_rows(source, text.num_samples, text.seed)
        if judges_pairs(model):
            return list(text_batches(rows, columns, tokenizer, length, text.batch_size))
        source = every_text(rows, columns)
    if is_text and not is_causal(model):
        source, text_column = varied_lengths(source, text), None
    batches = make_batches(
        source,
        tokenizer,
        num_calibration_samples=text.num_samples,
        max_seq_length=length,
        batch_size=text.batch_size,
        seed=text.seed,
        text_column=text_column,
        pack=None if is_causal(model) else False,
    )
    require_known_tokens(batches, model, tokenizer)
    require_tokens(batches, getattr(model.config.get_text_config(), "hidden_size", 1))  # ConvNeXt has several
    return batches


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model reads from left to right, so that a long text holds every shorter one."""
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def varied_lengths(source: Any, text: Text) -> list[str]:
    """The texts, every other one cut to a sentence or a few: an encoder is asked about short texts too.

    The number of words kept is drawn log-uniformly; a cut begins at a sentence where there is one.
    """
    texts = load_texts(source, text.text_column, limit=text.num_samples, seed=text.seed)
    generator = random.Random(text.seed)
    return [one if index % 2 else _cut(one, generator) for index, one in enumerate(texts)]


def _cut(text: str, generator: random.Random) -> str:
    words = text.split()
    count = int(math.exp(generator.uniform(*map(math.log, _SHORT_TEXT))))
    starts = [0, *(index + 1 for index, word in enumerate(words) if word[-1] in ".!?")]
    start = generator.choice([index for index in starts if index + count <= len(words)] or [0])
    return " ".join(words[start : start + count])


def is_masked_lm(model: PreTrainedModel) -> bool:
    """Whether the model's head predicts masked tokens."""
    name = type(model).__name__.removeprefix(PREFIX)
    family = model.config.model_type.removeprefix("lowrank_")
    masked = {MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(family)}
    pretraining = MODEL_FOR_PRETRAINING_MAPPING_NAMES.get(family)
    if model.config.is_encoder_decoder:  # BART is listed as one; it is trained to write whole texts
        return False
    return name in masked or (name == pretraining and name.endswith("ForPreTraining"))


def mask_tokens(batches: Sequence[Batch], model: PreTrainedModel, tokenizer: Any, seed: int) -> list[Batch]:
    """The batches with 15 % of their real tokens masked, and the labels that name those.

    BERT's recipe: of the chosen tokens 80 % become the mask token, 10 % a random one, 10 % stay. Without a tokenizer
    to say which token masks, all that are not random stay.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size = vocabulary_size(model)
    special = torch.tensor(sorted(tokenizer.all_special_ids) if tokenizer is not None else [], dtype=torch.long)
    mask_token = None if tokenizer is None else tokenizer.mask_token_id
    masked: list[Batch] = []
    for batch in batches:
        ids = batch["input_ids"]
        can = batch.get("attention_mask", torch.ones_like(ids)).bool() & ~torch.isin(ids, special)
        chosen = can & (torch.rand(ids.shape, generator=generator) < _MASKED_FRACTION)
        if not bool(chosen.any()):
            chosen[:, ids.shape[1] // 2] = True
        draw = torch.rand(ids.shape, generator=generator)
        noise = torch.randint(vocab_size, ids.shape, generator=generator)
        inputs = torch.where(chosen & (draw >= 0.9), noise, ids)
        if mask_token is not None:
            inputs = torch.where(chosen & (draw < 0.8), torch.tensor(mask_token), inputs)
        labels = torch.where(chosen, ids, torch.tensor(IGNORED_LABEL))
        masked.append({**batch, "input_ids": inputs, "labels": labels})
    return masked


def described_text(source: Any, batches: Sequence[Batch]) -> dict[str, Any]:
    """What a model was watched on, for the record: where it came from, how much it is, and its hash.

    Images and sounds have no tokens; a sound's samples are none.
    """
    name = "synthetic" if source is None else source_name(source)
    num_samples = sum(len(next(iter(batch.values()))) for batch in batches)
    about = {"source": name, "num_tokens": num_tokens(batches), "num_samples": num_samples}
    return about | {"sha256": fingerprint(batches)}
