"""Ranks of tensor decompositions from a budget: the ones that keep most energy in so many numbers."""

from collections.abc import Sequence

import numpy as np

from hf_lowrank.planning.prices import FloatArray
from hf_lowrank.solvers.tucker import TuckerRanks

# Ranks of large blocks come in steps of the processor's vectors.
_STEP = 16
_SMALLEST_STEPPED = 128


def tucker_ranks(spectra: Sequence[FloatArray], budget: float) -> TuckerRanks | None:
    """The ranks that keep most of `B` blocks (m, n) in at most `budget` numbers; None if not even ranks of 1 fit.

    What is kept is predicted as the product over the modes of the share of energy that each keeps by itself: exact
    where the modes are independent, and unlike the sum of what they lose it holds at strong compression too.

    Args:
        spectra: Eigenvalues of the Gram matrices of the left, right and bank modes, largest first.
    """
    left, right, bank = (np.cumsum(values) / max(values.sum(), 1e-300) for values in spectra)
    size = len(bank), len(left), len(right)
    best, found = -1.0, None
    lefts, rights = _steps(len(left)).tolist(), _steps(len(right)).tolist()
    for num_kept in range(1, len(bank) + 1):
        bank_rank = num_kept if num_kept < len(bank) else None
        for left_rank in lefts:
            # Affordable right ranks are a prefix: the count grows by the same number with each.
            none = TuckerRanks(left_rank, 0, bank_rank).num_weights(*size)
            each = TuckerRanks(left_rank, 1, bank_rank).num_weights(*size) - none
            reach = int(np.searchsorted(rights, (budget - none) // each, side="right"))
            if reach == 0:
                continue
            right_rank = rights[reach - 1]
            kept = bank[num_kept - 1] * left[left_rank - 1] * right[right_rank - 1]
            if kept > best:
                best, found = kept, TuckerRanks(left_rank, right_rank, bank_rank)
    return found


def _steps(size: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    every = np.arange(1, size + 1)
    return every if size < _SMALLEST_STEPPED else every[(every < _STEP) | (every % _STEP == 0) | (every == size)]
