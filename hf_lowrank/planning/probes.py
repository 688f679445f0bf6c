"""What cutting one matrix does to the whole model: one short run a matrix, and the error curve that follows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.blocks import (
    block_name,
    find_blocks,
    frozen,
    recorded_outputs,
    replayed_outputs,
    weight_replaced,
)
from hf_lowrank.outputs import Batch, Said, run
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.targets import DenseMatrix

# Product of the factors of one matrix at one rank, (O, I).
Approximation = Callable[[DenseMatrix, int], torch.Tensor]


class Probe:
    """Compares a model, changed for a moment, with itself as it is, on the same few batches.

    Args:
        batches: Text that the statistics were not made from.
    """

    def __init__(self, model: PreTrainedModel, matrices: Sequence[DenseMatrix], batches: Sequence[Batch]) -> None:
        self._model = model
        self._blocks = find_blocks(model, matrices)
        self._batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
        self._references: list[Said] = []
        self._recordings: list[dict[str, Any]] = []
        with frozen(model), torch.inference_mode():
            for batch in self._batches:
                with recorded_outputs(model, self._blocks) as outputs:
                    self._references.append(run(model, batch))
                self._recordings.append(outputs)

    def damage(self, changes: Mapping[DenseMatrix, torch.Tensor]) -> float:
        """Mean distance of the outputs (see `Said.distance`) with these weights in place of the model's own.

        Blocks before the first change are not run again.
        """
        first = min((self._position(matrix) for matrix in changes), default=0)
        skipped = self._blocks[:first]
        total, count = 0.0, 0
        with ExitStack() as stack:
            stack.enter_context(frozen(self._model))
            stack.enter_context(torch.inference_mode())
            for matrix, weight in changes.items():
                stack.enter_context(weight_replaced(matrix, weight))
            for batch, outputs, reference in zip(self._batches, self._recordings, self._references, strict=True):
                with replayed_outputs(self._model, skipped, outputs):
                    distances = run(self._model, batch).distance(reference)
                total += float(distances.sum())
                count += len(distances)
        return total / max(count, 1)

    def _position(self, matrix: DenseMatrix) -> int:
        name = block_name(matrix.path)
        if matrix.role == "block":
            return self._blocks.index(name)
        return 0 if matrix.role == "embedding" else len(self._blocks)


def probe_scales(
    probe: Probe,
    matrices: Sequence[DenseMatrix],
    ranks: Mapping[str, int],
    approximation: Approximation,
    progress: Progress = no_progress,
) -> dict[str, float]:
    """Damage done by cutting each matrix alone to the given rank."""
    return {
        matrix.name: probe.damage({matrix: approximation(matrix, ranks[matrix.name])})
        for matrix in progress(matrices, "probing")
    }
