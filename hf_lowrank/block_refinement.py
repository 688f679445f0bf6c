"""A short, guarded training of one block after the other towards what the dense block returns."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lowrank.blocks import Walk, block_name, calls_in_order, frozen, hidden_states
from hf_lowrank.calibration import Calibration
from hf_lowrank.outputs import real_tokens
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.refinement import Refinement, Training
from hf_lowrank.remote_code.lowrank_structures import named_structures


def refine_blocks_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    calibration: Calibration,
    *,
    passes: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Refinement]:
    """Train each block of `small`, in order, to return on its own inputs what the dense block returns on its.

    All weights of a block are trained, the others are not: no gradient leaves the block, so that of a model of any
    depth one block's activations are held. The loss is the squared error over the variance of the dense block's
    output (AA-SVD, 2026); a block is left in the state of the pass with the least of it on `calibration.probes`, the
    one before the first pass included.

    Args:
        passes: Over the calibration batches, for each block.
        learning_rate: Peak of AdamW's.
        seed: Of the order of the batches.

    Returns:
        By block; its distances are that error.
    """
    names = list(dict.fromkeys(block_name(name) for name, _ in named_structures(small) if block_name(name)))
    blocks = calls_in_order(dense, names, calibration.probes[0])
    batches = [*calibration.batches, *calibration.probes]
    trainable = [parameter.requires_grad for parameter in small.parameters()]
    found = {}
    with frozen(dense), frozen(small):
        walk, reference = Walk(small, blocks, batches), Walk(dense, blocks, batches)
        for name in blocks:
            wanted = [hidden_states(output) for output in reference.advance()]
            block = _Block(walk, wanted, len(calibration.batches))
            parameters = list(small.get_submodule(name).parameters())
            training = Training(
                parameters, len(calibration.batches), block.error, block.held_out_error, passes, seed, progress
            )
            found[name] = training.at(learning_rate, f"refining {name}")
            small.get_submodule(name).requires_grad_(False)
            walk.advance()
    for parameter, requires_grad in zip(small.parameters(), trainable, strict=True):
        parameter.requires_grad_(requires_grad)
    return found


class _Block:
    """How far the present block of a walk is from what is wanted of it.

    Args:
        wanted: What it should return, batch by batch.
        num_batches: How many of the batches are trained on; the others are held out.
    """

    def __init__(self, walk: Walk, wanted: Sequence[torch.Tensor], num_batches: int) -> None:
        self._walk = walk
        self._wanted = wanted
        self._num_batches = num_batches
        rows = torch.cat([self._rows(index, hidden) for index, hidden in enumerate(wanted)])
        self._variance = rows.var()

    def error(self, index: int) -> torch.Tensor:
        """Mean squared error on a batch, over the variance of what is wanted."""
        found = self._rows(index, hidden_states(self._walk.run(index)))
        return F.mse_loss(found, self._rows(index, self._wanted[index])) / self._variance

    @torch.no_grad()
    def held_out_error(self) -> float:
        """The mean of the errors on the batches that are not trained on."""
        held_out = range(self._num_batches, len(self._wanted))
        return sum(float(self.error(index)) for index in held_out) / len(held_out)

    def _rows(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[real_tokens(self._walk.batches[index])]
