"""What a kind of tensor decomposition is given, and what it gives back."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hf_lowrank.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.progress import Progress
from hf_lowrank.remote_code.lowrank_plan import Plan, Spec
from hf_lowrank.solvers.storage import StateDict
from hf_lowrank.statistics.moments import MatrixStatistics
from hf_lowrank.targets import DenseMatrix

Specs = dict[str, Spec]


@dataclass(frozen=True)
class TensorProblem:
    """Matrices of one model to be decomposed together.

    Args:
        width: Hidden size of the model.
        statistics: What the text says about a matrix; None where the method looks at no text.
        device: Where to decompose.
        seed: Of every draw.
        checkpoint: Keeps what trainings have finished.
    """

    matrices: Sequence[DenseMatrix]
    width: int
    statistics: Callable[[DenseMatrix], MatrixStatistics] | None
    device: torch.device
    progress: Progress
    seed: int = 0
    checkpoint: Checkpoint = NOT_KEPT

    def weight(self, matrix: DenseMatrix) -> torch.Tensor:
        """A weight (O, I) where it is decomposed."""
        return matrix.weight.to(self.device)

    def moment(self, matrix: DenseMatrix) -> tuple[torch.Tensor, int]:
        """Second moment `E[x x^T]` of the inputs of a matrix, and of how many tokens."""
        assert self.statistics is not None  # asked for where the method looks at text only
        found = self.statistics(matrix)
        assert found.input_moment is not None
        return found.input_moment, found.num_tokens


@dataclass(frozen=True)
class Solved:
    """The numbers of some structures and of what they share.

    Args:
        members: State of each structure by the name of its matrix, its bias left out.
        part: Name of the shared part, as in the plan; None if there is none.
    """

    members: dict[str, StateDict]
    part: str | None
    part_state: StateDict


class TensorKind(Protocol):
    """What every kind offers."""

    def specs(self, problem: TensorProblem, ranks: Sequence[int]) -> tuple[Specs, Specs]:
        """Specs of the modules and of the shared parts for given ranks.

        Raises:
            InputError: If they are too many, too few or out of bounds.
        """
        ...

    def specs_within(self, problem: TensorProblem, budget: float) -> tuple[Specs, Specs] | None:
        """The best specs that store at most `budget` numbers, biases not counted; None if it is out of reach."""
        ...

    def least(self, problem: TensorProblem) -> int:
        """Stored numbers of the smallest specs."""
        ...

    def solve(self, problem: TensorProblem, plan: Plan) -> Iterable[Solved]:
        """The numbers, a shared part and its members at a time."""
        ...
