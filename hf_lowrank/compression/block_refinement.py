"""A short, guarded training of one block after the other towards what the dense block returns."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lowrank.compression.refinement import Refinement, Training
from hf_lowrank.data.calibration import Calibration
from hf_lowrank.files.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.hosts.blocks import Walk, block_name, calls_in_order, frozen, hidden_states
from hf_lowrank.hosts.outputs import mean_distance, real_rows
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_structures import named_structures


def refine_blocks_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    calibration: Calibration,
    *,
    passes: int,
    learning_rate: float = 1e-3,
    seed: int = 0,
    checkpoint: Checkpoint = NOT_KEPT,
    progress: Progress = no_progress,
) -> dict[str, Refinement]:
    """Train each block of `small`, in order, to return on its own inputs what the dense block returns on its.

    All weights of a block are trained, the others are not: no gradient leaves the block, so that of a model of any
    depth one block's activations are held. The loss is the squared error over the variance of the dense block's
    output (AA-SVD, 2026). What a block returns can come nearer while the model goes astray, so a block is left in the
    state, the one before its first pass included, in which the outputs of the whole model are nearest to the dense
    model's on `calibration.probes`.

    Args:
        passes: Over the calibration batches, for each block.
        learning_rate: Peak of AdamW's.
        seed: Of the order of the batches.
        checkpoint: Keeps each finished pass of each block.

    Returns:
        By block.
    """
    names = list(dict.fromkeys(block_name(name) for name, _ in named_structures(small) if block_name(name)))
    blocks = calls_in_order(dense, names, calibration.probes[0])
    trainable = [parameter.requires_grad for parameter in small.parameters()]
    found = {}
    with frozen(dense), frozen(small):
        walk, reference = Walk(small, blocks, calibration.batches), Walk(dense, blocks, calibration.batches)
        for name in blocks:
            training = Training(
                parameters=list(small.get_submodule(name).parameters()),
                num_batches=len(calibration.batches),
                loss=_BlockLoss(walk, [hidden_states(output) for output in reference.advance()]),
                distance=lambda: mean_distance(small, dense, calibration.probes),
                passes=passes,
                seed=seed,
                checkpoint=checkpoint.part(f"refined-{name}"),
                progress=progress,
            )
            found[name] = training.at(learning_rate, f"refining {name}")
            small.get_submodule(name).requires_grad_(False)
            walk.advance()
    for parameter, requires_grad in zip(small.parameters(), trainable, strict=True):
        parameter.requires_grad_(requires_grad)
    return found


class _BlockLoss:
    """How far the present block of a walk is from what is wanted of it, batch by batch, relative to its variance."""

    def __init__(self, walk: Walk, wanted: Sequence[torch.Tensor]) -> None:
        self._walk = walk
        self._wanted = wanted
        self._variance = torch.cat([self._rows(index, hidden) for index, hidden in enumerate(wanted)]).var()

    def __call__(self, index: int) -> torch.Tensor:
        found = self._rows(index, hidden_states(self._walk.run(index)))
        return F.mse_loss(found, self._rows(index, self._wanted[index])) / self._variance

    def _rows(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return real_rows(hidden, self._walk.batches[index])
