"""What statistics say of a token table: how often each row is used, and what errors in its columns do."""

import torch

from hf_lowrank.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.solvers.autoencoder import OBJECTIVES, BandedTable
from hf_lowrank.solvers.metric import moment_metric
from hf_lowrank.solvers.nonlinear_table import NonlinearTable
from hf_lowrank.solvers.trained_autoencoder import TrainedTable
from hf_lowrank.statistics.moments import MatrixStatistics

# The gradients at an embedding are collected with those at all outputs.
TABLE_NEEDS = frozenset({"input_moment", "output_moment", "row_weights"})

# What errors count by: in closed form, or by the trainings that were published.
EMBEDDING_OBJECTIVES = (*OBJECTIVES, "published", "nonlinear")

TokenTable = BandedTable | NonlinearTable

_SHRINKAGE = 0.1


def make_table(
    weight: torch.Tensor,
    known: MatrixStatistics | None,
    counts: torch.Tensor | None = None,
    objective: str = "loss",
    checkpoint: Checkpoint = NOT_KEPT,
    seed: int = 0,
    progress: Progress = no_progress,
) -> TokenTable:
    """The autoencoders of a token table (V, D): an embedding, tied or not, or an untied head.

    Args:
        known: Statistics of the table: how often rows are used, and the metric of its columns.
        counts: How often tokens occur, where more text was counted than the statistics are of, (V).
        objective: Out of `EMBEDDING_OBJECTIVES`.
        checkpoint: Keeps what a training has finished.
        seed: Of a training's draws, where they are not published.
    """
    if objective == "published":
        return TrainedTable(weight, checkpoint=checkpoint, progress=progress)
    if objective == "nonlinear":
        return NonlinearTable(weight, seed, checkpoint=checkpoint, progress=progress)
    frequencies = counts if counts is not None or known is None else known.row_weights
    if frequencies is not None and (len(frequencies) != len(weight) or not bool(frequencies.any())):
        frequencies = None
    moment = None if known is None else known.input_moment
    metric = None
    if known is not None and moment is not None:
        metric = moment_metric(moment.to(weight.device), known.num_tokens, _SHRINKAGE)
    return BandedTable(weight, frequencies, metric, OBJECTIVES[objective])
