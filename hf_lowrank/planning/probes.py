"""What cutting one matrix does to the whole model: one short run a matrix, and the error curve that follows."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.files.scratch import scratch_folder
from hf_lowrank.hosts.blocks import (
    block_name,
    find_blocks,
    frozen,
    recorded_outputs,
    replayed_outputs,
    weight_replaced,
)
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.hosts.outputs import Batch, Said, run
from hf_lowrank.hosts.targets import BLOCK_ROLES

# What makes the weight (O, I) that takes the place of a matrix' own.
Changes = Mapping[DenseMatrix, Callable[[], torch.Tensor]]

_SAID = "output"


class Probe:
    """Compares a model, changed for a moment, with itself as it is, on the same few batches.

    What the model does as it is, is kept on disk and read a batch at a time.

    Args:
        batches: Text that the statistics were not made from.
    """

    def __init__(self, model: PreTrainedModel, matrices: Sequence[DenseMatrix], batches: Sequence[Batch]) -> None:
        self._model = model
        self._blocks = find_blocks(model, matrices)
        self._batches = batches
        self._folder = scratch_folder(self)
        with frozen(model), torch.inference_mode():
            for index, batch in enumerate(batches):
                with recorded_outputs(model, self._blocks) as outputs:
                    said = run(model, self._placed(batch))
                self._blocks = list(outputs)  # as they run; a wrapper of several models may name them otherwise
                for name, output in [*outputs.items(), (_SAID, (said.kind, said.rows))]:
                    torch.save(output, self._file(index, name))

    def damage(self, changes: Changes) -> float:
        """Mean distance of the outputs (see `Said.distance`) with these weights in place of the model's own.

        Blocks before the first change are not run again.
        """
        first = min((self._position(matrix) for matrix in changes), default=0)
        total, count = 0.0, 0
        with ExitStack() as stack:
            stack.enter_context(frozen(self._model))
            stack.enter_context(torch.inference_mode())
            for matrix, make_weight in changes.items():
                stack.enter_context(weight_replaced(matrix, make_weight))
            for index in range(len(self._batches)):
                distances = self._distances(index, self._blocks[:first])
                total += float(distances.sum())
                count += len(distances)
        return total / max(count, 1)

    def _distances(self, index: int, skipped: Sequence[str]) -> torch.Tensor:
        outputs = {name: self._read(index, name) for name in skipped}
        with replayed_outputs(self._model, skipped, outputs):
            said = run(self._model, self._placed(self._batches[index]))
        return said.distance(Said(*self._read(index, _SAID)))

    def _placed(self, batch: Batch) -> Batch:
        return {name: value.to(self._model.device) for name, value in batch.items()}

    def _file(self, index: int, name: str) -> Path:
        return self._folder / f"{index}-{name}.pt"

    def _read(self, index: int, name: str) -> Any:
        # Mapped: of what is not used nothing is read. A block may return any object, and the file is our own.
        return torch.load(self._file(index, name), map_location=self._model.device, mmap=True, weights_only=False)

    def _position(self, matrix: DenseMatrix) -> int:
        name = block_name(matrix.path)
        if matrix.role in BLOCK_ROLES:  # one that is not in a block which was called has all of them after it
            return self._blocks.index(name) if name in self._blocks else 0
        return 0 if matrix.role == "embedding" else len(self._blocks)
