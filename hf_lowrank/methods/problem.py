"""What a method is given, and what it gives back: the one protocol of all of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.files.checkpoint import Checkpoint
from hf_lowrank.hosts.matrices import DenseMatrix, Matrix
from hf_lowrank.hosts.targets import Targets
from hf_lowrank.methods.encoding import StateDict
from hf_lowrank.planning.accounts import Account, make_account
from hf_lowrank.planning.budgets import Budget
from hf_lowrank.progress import Progress
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.statistics.evidence import Evidence
from hf_lowrank.statistics.moments import MatrixStatistics

# What may take the place of token tables.
TABLES = ("low_rank", "autoencoder")


@dataclass(frozen=True)
class Storage:
    """Which structures take the place of matrices that are replaced one by one.

    Args:
        linear: Of a linear layer: `low_rank` or `pivoted`.
        tables: Of the token embedding and an untied head: `low_rank` or `autoencoder`; None is whichever does the
            whole model less damage.
        objective: Of autoencoders; see `hf_lowrank.methods.tables.token_tables.OBJECTIVES`.
        bias_correction: Whether biases make up for what the replaced weights lose on the mean input.
    """

    linear: str = "low_rank"
    tables: str | None = "low_rank"
    objective: str = "loss"
    bias_correction: bool = False

    def autoencodes(self, matrix: Matrix) -> bool:
        """Whether codes and a decoder take the place of a matrix."""
        return self.tables == "autoencoder" and matrix.role in ("embedding", "head")

    def structure(self, matrix: Matrix) -> str:
        """The structure that takes the place of a matrix.

        A low-rank head has two factors in any case: new tokens are added at its end, and pivots save less than 1 % of
        so tall one.
        """
        if self.autoencodes(matrix):
            kind = "nonlinear_autoencoder" if self.objective == "nonlinear" else "autoencoder"
            return f"{kind}_{matrix.role}"
        if matrix.kind != "linear":
            return f"low_rank_{matrix.kind}"
        return "low_rank" if matrix.role == "head" else self.linear


@dataclass(frozen=True)
class Problem:
    """Matrices of one model to be replaced within a budget.

    Args:
        model: Dense, in the type that it is looked at in.
        matrices: All that the targets speak of.
        evidence: What is known of them.
        method: Name of the method.
        allocation: How a budget is shared among matrices; see `ALLOCATIONS`.
        dtype: Of the compressed model's weights.
        device: Where to decompose; None is where the weights are.
        own: Options of this method and few others, by name.
        bits: What a number will take when it is rounded; None where it is not, or as much as there is room for.
    """

    model: PreTrainedModel
    matrices: Sequence[DenseMatrix]
    evidence: Evidence
    method: str
    budget: Budget
    targets: Targets = field(default_factory=Targets)
    storage: Storage = field(default_factory=Storage)
    allocation: str = "energy"
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    own: Mapping[str, Any] = field(default_factory=dict)
    bits: float | None = None

    @property
    def key(self) -> str:
        """What the method finds is kept under: its name and its own options."""
        return "-".join([self.method, *(f"{name}={value}" for name, value in self.own.items())])

    def of(self, matrices: Sequence[DenseMatrix]) -> "Problem":
        """The same of some matrices, which are decomposed in one place."""
        return replace(self, matrices=matrices, device=self.place(matrices[0]))

    def with_tables(self, tables: str) -> "Problem":
        """The same with that in the place of token tables."""
        return replace(self, storage=replace(self.storage, tables=tables))

    @property
    def width(self) -> int:
        """Hidden size of the model.

        Raises:
            InputError: If it has none, or several.
        """
        size = getattr(self.model.config.get_text_config(), "hidden_size", None)
        if not isinstance(size, int):
            raise InputError(f"{self.method} needs one hidden size, and {type(self.model).__name__} has {size}.")
        return size

    @property
    def seed(self) -> int:
        """Of every draw."""
        return self.evidence.text.seed

    @property
    def progress(self) -> Progress:
        """Shows how far long work is."""
        return self.evidence.progress

    def account(self, matrices: Sequence[DenseMatrix], structures: Sequence[str]) -> Account:
        """What the budget comes to for these matrices, and the structures that may take their place."""
        number_bytes = self.dtype.itemsize if self.bits is None else self.bits / 8
        return make_account(self.model, matrices, self.budget, number_bytes, structures, self.progress)

    def place(self, matrix: Matrix) -> torch.device:
        """Where a matrix is decomposed."""
        held: Any = matrix.members[0].module.weight
        return self.device or held.device

    def weight(self, matrix: Matrix) -> torch.Tensor:
        """A weight (O, I) where it is decomposed."""
        return matrix.weight.to(self.place(matrix))

    def known(self, matrix: DenseMatrix) -> MatrixStatistics | None:
        """What the text says about a matrix, where that is decomposed; None where nobody asked."""
        return self.evidence.known(matrix, self.place(matrix))

    def moment(self, matrix: DenseMatrix) -> tuple[torch.Tensor, int]:
        """Second moment `E[x x^T]` of the inputs of a matrix, and of how many tokens."""
        found = self.known(matrix)
        assert found is not None  # asked for by methods that need it only
        assert found.input_moment is not None
        return found.input_moment, found.num_tokens

    def checkpoint(self, small: PreTrainedModel | None = None) -> Checkpoint:
        """Where a computation from `small` and the text, or from the dense weights alone, keeps what it has done."""
        return self.evidence.checkpoint(self.key, small)


@dataclass(frozen=True)
class Solved:
    """The numbers of some structures and of what they share.

    Args:
        members: State of each structure by the name of its matrix; a bias called `bias` may be left out.
        part: Name of the shared part, as in the plan; None if there is none.
        part_state: Its state.
    """

    members: dict[str, StateDict]
    part: str | None = None
    part_state: StateDict = field(default_factory=dict)


class Method(Protocol):
    """What every method offers."""

    @property
    def needs(self) -> frozenset[str]:
        """Kinds of statistics it looks at; see `hf_lowrank.statistics.collection.STATISTICS`."""
        ...

    def plan(self, problem: Problem) -> tuple[Plan, Sequence[Matrix]]:
        """The plan for a dense model, and the matrices it replaces.

        Raises:
            InputError: If a weight is not in memory, ranks are out of bounds or the budget is out of reach.
        """
        ...

    def solve(self, problem: Problem, matrices: Sequence[Matrix], plan: Plan) -> Iterable[Solved]:
        """The numbers of a plan, a structure or a shared part with its members at a time.

        Args:
            matrices: Those that `plan` replaces.
        """
        ...
