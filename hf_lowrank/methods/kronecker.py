"""Sums of Kronecker products, one a matrix: the best, by an SVD of its entries in another order."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.methods.matrix.svd import SVD
from hf_lowrank.methods.problem import Problem, Solved
from hf_lowrank.methods.tensor_ranks import Ranks, ranks_within
from hf_lowrank.methods.together import Specs, TensorMethod
from hf_lowrank.remote_code.lowrank_kronecker import KroneckerLinear, Pair, check_kronecker_rank, factor_pairs
from hf_lowrank.remote_code.lowrank_plan import Plan


@dataclass(frozen=True)
class KroneckerSum:
    """A sum of `R` Kronecker products.

    With outputs `o = (o_1, o_2)` and inputs `i = (i_1, i_2)` counted in mixed radix,
    `W[o, i] = sum_r left[r, o_1, i_1] right[r, o_2, i_2]`.

    Shapes:
        left   (R, o_1, i_1)
        right  (R, o_2, i_2)

    Args:
        shape: `(O, I)`; what the products hold beyond it is filling.
    """

    left: torch.Tensor
    right: torch.Tensor
    shape: tuple[int, int]

    def matrix(self) -> torch.Tensor:
        """The matrix itself, (O, I)."""
        whole = torch.einsum("rac,rbd->abcd", self.left, self.right)
        return whole.flatten(2).flatten(0, 1)[: self.shape[0], : self.shape[1]]


def rearranged(weight: torch.Tensor, outputs: Pair, inputs: Pair) -> torch.Tensor:
    """The matrix (O, I), filled up with zeros, as (o_1 i_1, o_2 i_2): a Kronecker product becomes one of rank 1."""
    whole = weight.new_zeros(outputs[0] * outputs[1], inputs[0] * inputs[1])
    whole[: weight.shape[0], : weight.shape[1]] = weight
    return whole.reshape(*outputs, *inputs).transpose(1, 2).reshape(outputs[0] * inputs[0], -1)


def kronecker_spectrum(weight: torch.Tensor) -> torch.Tensor:
    """Singular values of the rearranged matrix, float64: the products an exact sum needs, and what fewer lose."""
    values: torch.Tensor = torch.linalg.svdvals(rearranged(weight, *factor_pairs(*weight.shape)).double())
    return values


def kronecker_sum(weight: torch.Tensor, rank: int, pairs: tuple[Pair, Pair] | None = None) -> KroneckerSum:
    """The best sum of Kronecker products for a weight (O, I): `min ||W - sum_r left_r (x) right_r||_F`.

    In another order of the entries the sum is a matrix of rank `R`, so that a truncated SVD finds it and the error is
    the norm of the discarded singular values (Van Loan and Pitsianis, Linear Algebra for Large Scale and Real-Time
    Applications, 1993). Where a size is filled up, the filling counts too: the error is at most that norm.

    Args:
        rank: R, the number of products.
        pairs: Factors `(o_1, o_2)` and `(i_1, i_2)`, whose products are at least `O` and `I`; None are those of
            `factor_pairs`.

    Raises:
        InputError: If the rank is out of bounds.
    """
    outputs, inputs = pairs or factor_pairs(*weight.shape)
    matrix = rearranged(weight, outputs, inputs)
    if not 1 <= rank <= min(matrix.shape):
        raise InputError(
            f"rank must be between 1 and {min(matrix.shape)} for factors {outputs} and {inputs}, got {rank}. "
            "Choose one within."
        )
    found = SVD().decompose(matrix).factors(rank)
    left, right = found.up.T.unflatten(1, (outputs[0], inputs[0])), found.down.unflatten(1, (outputs[1], inputs[1]))
    return KroneckerSum(left, right, (weight.shape[0], weight.shape[1]))


class KroneckerSumMethod(TensorMethod):
    """A sum of Kronecker products for each matrix by itself."""

    structure = "kronecker_sum"

    def specs(self, problem: Problem, ranks: Sequence[int]) -> tuple[Specs, Specs]:
        """Specs with as many products for every matrix."""
        if len(set(ranks)) != 1:
            raise InputError(f"ranks of a sum of Kronecker products is one, their number, got {list(ranks)}.")
        for matrix in problem.matrices:
            try:
                check_kronecker_rank(ranks[0], *matrix.shape)
            except ValueError as error:
                raise InputError(f"{matrix.name}: {error} Choose one within.") from error
        return _specs(problem, [(ranks[0],)] * len(problem.matrices))

    def specs_within(self, problem: Problem, budget: float) -> tuple[Specs, Specs] | None:
        """One relative tolerance for all matrices, the least one that fits."""
        spectra = [[kronecker_spectrum(problem.weight(matrix))] for matrix in problem.matrices]
        found = ranks_within(spectra, lambda ranks: _num_weights(problem, ranks), budget)
        return None if found is None else _specs(problem, found)

    def least(self, problem: Problem) -> int:
        """Stored numbers of one product a matrix."""
        return _num_weights(problem, [(1,)] * len(problem.matrices))

    def solved(self, problem: Problem, plan: Plan) -> Iterable[Solved]:
        """One matrix at a time."""
        for matrix in problem.progress(list(problem.matrices), "decomposing"):
            found = kronecker_sum(problem.weight(matrix), plan["modules"][matrix.name]["rank"])
            yield Solved({matrix.name: {"left": found.left, "right": found.right}}, None, {})


def _specs(problem: Problem, ranks: Sequence[Ranks]) -> tuple[Specs, Specs]:
    chosen = zip(problem.matrices, ranks, strict=True)
    return {matrix.name: {"structure": "kronecker_sum", "rank": rank} for matrix, (rank,) in chosen}, {}


def _num_weights(problem: Problem, ranks: Sequence[Ranks]) -> int:
    chosen = zip(problem.matrices, ranks, strict=True)
    return sum(KroneckerLinear.num_weights(*matrix.shape, rank=rank) for matrix, (rank,) in chosen)


KRONECKER_SUM = KroneckerSumMethod()
