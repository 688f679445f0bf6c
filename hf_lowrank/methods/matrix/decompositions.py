"""The decompositions of a problem's matrices by one solver: each is made once, kept on disk, and read when needed."""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from hf_lowrank.hosts.matrices import DenseMatrix, JointMatrix, Matrix
from hf_lowrank.methods.matrix.stored import StoredDecomposition, store_decomposition
from hf_lowrank.methods.matrix.svd import Decomposition, MetricSVD, Truncations, TruncationsOfSeveral
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.tables.token_tables import is_token_table, token_table
from hf_lowrank.planning.prices import FloatArray
from hf_lowrank.planning.probes import Changes
from hf_lowrank.remote_code.lowrank_plan import Spec, sizes_of
from hf_lowrank.statistics.moments import MatrixStatistics


class Decompositions:
    """Those of one problem."""

    def __init__(self, solver: MetricSVD, problem: Problem) -> None:
        self._solver = solver
        self._problem = problem

    def __call__(self, matrix: Matrix) -> Truncations:
        """The decomposition of one matrix."""
        if matrix.kind == "experts":
            return TruncationsOfSeveral([self(part) for part in matrix.parts])
        stored = self._stored(matrix)
        found: Truncations = stored if stored.path.is_file() else self.decompose(matrix)
        if not self._solver.fits_each_rank or isinstance(matrix, JointMatrix):
            return found
        return self._solver.fitted(found, self._problem.weight(matrix), self._problem.known(matrix))

    def store(self, matrices: Sequence[Matrix]) -> None:
        """Decompose those that will be asked for again: to measure, to compare plans, to replace."""
        parts = [part for matrix in matrices for part in matrix.parts]
        unknown = [part for part in parts if not self._stored(part).path.is_file()]
        for matrix in self._problem.progress(unknown, "decomposing") if unknown else []:
            store_decomposition(self.decompose(matrix), self._stored(matrix).path)

    def singular_values(self, matrix: Matrix) -> FloatArray:
        """Those of a stored one, in the solver's metric."""
        values: FloatArray = self(matrix).singular_values.cpu().numpy()
        return values

    def solved(self, matrix: Matrix, spec: Spec) -> Any:
        """The numbers of the structure of a spec."""
        if is_token_table(spec):
            return token_table(self._problem, matrix).at_sizes(sizes_of(spec))
        return self(matrix).factors(spec["rank"])

    def changes(self, matrix: Matrix, spec: Spec) -> Changes:
        """What the weights become in the structure of a spec, each to be made when it is needed."""
        ends = list(itertools.accumulate(member.shape[0] for member in matrix.members))
        rows = [slice(end - member.shape[0], end) for end, member in zip(ends, matrix.members, strict=True)]
        return {
            m: partial(self._approximation, matrix, spec, part) for m, part in zip(matrix.members, rows, strict=True)
        }

    def decompose(self, matrix: Matrix) -> Decomposition:
        """Every truncation of one matrix, made now."""
        weights = [self._problem.weight(member) for member in matrix.members]
        known = _Known(self._problem, matrix.members)
        if isinstance(matrix, JointMatrix):
            return self._solver.decompose_jointly(weights, known)
        return self._solver.decompose(weights[0], known[0])

    def _approximation(self, matrix: Matrix, spec: Spec, rows: slice) -> torch.Tensor:
        if is_token_table(spec):
            return token_table(self._problem, matrix).expected(sizes_of(spec)).product[rows]
        factors = self(matrix).factors(spec["rank"])
        return factors.up[..., rows, :] @ factors.down

    def _stored(self, matrix: Matrix) -> StoredDecomposition:
        evidence = self._problem.evidence
        folder = f"decompositions-{self._problem.key}-{evidence.identity_of_solutions}"
        return StoredDecomposition(
            evidence.folder / folder / f"{matrix.name}.safetensors", self._problem.place(matrix)
        )


class _Known(Sequence[MatrixStatistics | None]):
    """What the text says about some matrices, of which each is read when it is asked for, and held by who asks."""

    def __init__(self, problem: Problem, matrices: Sequence[DenseMatrix]) -> None:
        self._problem = problem
        self._matrices = matrices

    def __getitem__(self, index: Any) -> Any:
        return self._problem.known(self._matrices[index])

    def __len__(self) -> int:
        return len(self._matrices)
