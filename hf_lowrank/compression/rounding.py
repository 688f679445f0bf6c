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

from hf_lowrank.compression.error_costs import costs_of, scratch_of
from hf_lowrank.errors import InputError
from hf_lowrank.files.kept_on_disk import KeptOnDisk
from hf_lowrank.hosts.blocks import frozen
from hf_lowrank.hosts.matrices import DenseMatrix, Expert
from hf_lowrank.hosts.targets import is_named
from hf_lowrank.methods.metric import identity
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.rounding.grids import as_columns
from hf_lowrank.methods.rounding.levels import Costs, Part, Single, rounded_within
from hf_lowrank.methods.rounding.pairs import Pair
from hf_lowrank.methods.rounding.sensitivity import Sensitivity
from hf_lowrank.planning.sizes import overhead_bytes
from hf_lowrank.remote_code.lowrank_codes import unpack
from hf_lowrank.remote_code.lowrank_packed import as_matrix, remember_
from hf_lowrank.remote_code.lowrank_plan import FORMAT_VERSION
from hf_lowrank.remote_code.lowrank_structures import named_structures, structure_name

# Smaller ones take more for their steps than rounding saves.
LEAST_NUMBERS = 1024
# One entry of the plan and of the header of the weights, without the name.
_ENTRY_BYTES = 110
# Structures of two factors -> what these are called, the first (O, R), the second (R, I).
_FACTORS = {"low_rank": ("up.weight", "down.weight"), "low_rank_embedding": ("codes.weight", "basis")}
# Where nothing says what errors cost: a bit more than the others have in the mean.
_UNKNOWN_GAIN = 4.0


@dataclass(frozen=True)
class _Weight:
    """A parameter to be rounded.

    Args:
        key: Its name in the model.
    """

    key: str
    module: nn.Module
    name: str
    parameter: nn.Parameter

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
        parts = _parts(model, problem, weights)
        found = rounded_within(parts, _bytes_for(model, problem, weights), problem.progress)
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    packed: dict[str, Any] = {"code": "grid", "tensors": {}, "outside": {}}
    plan: Any = model.config.compression
    plan |= {"format_version": FORMAT_VERSION, "packed": packed}
    plan["provenance"]["rounding_errors"] = _place_(weights, found)
    for one in weights:
        part = "tensors" if one.key.startswith(prefix) else "outside"
        packed[part][one.key.removeprefix(prefix)] = len(found[one.key])
    _halve_(model, {id(one.parameter) for one in weights})


def dense_parts(problem: Problem) -> tuple[list[Part], float]:
    """The weights of a dense model that would be rounded, and the bytes there would be for them."""
    weights = _weights(problem.model, problem)
    return _parts(problem.model, problem, weights), _bytes_for(problem.model, problem, weights)


def _weights(model: PreTrainedModel, problem: Problem) -> list[_Weight]:
    """Every matrix of the model once, whatever it is of, but for those that nobody names or that are excluded."""
    found = []
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.numel() >= LEAST_NUMBERS and parameter.is_floating_point():
            path, _, name = key.rpartition(".")
            module = model.get_submodule(path)
            # Of a parametrization torch makes a weight whenever it is asked for, also of bytes.
            if not isinstance(module, ParametrizationList) and not _is_left_out(model, problem, key):
                found.append(_Weight(key, module, name, parameter))
    return found


def _is_left_out(model: PreTrainedModel, problem: Problem, key: str) -> bool:
    """Whether `target_modules` does not name what a parameter is of, or `exclude_modules` does."""
    targets, names = problem.targets, key.split(".")
    owners = {".".join(names[: end + 1]) for end in range(len(names))}
    if targets.target_modules is not None:
        return not owners & {matrix.path for matrix in problem.matrices}
    excluded, prefix = targets.exclude_modules, f"{model.base_model_prefix}."
    return excluded is not None and any(is_named(excluded, owner, owner.removeprefix(prefix)) for owner in owners)


def _parts(model: PreTrainedModel, problem: Problem, weights: Sequence[_Weight]) -> list[Part]:
    """What is rounded together, with what is known of it."""
    matrices = {matrix.path: matrix for matrix in problem.matrices}
    left = {id(one.parameter): one for one in weights}
    sensitivity, scratch, parts = Sensitivity(problem.seed), scratch_of(problem), list[Part]()
    structure: Any
    for path, structure in named_structures(model):
        if path in matrices:
            matrix, names = matrices[path], _FACTORS.get(str(structure_name(structure)), ())
            factors = [left.get(id(structure.get_parameter(name))) for name in names]
            if factors and None not in factors:
                up, down = (left.pop(id(one.parameter)) for one in factors if one)
                costs = costs_of(problem, matrix, structure.to_dense)
                parts.append(Pair((up.key, down.key), partial(_read, up, down), costs, scratch))
            else:
                sensitivity.add(
                    structure, [costs_of(problem, m, partial(_part, structure, m))() for m in matrix.parts]
                )
    known, unknown = _known(model, problem), list[_Weight]()
    for key, one in left.items():
        own = known.get(key)
        if own is None and (found := sensitivity.of(one.parameter)):
            own = KeptOnDisk(found, scratch)
        if own is None:
            unknown.append(one)
        else:
            parts.append(Single(one.key, one.read, own))
    gains = [part.log_gain for part in parts]
    gain = _UNKNOWN_GAIN * math.exp(sum(gains) / len(gains)) if gains else 1.0
    return [
        *parts,
        *(Single(one.key, one.read, KeptOnDisk(partial(_relative, one, gain), scratch)) for one in unknown),
    ]


def _known(model: PreTrainedModel, problem: Problem) -> dict[int, Callable[[], Costs]]:
    """What errors cost in the parameters that are still matrices, by their identity."""
    parameters, known = dict(model.named_parameters(remove_duplicate=False)), {}
    structures = {path for path, _ in named_structures(model)}
    for matrix in problem.matrices:
        name = matrix.path if matrix.kind == "experts" else f"{matrix.path}.weight"
        if name in parameters and matrix.path not in structures:
            known[id(parameters[name])] = costs_of(problem, matrix, partial(getattr, matrix, "weight"))
    return known


def _part(structure: Any, matrix: DenseMatrix) -> torch.Tensor:
    """What a structure has in the place of a matrix, also of one expert of several."""
    weight: torch.Tensor = structure.to_dense()
    return weight[matrix.index] if isinstance(matrix, Expert) else weight


def _read(up: _Weight, down: _Weight) -> tuple[torch.Tensor, torch.Tensor]:
    return up.read(), down.read()


def _relative(weight: _Weight, gain: float) -> Costs:
    """Metrics in which a weight of which nothing is known has that gain; see `Part.log_gain`."""
    matrix = weight.read().double()
    cost = 12 * gain / (float(matrix.square().mean()) or 1.0)
    return torch.full((len(matrix),), cost, dtype=torch.float64), as_columns(identity(), matrix.shape[1])


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
