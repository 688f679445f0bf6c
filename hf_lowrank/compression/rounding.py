"""Rounding the weights of a compressed model to a number of bytes."""

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.blocks import frozen
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.methods.matrix.data_aware_svd import WhitenedSVD
from hf_lowrank.methods.metric import identity, shrunk
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.rounding.grids import diagonal
from hf_lowrank.methods.rounding.levels import Costs, Single, rounded_within
from hf_lowrank.methods.rounding.sensitivity import Sensitivity
from hf_lowrank.planning.sizes import overhead_bytes
from hf_lowrank.remote_code.lowrank_codes import unpack
from hf_lowrank.remote_code.lowrank_dense import dense_kind
from hf_lowrank.remote_code.lowrank_packed import as_matrix, remember_
from hf_lowrank.remote_code.lowrank_plan import FORMAT_VERSION
from hf_lowrank.remote_code.lowrank_structures import named_structures, structure_name

# Smaller ones take more for their steps than rounding saves.
_LEAST_NUMBERS = 1024
# One entry of the plan and of the header of the weights, without the name.
_ENTRY_BYTES = 110
# Tokens that the text has not shown occur as well.
_ROW_SHRINKAGE = 0.3
# Where nothing says what errors cost: a bit more than the others have in the mean.
_UNKNOWN_GAIN = 4.0


@dataclass(frozen=True)
class _Weight:
    """A parameter to be rounded.

    Args:
        key: Its name in the model.
        costs: None where nothing is known of it.
    """

    key: str
    module: nn.Module
    name: str
    parameter: nn.Parameter
    costs: Callable[[], Costs] | None

    def read(self) -> torch.Tensor:
        """As a matrix."""
        return as_matrix(self.module, self.parameter.detach()).cpu().float()


def round_(model: PreTrainedModel, problem: Problem) -> None:
    """Round every matrix of a model so that what is saved comes to the size that was asked for.

    All numbers together are rounded to one level of error, in the metrics of what the text says of inputs and
    gradients. Afterwards the model holds the rounded numbers, and beside them the bytes they are saved as.

    Raises:
        InputError: If the size is out of reach.
    """
    with frozen(model):
        weights = _weights(model, problem)
        parts = {one.key: Single(one.key, one.read, one.costs) for one in weights if one.costs is not None}
        gains = [part.log_gain for part in parts.values()]
        gain = _UNKNOWN_GAIN * math.exp(sum(gains) / len(gains)) if gains else 1.0
        parts |= {
            one.key: Single(one.key, one.read, partial(_relative, one, gain)) for one in weights if not one.costs
        }
        found = rounded_within(list(parts.values()), _bytes_for(model, problem, weights), problem.progress)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    packed: dict[str, Any] = {"code": "grid", "tensors": {}, "outside": {}}
    plan: Any = model.config.compression
    plan |= {"format_version": FORMAT_VERSION, "packed": packed}
    plan["provenance"]["rounding_errors"] = _place_(weights, found)
    for one in weights:
        part = "tensors" if one.key.startswith(prefix) else "outside"
        packed[part][one.key.removeprefix(prefix)] = len(found[one.key])
    _halve_(model, {id(one.parameter) for one in weights})


def _weights(model: PreTrainedModel, problem: Problem) -> list[_Weight]:
    """Every matrix of the model once, whatever it is of."""
    # What is known of experts is known of each: a bank of them is rounded as what nothing is known of.
    matrices = {matrix.path: matrix for matrix in problem.matrices if matrix.kind != "experts"}
    sensitivity = Sensitivity(problem.seed)
    known: dict[int, Callable[[], Costs]] = {}
    structure: Any
    for path, structure in named_structures(model):
        if path in matrices:
            sensitivity.add(structure, costs_of(problem, matrices[path], structure.to_dense))
    for path, matrix in matrices.items():
        module: Any = model.get_submodule(path)
        if dense_kind(module) is not None:
            known[id(module.weight)] = partial(costs_of, problem, matrix, partial(getattr, matrix, "weight"))
    found = []
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.numel() >= _LEAST_NUMBERS and parameter.is_floating_point():
            path, _, name = key.rpartition(".")
            if isinstance(model.get_submodule(path), ParametrizationList):
                continue  # torch makes a weight of them whenever it is asked for, also of bytes
            costs = known.get(id(parameter)) or sensitivity.of(parameter)
            found.append(_Weight(key, model.get_submodule(path), name, parameter, costs))
    return found


