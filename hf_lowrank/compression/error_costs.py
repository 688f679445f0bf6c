"""What errors in the matrices of a model cost, by what the text says of them."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hf_lowrank.files.kept_on_disk import KeptOnDisk
from hf_lowrank.files.scratch import scratch_folder
from hf_lowrank.hosts.matrices import DenseMatrix, turned
from hf_lowrank.methods.matrix.data_aware_svd import WhitenedSVD
from hf_lowrank.methods.metric import identity, moment_metric, shrunk
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.rounding.grids import as_columns
from hf_lowrank.methods.rounding.levels import Costs

# Tokens that the text has not shown occur as well.
_ROW_SHRINKAGE = 0.3
_COLUMN_SHRINKAGE = 0.01
_MANY = 1 << 50


def costs_of(problem: Problem, matrix: DenseMatrix, weight: Callable[[], torch.Tensor]) -> Callable[[], Costs]:
    """What gives those of the rows and columns of a weight (O, I), of experts those of their parameter.

    Args:
        weight: Gives it, or what stands for it where it is gone.
    """
    make = _of_experts if matrix.kind == "experts" else _of_matrix
    kept = partial(KeptOnDisk, lambda: make(problem, matrix, weight), scratch_of(problem))
    made: Callable[[], Costs] = problem.evidence.once(f"costs {matrix.name}", kept)
    return made


def scratch_of(problem: Problem) -> Path:
    """A folder that goes when what is known of the model does."""
    folder: Path = problem.evidence.once("scratch", lambda: scratch_folder(problem.evidence))
    return folder


def _of_matrix(problem: Problem, matrix: DenseMatrix, weight: Callable[[], torch.Tensor]) -> Costs:
    """By the text, or by its own size where there is none."""
    known, columns = problem.evidence.known(matrix, torch.device("cpu")), matrix.shape[1]
    if known is None:
        norm = float(weight().detach().double().norm()) or 1.0
        return torch.full((matrix.shape[0],), 1 / norm, dtype=torch.float64), as_columns(identity(), columns)
    rows, metric = WhitenedSVD().metrics(known)
    if known.output_moment is not None:
        return shrunk(known.output_moment.diagonal(), _ROW_SHRINKAGE), as_columns(metric, columns)
    uses = as_columns(rows, matrix.shape[0]).diagonal.square()
    if matrix.role == "embedding" and known.head_weights is None:
        counts = problem.evidence.token_counts
        uses = uses if counts is None or len(counts) != len(uses) else counts.double() / counts.sum()
    return shrunk(uses, _ROW_SHRINKAGE), as_columns(metric, columns)


def _of_experts(problem: Problem, matrix: DenseMatrix, weight: Callable[[], torch.Tensor]) -> Costs:
    """Of all experts one above the other, as the host keeps them.

    What errors of expert `e` cost is `tr(G_e E C_e E^T)`: of each row what it costs over all columns, and of columns
    what they cost over all rows, as KFAC has it.
    """
    known = [problem.evidence.known(part, torch.device("cpu")) for part in matrix.parts]
    seen = [(one.input_moment, one.output_moment) for one in known if one is not None and one.input_moment is not None]
    is_turned, (num_rows, num_columns) = turned(matrix.module, torch.empty(1, 2)).shape == (2, 1), matrix.shape
    if len(seen) < len(known):
        norms = weight().double().norm(dim=(1, 2))
        norms = torch.where(norms > 0, norms, 1.0)
        own_rows, own_columns = (num_columns, num_rows) if is_turned else (num_rows, num_columns)
        return (1 / norms).repeat_interleave(own_rows), as_columns(identity(), own_columns)
    outputs = [torch.eye(num_rows, dtype=torch.float64) if moment is None else moment for _, moment in seen]
    inputs = [moment for moment, _ in seen]
    sides = (inputs, outputs) if is_turned else (outputs, inputs)
    lengths = [(float(row.trace()), float(column.trace())) for row, column in zip(*sides, strict=True)]
    whole = sum(row * column for row, column in lengths) or 1.0
    rows = torch.cat([row.diagonal() * column for row, (_, column) in zip(sides[0], lengths, strict=True)])
    moment = sum((m * row for m, (row, _) in zip(sides[1], lengths, strict=True)), torch.zeros_like(sides[1][0]))
    return shrunk(rows / whole, _ROW_SHRINKAGE), as_columns(
        moment_metric(moment, _MANY, _COLUMN_SHRINKAGE), len(moment)
    )
