"""Methods that take matrices of many layers together: what they have in common beside their numbers."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix, Matrix
from hf_lowrank.methods.problem import Problem, Solved
from hf_lowrank.methods.stacking import in_group
from hf_lowrank.planning.plans import as_plan, out_of_reach, require_in_memory
from hf_lowrank.remote_code.lowrank_plan import Plan, Spec

Specs = dict[str, Spec]


class TensorMethod(ABC):
    """A method whose structures share tensors, or are chosen for all matrices at once; see `Method`."""

    # Structure of the matrices, or one whose file holds all that it makes.
    structure: ClassVar[str]
    needs: frozenset[str] = frozenset()

    @property
    def entry(self) -> str:
        """What `entry_bytes` counts for each matrix."""
        return self.structure

    @abstractmethod
    def specs(self, problem: Problem, ranks: Sequence[int]) -> tuple[Specs, Specs]:
        """Specs of the modules and of the shared parts for given ranks.

        Raises:
            InputError: If they are too many, too few or out of bounds.
        """

    @abstractmethod
    def specs_within(self, problem: Problem, budget: float) -> tuple[Specs, Specs] | None:
        """The best specs that store at most `budget` numbers, biases not counted; None if it is out of reach."""

    @abstractmethod
    def least(self, problem: Problem) -> int:
        """Stored numbers of the smallest specs."""

    @abstractmethod
    def solved(self, problem: Problem, plan: Plan) -> Iterable[Solved]:
        """The numbers of a plan that replaces all the problem's matrices, a shared part and its members at a time."""

    def solve(self, problem: Problem, matrices: Sequence[Matrix], plan: Plan) -> Iterable[Solved]:
        """See `Method`."""
        members = [member for matrix in matrices for member in matrix.members]
        return self.solved(problem.of(members), plan) if members else ()

    def plan(self, problem: Problem) -> tuple[Plan, Sequence[Matrix]]:
        """See `Method`."""
        matrices, experts = in_group(problem.matrices, problem.targets.group), _experts_left_dense(problem)
        require_in_memory(matrices)
        problem = problem.of(matrices)
        if problem.budget.ranks is not None:
            return _planned(self.specs(problem, problem.budget.ranks), matrices, experts)
        account = problem.account(matrices, [self.structure])
        available, whole = account.limit - account.fixed, sum(account.price.of_dense(matrix) for matrix in matrices)
        entries = sum(account.price.of_entry(matrix, self.entry) for matrix in matrices)
        if available >= whole:
            return _planned(({}, {}), matrices, experts)
        per_weight = whole / sum(matrix.num_weights for matrix in matrices)
        found = self.specs_within(problem, (available - entries) / per_weight) if available > entries else None
        if found is None:
            least = entries + per_weight * self.least(problem)
            raise InputError(out_of_reach(problem.budget, account, least, problem.model, problem.matrices))
        return _planned(found, matrices, experts)


def _experts_left_dense(problem: Problem) -> dict[str, Any]:
    found = [matrix for matrix in problem.matrices if matrix.kind == "experts"]
    return {m.name: [list(m.dimensions), m.role, "this method takes linear layers alone"] for m in found}


def _planned(
    specs: tuple[Specs, Specs], matrices: Sequence[DenseMatrix], experts: dict[str, Any]
) -> tuple[Plan, list[DenseMatrix]]:
    """The plan of these specs, and the matrices they are for.

    Args:
        experts: What to note of those of mixtures.
    """
    kept = {m.name: [list(m.shape), m.role, "worth its full size"] for m in matrices if m.name not in specs[0]}
    return as_plan(*specs, kept | experts), [matrix for matrix in matrices if matrix.name in specs[0]]
