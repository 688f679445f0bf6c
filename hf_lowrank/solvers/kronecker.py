"""Sums of Kronecker products: the best for a matrix, by an SVD of its entries in another order."""

from dataclasses import dataclass

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.remote_code.lowrank_kronecker import Pair, factor_pairs
from hf_lowrank.solvers.svd import SVD


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
