"""Ranks of tensor decompositions from a budget: the ones that keep most in so many numbers."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hf_lowrank.planning.prices import FloatArray
from hf_lowrank.solvers.tucker import TuckerRanks

# Ranks of large blocks come in steps of the processor's vectors.
_STEP = 16
_SMALLEST_STEPPED = 128
_HALVINGS = 40

Ranks = tuple[int, ...]


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


def ranks_for(spectra: Sequence[torch.Tensor], tolerance: float) -> Ranks:
    """The least ranks within `tolerance * ||W||_F`: each cut may lose an equal part of the squared error.

    Args:
        spectra: Singular values at each cut, largest first.
    """
    allowed = tolerance**2 / len(spectra)
    found = []
    for values in spectra:
        tail = values.square().flip(0).cumsum(0).flip(0)  # what is lost by keeping that many
        found.append(max(1, int((tail > allowed * tail[0]).sum())))
    return tuple(found)


def ranks_within(
    spectra: Sequence[Sequence[torch.Tensor]], num_weights: Callable[[Sequence[Ranks]], int], budget: float
) -> list[Ranks] | None:
    """The ranks of several tensors for one relative tolerance, the least that fits; None if not even ranks of 1 do.

    Args:
        spectra: Of each tensor the singular values at its cuts, largest first.
        num_weights: Stored numbers at given ranks of each.
    """
    if num_weights([(1,) * len(cuts) for cuts in spectra]) > budget:
        return None
    low, high = 0.0, max(len(cuts) for cuts in spectra) ** 0.5  # at the latter every rank is 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = num_weights([ranks_for(cuts, middle) for cuts in spectra]) <= budget
        low, high = (low, middle) if fits else (middle, high)
    return [ranks_for(cuts, high) for cuts in spectra]
