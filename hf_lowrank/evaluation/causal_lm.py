"""Perplexity of a causal language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_lowrank.data.rows import drawn_places, load_texts
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation.base import Step, Task
from hf_lowrank.evaluation.blocks import block_length_of, joined_ids
from hf_lowrank.evaluation.perplexity import Perplexity, token_steps
from hf_lowrank.hosts.outputs import IGNORED_LABEL


@dataclass(frozen=True)
class CausalLanguageModeling(Task):
    """Perplexity a token over windows of the joined texts.

    All texts are joined, the end-of-sequence token after each, and windows of `block_length` tokens are taken every
    `stride` tokens. The last `stride` tokens of a window are scored, of the first window all but the first token, so
    that with a stride below the length each token is scored once, with at least `block_length - stride` before it.
    With a stride of the length, the default, windows do not overlap and the first token of each is not scored.

    Args:
        max_examples: Windows at most, drawn by `seed` out of the whole text.
        block_length: Tokens of a window; what the model can take, if that is less.
        stride: Tokens from one window to the next; None is `block_length`.
    """

    name: ClassVar[str] = "causal-lm"
    needs: ClassVar[tuple[str, ...]] = ("text",)
    metric: ClassVar[str] = "perplexity"
    higher_is_better: ClassVar[bool] = False
    heads: ClassVar = frozenset(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

    text_column: str | None = None
    block_length: int = 128
    stride: int | None = None

    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        length = block_length_of(model, self.block_length)
        stride = length if self.stride is None else self.stride
        if not 0 < stride <= length:
            raise InputError(f"stride must be between 1 and block_length={length}, got {stride}.")
        end = tokenizer.eos_token_id
        texts = load_texts(examples, self.text_column)
        ids = joined_ids(texts, tokenizer, end, length)
        windows = ids.unfold(0, length, stride)  # (N, T)
        labels = torch.cat([windows[:, 1:], torch.full((len(windows), 1), IGNORED_LABEL)], dim=1)  # (N, T)
        labels[1:, : max(length - stride - 1, 0)] = IGNORED_LABEL
        drawn = drawn_places(len(windows), self.max_examples, self.seed)
        return token_steps(windows[drawn], labels[drawn], batch_size)

    def score(self) -> Perplexity:
        return Perplexity()


TASK = CausalLanguageModeling
