"""What a choice for a matrix costs, in the unit of a budget."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from hf_lowrank.hosts.matrices import Matrix
from hf_lowrank.planning.sizes import entry_bytes
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

FloatArray = NDArray[np.float64]


class Price(Protocol):
    """What matrices cost."""

    def of_entry(self, matrix: Matrix, structure: str) -> float:
        """What a matrix costs for being in a structure at all, whatever its rank; part of `of_ranks`."""
        ...

    def of_dense(self, matrix: Matrix) -> float:
        """The cost of a matrix while dense."""
        ...

    def of_ranks(self, matrix: Matrix, structure: str, ranks: NDArray[np.int64]) -> FloatArray:
        """The cost of a matrix in a structure at each of the ranks."""
        ...


def stored_numbers(matrix: Matrix, structure: str, ranks: NDArray[np.int64]) -> FloatArray:
    """How many numbers a structure stores in the place of a matrix at each of the ranks, bias not counted."""
    counted = STRUCTURES[structure].num_weights
    return np.array([counted(*matrix.shape, rank=int(rank)) for rank in ranks], dtype=np.float64) * len(matrix.parts)


@dataclass(frozen=True)
class WeightPrice:
    """A price on each stored number.

    Args:
        per_weight: 1 for parameters.
    """

    per_weight: float

    def of_entry(self, matrix: Matrix, structure: str) -> float:
        """See `Price`."""
        return 0.0

    def of_dense(self, matrix: Matrix) -> float:
        """See `Price`."""
        return matrix.num_weights * self.per_weight

    def of_ranks(self, matrix: Matrix, structure: str, ranks: NDArray[np.int64]) -> FloatArray:
        """See `Price`."""
        return stored_numbers(matrix, structure, ranks) * self.per_weight


@dataclass(frozen=True)
class FilePrice(WeightPrice):
    """A price on each byte of the saved folder.

    Args:
        per_weight: Bytes of a number.
    """

    def of_entry(self, matrix: Matrix, structure: str) -> float:
        """See `Price`."""
        return entry_bytes(matrix, structure)

    def of_ranks(self, matrix: Matrix, structure: str, ranks: NDArray[np.int64]) -> FloatArray:
        """See `Price`."""
        return super().of_ranks(matrix, structure, ranks) + self.of_entry(matrix, structure)
