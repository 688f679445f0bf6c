"""How well the cosine of two sentences' embeddings follows their gold similarity."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from hf_lowrank.data.rows import as_number, as_text, load_rows, require_columns
from hf_lowrank.evaluation.base import Step, Task
from hf_lowrank.evaluation.blocks import block_length_of
from hf_lowrank.evaluation.text_regression import Correlation

# What the two sentences and the score are read by.
_READERS: tuple[Callable[[Any, str], Any], ...] = (as_text, as_text, as_number)


class _Similarity(Correlation):
    """Cosines and gold scores of all pairs."""

    def add(self, rows: torch.Tensor, step: Step) -> None:
        """Count one step; the rows are unit vectors, (2, N) x D."""
        first, second = rows.double().chunk(2)
        super().add((first * second).sum(dim=-1, keepdim=True), step)


@dataclass(frozen=True)
class SentenceSimilarity(Task):
    """Spearman's rank correlation between gold scores and the cosine of embeddings, pooled as `pooling_of` says.

    A head, if there is one, is left out.

    Args:
        max_examples: Pairs at most, drawn by `seed`.
        score_column: Gold similarity, on any scale.
        max_seq_length: Tokens of a sentence at most.
    """

    name: ClassVar[str] = "similarity"
    needs: ClassVar[tuple[str, ...]] = ("sentence1", "sentence2", "score")
    metric: ClassVar[str] = "spearman"
    higher_is_better: ClassVar[bool] = True
    heads: ClassVar[tuple[str, ...]] = ()

    text_column: str = "sentence1"
    text_pair_column: str = "sentence2"
    score_column: str = "score"
    max_seq_length: int = 256

    def prepare(self, model: Any) -> Any:
        return model.base_model

    def _steps(self, tokenizer: Any, examples: Any, batch_size: int, model: Any) -> Sequence[Step]:
        rows = load_rows(examples, self.max_examples, self.seed)
        columns = [self.text_column, self.text_pair_column, self.score_column]
        require_columns(rows, columns, "Set text_column, text_pair_column and score_column.")
        pairs = [tuple(read(row[name], name) for read, name in zip(_READERS, columns, strict=True)) for row in rows]
        # Pairs of like length together: less padding.
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        length = block_length_of(model, self.max_seq_length)
        return [
            self._step(pairs[start : start + batch_size], tokenizer, length)
            for start in range(0, len(pairs), batch_size)
        ]

    def _step(self, pairs: Sequence[tuple[Any, ...]], tokenizer: Any, length: int) -> Step:
        texts = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        found = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        ids = [torch.tensor(row) for row in found]
        inputs = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id or 0),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        }
        return Step(inputs, [pair[2] for pair in pairs])

    def score(self) -> _Similarity:
        return _Similarity()


TASK = SentenceSimilarity