def costs_of(problem: Problem, matrix: DenseMatrix, weight: Callable[[], torch.Tensor]) -> Costs:
    """Of the rows and columns of a weight (O, I): by the text, or by its own size where there is none.

    Args:
        weight: Gives it, or what stands for it where it is gone.
    """
    known = problem.evidence.known(matrix, torch.device("cpu"))
    if known is None:
        norm = float(weight().detach().double().norm()) or 1.0
        return torch.full((matrix.shape[0],), 1 / norm, dtype=torch.float64), identity()
    rows, columns = WhitenedSVD().metrics(known)
    if known.output_moment is not None:
        return shrunk(known.output_moment.diagonal(), _ROW_SHRINKAGE), columns
    uses = diagonal(rows.triangle(matrix.shape[0])).square()
    if matrix.role == "embedding" and known.head_weights is None:
        counts = problem.evidence.token_counts
        uses = uses if counts is None or len(counts) != len(uses) else counts.double() / counts.sum()
    return shrunk(uses, _ROW_SHRINKAGE), columns


def _relative(weight: _Weight, gain: float) -> Costs:
    """Metrics in which a weight of which nothing is known has that gain; see `Part.log_gain`."""
    matrix = weight.read().double()
    cost = 12 * gain / (float(matrix.square().mean()) or 1.0)
    return torch.full((len(matrix),), cost, dtype=torch.float64), identity()


def _bytes_for(model: PreTrainedModel, problem: Problem, weights: Sequence[_Weight]) -> float:
    """How many bytes there are for the rounded weights."""
    if problem.budget.kind != "target_size":
        assert problem.bits is not None  # one of both says how much there is
        return problem.bits * sum(one.parameter.numel() for one in weights) / 8
    rounded = {id(one.parameter) for one in weights}
    rest = sum(2 * p.numel() for p in model.parameters() if id(p) not in rounded)
    structures = {str(structure_name(module)) for _, module in named_structures(model)}
    entries = sum(3 * len(one.key) + _ENTRY_BYTES for one in weights)
    left = problem.budget.value - rest - entries - overhead_bytes(model, structures, "grid")
    if left <= 0:
        asked, least = problem.budget.value / 1e6, (problem.budget.value - left) / 1e6
        raise InputError(
            f"target_size={asked:.2f}MB is out of reach: the smallest model is above {least:.2f}MB, for code, "
            "configuration and what is not rounded."
        )
    return left


def _place_(weights: Sequence[_Weight], contents: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Give modules their rounded numbers and note the bytes of these; returns the relative errors."""
    notes = [remember_(one.module, one.name, contents[one.key]) for one in weights]
    grids = unpack([(contents[one.key], note.matrix) for one, note in zip(weights, notes, strict=True)])
    errors = {}
    for one, note, grid in zip(weights, notes, grids, strict=True):
        matrix, weight = one.read(), grid.weight()
        norm = float(matrix.norm())
        errors[one.key] = float((weight - matrix).norm()) / norm if norm > 0 else 0.0
        with torch.no_grad():
            one.parameter.copy_(note.restored(weight))
    return errors


def _halve_(model: PreTrainedModel, rounded: AbstractSet[int]) -> None:
    """Round what else there is to half precision, where that has a number near by."""
    for parameter in model.parameters():
        if id(parameter) not in rounded and parameter.dtype == torch.float32:
            near = parameter.detach().half().float()
            is_near = (near - parameter).abs() <= 2.0**-11 * parameter.abs()
            with torch.no_grad():
                parameter.copy_(torch.where(is_near, near, parameter))
