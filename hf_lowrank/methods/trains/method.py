"""Tensor trains of a model: one a matrix, or one central core for the same matrix of all layers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.methods.problem import Problem, Solved
from hf_lowrank.methods.stacking import by_kind
from hf_lowrank.methods.tensor_ranks import Ranks, ranks_within
from hf_lowrank.methods.together import Specs, TensorMethod
from hf_lowrank.methods.trains.tensor_train import TensorTrain, cut_spectra, shared_tensor_trains, tensor_train
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.remote_code.lowrank_tensor_train import check_train_ranks, factor_shape

_SHRINKAGE = 0.01

Group = Sequence[DenseMatrix]


@dataclass(frozen=True)
class TensorTrainMethod(TensorMethod):
    """Trains of three cores.

    Args:
        shares: Whether matrices of one name and shape in different layers have their central core in common.
        needs: `input_moment` for errors in the metric of the inputs.
    """

    shares: bool = False
    needs: frozenset[str] = frozenset()
    structure: ClassVar[str] = "tensor_train"

    def specs(self, problem: Problem, ranks: Sequence[int]) -> tuple[Specs, Specs]:
        """Specs with the same ranks for every matrix."""
        if len(ranks) != 2:
            raise InputError(f"ranks of a tensor train are two (left, right), got {len(ranks)}.")
        for matrix in problem.matrices:
            try:
                check_train_ranks(ranks[0], ranks[1], *matrix.shape)
            except ValueError as error:
                raise InputError(f"{matrix.name}: {error} Choose one within.") from error
        groups = self._groups(problem.matrices)
        return self._as_specs(groups, [(ranks[0], ranks[1])] * len(groups))

    def specs_within(self, problem: Problem, budget: float) -> tuple[Specs, Specs] | None:
        """One relative tolerance for all matrices, the least one that fits."""
        groups = self._groups(problem.matrices)
        spectra = [_mean_spectra(problem, group) for group in groups.values()]
        found = ranks_within(spectra, lambda ranks: self._num_weights(groups.values(), ranks), budget)
        return None if found is None else self._as_specs(groups, found)

    def least(self, problem: Problem) -> int:
        """Stored numbers at ranks of 1."""
        groups = self._groups(problem.matrices)
        return self._num_weights(groups.values(), [(1, 1)] * len(groups))

    def solved(self, problem: Problem, plan: Plan) -> Iterable[Solved]:
        """One matrix, or one central core with its members, at a time."""
        for group in problem.progress(list(self._groups(problem.matrices).values()), "decomposing"):
            weights = [problem.weight(matrix) for matrix in group]
            spec = plan["modules"][group[0].name]
            part = spec.get("shared")
            sizes = spec if part is None else plan["shared"][part]
            ranks = sizes["left_rank"], sizes["right_rank"]
            if part is not None:
                trains = shared_tensor_trains(weights, ranks)
                members = {matrix.name: _outer(train) for matrix, train in zip(group, trains, strict=True)}
                yield Solved(members, part, {"central": trains[0].central})
                continue
            moment = _shrunk(problem.moment(group[0])[0]) if self.needs else None
            train = tensor_train(weights[0], ranks, (None, moment))
            yield Solved({group[0].name: {**_outer(train), "central": train.central}}, None, {})

    def _groups(self, matrices: Sequence[DenseMatrix]) -> dict[str, list[DenseMatrix]]:
        return by_kind(matrices) if self.shares else {matrix.name: [matrix] for matrix in matrices}

    def _as_specs(self, groups: Mapping[str, Group], ranks: Sequence[Ranks]) -> tuple[Specs, Specs]:
        modules: Specs = {}
        shared: Specs = {}
        for (name, group), (left, right) in zip(groups.items(), ranks, strict=True):
            sizes = {"left_rank": left, "right_rank": right}
            if self.shares:
                part = f"central_{name}"
                shared[part] = {"structure": "central_core", **sizes}
                modules |= {matrix.name: {"structure": "shared_tensor_train", "shared": part} for matrix in group}
            else:
                modules[name] = {"structure": "tensor_train", **sizes}
        return modules, shared

    @staticmethod
    def _num_weights(groups: Iterable[Group], ranks: Sequence[Ranks]) -> int:
        total = 0
        for group, (left, right) in zip(groups, ranks, strict=True):
            first, central, last = (o * i for o, i in zip(*map(factor_shape, group[0].shape), strict=True))
            total += len(group) * (first * left + right * last) + left * central * right
        return total


def _shrunk(moment: torch.Tensor) -> torch.Tensor:
    """A moment (I, I) pulled towards the identity, so that inputs never seen count a little too."""
    mean = moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return (1 - _SHRINKAGE) * moment + _SHRINKAGE * mean


def _outer(train: TensorTrain) -> dict[str, torch.Tensor]:
    return {"first": train.first, "last": train.last}


def _mean_spectra(problem: Problem, group: Group) -> list[torch.Tensor]:
    """Root mean square over the group of the singular values at either cut, each matrix of unit norm."""
    both = []
    for matrix in group:
        spectra = cut_spectra(problem.weight(matrix))
        norm = max(float(spectra[0].norm()), math.ulp(0.0))
        both.append([(values / norm).square() for values in spectra])
    return [torch.stack(values).mean(dim=0).sqrt() for values in zip(*both, strict=True)]


TENSOR_TRAIN = TensorTrainMethod()
WHITENED_TENSOR_TRAIN = TensorTrainMethod(needs=frozenset({"input_moment"}))
SHARED_TENSOR_TRAIN = TensorTrainMethod(shares=True)
