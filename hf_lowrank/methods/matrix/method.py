"""Methods that replace one matrix, or those of one input, after the other: a solver and its metrics."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix, JointMatrix, Matrix
from hf_lowrank.methods.encoding import ENCODERS
from hf_lowrank.methods.factors import Factors
from hf_lowrank.methods.matrix.decompositions import Decompositions
from hf_lowrank.methods.matrix.plan import make_plan
from hf_lowrank.methods.matrix.ranks import RankErrors
from hf_lowrank.methods.matrix.svd import SVD, MetricSVD
from hf_lowrank.methods.metric import Metric
from hf_lowrank.methods.problem import TABLES, Problem, Solved
from hf_lowrank.methods.tables.token_tables import is_token_table
from hf_lowrank.planning.plans import specs_of
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.remote_code.lowrank_plan import specs_of as every_spec


class MatrixMethod:
    """A solver applied to the matrices of a model; see `Method`.

    Options of the method's own are fields of the solver, which is a dataclass then.
    """

    def __init__(self, solver: MetricSVD) -> None:
        self.solver = solver

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of statistics it looks at."""
        return self.solver.needs

    def decompositions(self, problem: Problem) -> Decompositions:
        """Those of a problem's matrices."""
        return Decompositions(self._solver(problem), problem)

    def errors(self, problem: Problem) -> RankErrors:
        """What ranks of a problem's matrices cost."""
        return RankErrors(problem, self.decompositions(problem))

    def output_metric(self, problem: Problem, matrix: DenseMatrix) -> Metric:
        """What the solver holds errors at the outputs of one matrix to cost; it is where the matrix is."""
        return self._solver(problem).metrics(problem.evidence.known(matrix, matrix.weight.device))[0]

    def plan(self, problem: Problem) -> tuple[Plan, Sequence[Matrix]]:
        """See `Method`; where the structure of token tables is open, the plan that does the model less damage."""
        if problem.storage.tables is not None or all(matrix.role == "block" for matrix in problem.matrices):
            return make_plan(problem, self.errors(problem))
        found: list[Any] = []
        refused = []
        for one in map(problem.with_tables, TABLES):
            errors = self.errors(one)
            try:
                plan, replaced = make_plan(one, errors)
            except InputError as error:  # the least that one of them takes may be too much
                refused.append(error)
            else:
                found.append((errors.damage(replaced, every_spec(plan)), len(found), plan, replaced))
        if not found:
            raise refused[0]
        *_, plan, replaced = min(found)
        return plan, replaced

    def solve(self, problem: Problem, matrices: Sequence[Matrix], plan: Plan) -> Iterable[Solved]:
        """One matrix, or those of one input, at a time."""
        found, specs = self.decompositions(problem), specs_of(plan)
        for matrix in problem.progress(matrices, "decomposing"):
            if isinstance(matrix, JointMatrix):
                factors = found(matrix).factors(plan["shared"][matrix.name]["rank"])
                ups = factors.up.split([member.shape[0] for member in matrix.members])
                solved: list[Any] = [Factors(up, factors.down) for up in ups]
                part: Any = (matrix.name, {"down.weight": factors.down})
            else:
                solved, part = [found.solved(matrix, specs[matrix.name])], (None, {})
            members = {
                member.name: ENCODERS[specs[member.name]["structure"]](one, _bias(problem, member, one), problem.dtype)
                for member, one in zip(matrix.members, solved, strict=True)
            }
            yield Solved(members, *part)

    def _solver(self, problem: Problem) -> MetricSVD:
        solver: Any = self.solver
        found: MetricSVD = replace(solver, **problem.own) if problem.own else solver
        return found


def as_planned(problem: Problem, plan: Plan) -> Problem:
    """The problem with the structure of token tables that its plan has."""
    return problem.with_tables("autoencoder" if any(map(is_token_table, every_spec(plan).values())) else "low_rank")


def _bias(problem: Problem, matrix: DenseMatrix, factors: Any) -> torch.Tensor | None:
    """The bias that goes with the factors of a matrix: its own, or the one with the least error beside them.

    `E||W x + b - W' x - b'||^2` is least, whatever `W'`, at `b' = b + (W - W') E[x]`.
    """
    own: Any = getattr(matrix.module, "bias", None)
    if own is None:
        return None
    bias: torch.Tensor = own.detach().clone()
    is_corrected = problem.storage.bias_correction and isinstance(factors, Factors)
    known = problem.evidence.known(matrix, bias.device) if is_corrected else None
    if known is None or known.input_mean is None:
        return bias
    mean = known.input_mean
    product = factors.up.to(mean) @ (factors.down.to(mean) @ mean)
    moved: torch.Tensor = (bias + (matrix.weight.to(mean) @ mean - product)).to(bias.dtype)
    return moved


PLAIN_SVD = MatrixMethod(SVD())
