"""Sums of Kronecker products of a model: one a matrix."""

from collections.abc import Iterable, Sequence

from hf_lowrank.errors import InputError
from hf_lowrank.planning.tensor_ranks import Ranks, ranks_within
from hf_lowrank.remote_code.lowrank_kronecker import KroneckerLinear, check_kronecker_rank
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.solvers.kronecker import kronecker_spectrum, kronecker_sum
from hf_lowrank.tensors.problem import Solved, Specs, TensorProblem


class KroneckerSumKind:
    """A sum of Kronecker products for each matrix by itself."""

    def specs(self, problem: TensorProblem, ranks: Sequence[int]) -> tuple[Specs, Specs]:
        """Specs with as many products for every matrix."""
        if len(set(ranks)) != 1:
            raise InputError(f"ranks of a sum of Kronecker products is one, their number, got {list(ranks)}.")
        for matrix in problem.matrices:
            try:
                check_kronecker_rank(ranks[0], *matrix.shape)
            except ValueError as error:
                raise InputError(f"{matrix.name}: {error} Choose one within.") from error
        return _specs(problem, [(ranks[0],)] * len(problem.matrices))

    def specs_within(self, problem: TensorProblem, budget: float) -> tuple[Specs, Specs] | None:
        """One relative tolerance for all matrices, the least one that fits."""
        spectra = [[kronecker_spectrum(problem.weight(matrix))] for matrix in problem.matrices]
        found = ranks_within(spectra, lambda ranks: _num_weights(problem, ranks), budget)
        return None if found is None else _specs(problem, found)

    def least(self, problem: TensorProblem) -> int:
        """Stored numbers of one product a matrix."""
        return _num_weights(problem, [(1,)] * len(problem.matrices))

    def solve(self, problem: TensorProblem, plan: Plan) -> Iterable[Solved]:
        """One matrix at a time."""
        for matrix in problem.progress(list(problem.matrices), "decomposing"):
            found = kronecker_sum(problem.weight(matrix), plan["modules"][matrix.name]["rank"])
            yield Solved({matrix.name: {"left": found.left, "right": found.right}}, None, {})


def _specs(problem: TensorProblem, ranks: Sequence[Ranks]) -> tuple[Specs, Specs]:
    chosen = zip(problem.matrices, ranks, strict=True)
    return {matrix.name: {"structure": "kronecker_sum", "rank": rank} for matrix, (rank,) in chosen}, {}


def _num_weights(problem: TensorProblem, ranks: Sequence[Ranks]) -> int:
    chosen = zip(problem.matrices, ranks, strict=True)
    return sum(KroneckerLinear.num_weights(*matrix.shape, rank=rank) for matrix, (rank,) in chosen)
