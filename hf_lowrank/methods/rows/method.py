"""Autoencoders of the rows of matrices: one decoder for the same matrix of all layers, or one a matrix."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.methods.encoding import StateDict
from hf_lowrank.methods.matrix.data_aware_svd import TwoSidedSVD, WeightedSVD
from hf_lowrank.methods.matrix.svd import MetricSVD
from hf_lowrank.methods.problem import Problem, Solved
from hf_lowrank.methods.rows.row_autoencoder import RowAutoencoder, Rows, rows_by_direction
from hf_lowrank.methods.stacking import by_kind
from hf_lowrank.methods.together import Specs, TensorMethod
from hf_lowrank.planning.allocation import least_error
from hf_lowrank.planning.curves import Curve
from hf_lowrank.planning.prices import FloatArray
from hf_lowrank.remote_code.lowrank_autoencoder_linear import ROWS, row_shape
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.remote_code.lowrank_table import SHARED_PARTS


@dataclass(frozen=True)
class Group:
    """Matrices with a decoder in common.

    Args:
        part: Name of the decoder, as in a plan.
        rows: Which neurons their rows are the weights of; see `LinearDecoder`.
        decoder: Row of `SHARED_PARTS`.
    """

    part: str
    members: Sequence[DenseMatrix]
    rows: str
    decoder: str

    @property
    def num_weights(self) -> int:
        """Stored numbers while dense."""
        return sum(matrix.num_weights for matrix in self.members)

    @property
    def width(self) -> int:
        """Length of a row."""
        return row_shape(self.members[0].module, self.rows)[1]

    def cost(self, rank: int) -> int:
        """Stored numbers at a code length, lengths of the rows and decoder paid for."""
        decoder = SHARED_PARTS[self.decoder].num_numbers(self.width, rank)
        return int(self.num_weights // self.width * (rank + 1) + decoder)

    def rank_within(self, budget: float) -> int:
        """The longest codes that fit; 0 where none do."""
        return bisect_right(range(1, self.width + 1), budget, key=self.cost)


@dataclass(frozen=True)
class AutoencoderMethod(TensorMethod):
    """Codes and lengths for every row, and a linear decoder for the rows of a group.

    Which rows, those of the output neurons or of the input neurons, is decided for each group: whichever loses less in
    the same number of numbers.

    Args:
        solver: The one by whose metrics errors count; None looks at no text: errors count relative to the
            length of the row, which is to keep directions.
        is_separate: Whether every matrix is a group of its own.
    """

    solver: MetricSVD | None
    is_separate: bool = False
    decoder: ClassVar[str] = "linear_decoder"
    structure: ClassVar[str] = "autoencoder"

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]  # there a constant
        """Kinds of statistics it looks at."""
        return frozenset() if self.solver is None else self.solver.needs

    @property
    def entry(self) -> str:
        """See `TensorMethod`."""
        return f"separated_{self.structure}" if self.is_separate else self.structure

    def specs(self, problem: Problem, ranks: Sequence[int]) -> tuple[Specs, Specs]:
        """Specs with codes of the same length for all."""
        if len(set(ranks)) != 1:
            raise InputError(f"ranks of an autoencoder is one, the length of its codes, got {list(ranks)}.")
        rank, groups = ranks[0], []
        for ways in self._groups(problem):
            bound = min(group.width for group in ways)
            if not 1 <= rank <= bound:
                raise InputError(
                    f"rank must be between 1 and {bound} for {ways[0].part}, got {rank}. Choose one within."
                )
            groups.append(self._better(problem, ways, min(group.cost(rank) for group in ways))[0])
        return self._as_specs(groups, [rank] * len(groups))

    def specs_within(self, problem: Problem, budget: float) -> tuple[Specs, Specs] | None:
        """The code lengths with the least error in all that fit; a group may stay dense."""
        every = list(self._groups(problem))
        share = budget / sum(ways[0].num_weights for ways in every)
        found = [self._better(problem, ways, share * ways[0].num_weights) for ways in every]
        groups, curves = [group for group, _ in found], [_curve(*pair) for pair in found]
        if sum(float(curve.costs.min()) for curve in curves) > budget:
            return None
        choices = list(zip(groups, curves, self._choices(curves, budget), strict=True))
        chosen = [(group, int(curve.ranks[choice])) for group, curve, choice in choices if choice < curve.dense]
        return self._as_specs([group for group, _ in chosen], [rank for _, rank in chosen])

    def least(self, problem: Problem) -> int:
        """Stored numbers at codes of one number."""
        return sum(min(ways[0].num_weights, *(g.cost(1) for g in ways)) for ways in self._groups(problem))

    def solved(self, problem: Problem, plan: Plan) -> Iterable[Solved]:
        """A decoder and its members at a time."""
        by_part: dict[str, list[DenseMatrix]] = {}
        for matrix in problem.matrices:
            by_part.setdefault(plan["modules"][matrix.name]["shared"], []).append(matrix)
        for part, members in problem.progress(list(by_part.items()), "decomposing"):
            spec = plan["shared"][part]
            group = Group(part, members, spec["rows"], spec["structure"])
            codes, norms, decoder = self._solved(problem, group, spec["rank"])
            numbers = zip(members, codes, norms, strict=True)
            yield Solved({matrix.name: {"codes": z, "norms": n} for matrix, z, n in numbers}, part, decoder)

    def _choices(self, curves: Sequence[Curve], budget: float) -> list[int]:
        return least_error(curves, budget)

    def _solved(
        self, problem: Problem, group: Group, rank: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], StateDict]:
        """Codes and lengths of each member, and the state of the decoder."""
        found = self._autoencoder(problem, group).solve(rank)
        return found.codes, found.norms, {"basis": found.basis, "offset": found.offset}

    def _groups(self, problem: Problem) -> Iterable[Sequence[Group]]:
        """Each group with its rows either way."""
        kinds = by_kind(problem.matrices)
        if self.is_separate:
            kinds = {matrix.name.replace(".", "_"): [matrix] for matrix in problem.matrices}
        for kind, members in kinds.items():
            yield [Group(f"decoder_{kind}", members, rows, self.decoder) for rows in ROWS]

    def _better(self, problem: Problem, ways: Sequence[Group], budget: float) -> tuple[Group, FloatArray]:
        """The rows that lose less in a number of numbers, and their errors at code lengths 1, 2, ..."""
        ranks = [max(group.rank_within(budget), 1) for group in ways]
        found = [(group, self._errors(problem, group, rank), rank) for group, rank in zip(ways, ranks, strict=True)]
        group, errors, _ = min(found, key=lambda way: float(way[1][way[2] - 1]))
        return group, errors

    def _errors(self, problem: Problem, group: Group, rank: int) -> FloatArray:
        """Of the group at code lengths 1, 2, ..., in a unit that all groups share, and nearest at that of `rank`."""
        found = self._autoencoder(problem, group)
        errors: FloatArray = found.errors_near(rank).cpu().numpy()
        if self.solver is not None:
            return errors
        norm = sum(float(problem.weight(matrix).double().square().sum()) for matrix in group.members) ** 0.5
        scaled: FloatArray = errors * (norm / max(found.energy, math.ulp(0.0)))
        return scaled

    def _autoencoder(self, problem: Problem, group: Group) -> RowAutoencoder:
        return RowAutoencoder([self._rows(problem, matrix, group.rows) for matrix in group.members])

    def _rows(self, problem: Problem, matrix: DenseMatrix, rows: str) -> Rows:
        weight = problem.weight(matrix)
        values = weight if rows == ROWS[0] else weight.T
        if self.solver is None:
            return rows_by_direction(values)
        outputs, inputs = self.solver.metrics(problem.known(matrix))
        return Rows(values, outputs, inputs) if rows == ROWS[0] else Rows(values, inputs, outputs)

    def _as_specs(self, groups: Sequence[Group], ranks: Sequence[int]) -> tuple[Specs, Specs]:
        shared = {
            group.part: {"structure": self.decoder, "rank": rank, "rows": group.rows}
            for group, rank in zip(groups, ranks, strict=True)
        }
        modules = {m.name: {"structure": self.structure, "shared": g.part} for g in groups for m in g.members}
        return modules, shared


def _curve(group: Group, errors: FloatArray) -> Curve:
    """What every code length of a group costs and loses, and what staying dense does."""
    ranks = np.arange(1, group.width + 1)
    costs = np.array([group.cost(int(rank)) for rank in ranks], dtype=np.float64)
    is_smaller = costs < group.num_weights
    ends = np.append(costs[is_smaller], group.num_weights), np.append(errors[is_smaller], 0.0)
    return Curve(group.members[0], group.decoder, ranks[is_smaller], *ends)


AUTOENCODER = AutoencoderMethod(TwoSidedSVD())
SEPARATED_AUTOENCODER = AutoencoderMethod(TwoSidedSVD(), is_separate=True)
OFFLINE_AUTOENCODER = AutoencoderMethod(None)
SEPARATED_OFFLINE_AUTOENCODER = AutoencoderMethod(None, is_separate=True)
FISHER_AUTOENCODER = AutoencoderMethod(WeightedSVD())
