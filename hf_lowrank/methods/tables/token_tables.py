"""What statistics say of a token table: how often each row is used, and what errors in its columns do."""

from collections.abc import Callable
from typing import Any

import torch

from hf_lowrank.hosts.matrices import Matrix
from hf_lowrank.methods.metric import moment_metric
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.tables.banded import CLOSED_FORM, BandedTable
from hf_lowrank.methods.tables.nonlinear_table import NonlinearTable
from hf_lowrank.methods.tables.trained_table import TrainedTable
from hf_lowrank.remote_code.lowrank_plan import Spec
from hf_lowrank.statistics.moments import MatrixStatistics

# The gradients at an embedding are collected with those at all outputs.
TABLE_NEEDS = frozenset({"input_moment", "output_moment", "row_weights"})

TokenTable = BandedTable | NonlinearTable

_SHRINKAGE = 0.1


def make_table(
    weight: torch.Tensor,
    known: MatrixStatistics | None,
    counts: torch.Tensor | None = None,
    objective: str = "loss",
) -> BandedTable:
    """The autoencoders of a token table (V, D) in closed form: an embedding, tied or not, or an untied head.

    Args:
        known: Statistics of the table: how often rows are used, and the metric of its columns.
        counts: How often tokens occur, where more text was counted than the statistics are of, (V).
        objective: `loss` or `direction`.
    """
    frequencies = counts if counts is not None or known is None else known.row_weights
    if frequencies is not None and (len(frequencies) != len(weight) or not bool(frequencies.any())):
        frequencies = None
    moment = None if known is None else known.input_moment
    metric = None
    if known is not None and moment is not None:
        metric = moment_metric(moment.to(weight.device), known.num_tokens, _SHRINKAGE)
    return BandedTable(weight, frequencies, metric, CLOSED_FORM[objective])


def is_token_table(spec: Spec) -> bool:
    """Whether a spec is of codes and a decoder in the place of a token table."""
    return str(spec["structure"]).endswith(("autoencoder_embedding", "autoencoder_head"))


def token_table(problem: Problem, matrix: Matrix) -> TokenTable:
    """The autoencoders of one table of a problem, made once."""
    make = OBJECTIVES[problem.storage.objective]
    return problem.evidence.once(f"table {matrix.name}", lambda: make(problem, matrix))


def _closed_form(problem: Problem, matrix: Matrix) -> TokenTable:
    known = problem.known(matrix.members[0])
    return make_table(problem.weight(matrix), known, problem.evidence.token_counts, problem.storage.objective)


def _trained(problem: Problem, matrix: Matrix) -> TokenTable:
    return TrainedTable(problem.weight(matrix), **_kept(problem, matrix))


def _nonlinear(problem: Problem, matrix: Matrix) -> TokenTable:
    return NonlinearTable(problem.weight(matrix), problem.seed, **_kept(problem, matrix))


def _kept(problem: Problem, matrix: Matrix) -> dict[str, Any]:
    return {"checkpoint": problem.checkpoint().part(matrix.name), "progress": problem.progress}


# What errors count by -> the autoencoders that are best so: in closed form, or by the trainings that were published.
OBJECTIVES: dict[str, Callable[[Problem, Matrix], TokenTable]] = {
    **dict.fromkeys(CLOSED_FORM, _closed_form),
    "published": _trained,
    "nonlinear": _nonlinear,
}
