"""Perplexity of a masked language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_PRETRAINING_MAPPING_NAMES,
)

from hf_lowrank.data.batches import special_frame
from hf_lowrank.data.rows import drawn_places, load_texts
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation.base import Step, Task
from hf_lowrank.evaluation.blocks import block_length_of, joined_ids
from hf_lowrank.evaluation.perplexity import Perplexity, token_steps
from hf_lowrank.hosts.outputs import IGNORED_LABEL

_PRETRAINING = {name for name in MODEL_FOR_PRETRAINING_MAPPING_NAMES.values() if name.endswith("ForPreTraining")}
# Of the chosen tokens, how many become the mask token and how many a random one.
_MASKED, _RANDOM = 0.8, 0.1


@dataclass(frozen=True)
class MaskedLanguageModeling(Task):
    """Perplexity of hidden tokens: `exp` of the mean negative log-likelihood of those that were masked.

    All texts are joined without anything between them and cut into blocks of `block_length` tokens, the special tokens
    at both ends counted; what is left at the end is dropped. Every token but the special ones is chosen with
    probability `masked_fraction`. As in BERT's training, 80 % of the chosen become the mask token, 10 % a random token
    and 10 % stay; all of them are scored, none else. The draws depend on `seed` and the shape of the blocks alone, so
    every model with that tokenizer sees the same.

    Args:
        max_examples: Blocks at most, drawn by `seed` out of the whole text.
        block_length: Tokens of a block; what the model can take, if that is less.
        masked_fraction: Probability of each token to be chosen.
    """

    name: ClassVar[str] = "masked-lm"
    needs: ClassVar[tuple[str, ...]] = ("text",)
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    heads: ClassVar = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) | _PRETRAINING

    text_column: str | None = None
    block_length: int = 128
    masked_fraction: float = 0.15

    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        if not 0 < self.masked_fraction <= 1:
            raise InputError(f"masked_fraction must be above 0 and at most 1, got {self.masked_fraction}.")
        if tokenizer.mask_token_id is None:
            raise InputError(f"Task {self.name} needs a mask token, and the tokenizer has none. Use causal-lm?")
        blocks = self._blocks(tokenizer, load_texts(examples, self.text_column), model)  # (N, T)
        generator = torch.Generator().manual_seed(self.seed)
        special = torch.isin(blocks, torch.tensor(sorted(tokenizer.all_special_ids)))
        chosen = (torch.rand(blocks.shape, generator=generator) < self.masked_fraction) & ~special
        if not bool(chosen.any()):
            raise InputError(f"None of the {len(blocks)} blocks got a masked token. Give more text.")
        draw = torch.rand(blocks.shape, generator=generator)
        noise = torch.randint(len(tokenizer), blocks.shape, generator=generator)
        inputs = blocks.masked_fill(chosen & (draw < _MASKED), tokenizer.mask_token_id)
        inputs = torch.where(chosen & (draw >= 1 - _RANDOM), noise, inputs)
        return token_steps(inputs, blocks.masked_fill(~chosen, IGNORED_LABEL), batch_size)

    def _blocks(self, tokenizer: Any, texts: Sequence[str], model: Any) -> torch.Tensor:
        room = block_length_of(model, self.block_length) - tokenizer.num_special_tokens_to_add()
        if room < 1:
            raise InputError(f"block_length={self.block_length} leaves no room beside the special tokens. Raise it.")
        ids = joined_ids(texts, tokenizer, None, room)
        rows = ids[: len(ids) // room * room].view(-1, room)
        start, end = special_frame(tokenizer)
        drawn = drawn_places(len(rows), self.max_examples, self.seed)
        return torch.tensor([[*start, *row, *end] for row in rows[drawn].tolist()])

    def score(self) -> Perplexity:
        return Perplexity()


TASK = MaskedLanguageModeling
