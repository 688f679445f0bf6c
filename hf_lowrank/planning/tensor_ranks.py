"""Ranks of tensor decompositions from a budget: the ones that keep most in so many numbers."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

from hf_lowrank.solvers.tucker import TuckerRanks, captured_energy

# Ranks of large blocks come in steps of the processor's vectors.
_STEP = 8
_SMALLEST_STEPPED = 128
# A bank of nearly as many matrices as there are blocks saves next to nothing, and is mixed from in every step.
_MOST_BANK = 1 / 2
_HALVINGS = 40

Ranks = tuple[int, ...]


def tucker_ranks(stack: torch.Tensor, budget: float) -> TuckerRanks | None:
    """The ranks whose HOSVD keeps most of `stack` (B, m, n) in at most `budget` numbers; None if none fit.

    What is kept is the mean over the blocks of each one's share of energy: a block of small entries is no less needed
    than one of large ones, and a bank that serves the large ones leaves it without anything. A bank has at most half
    as many matrices as there are blocks.
    """
    scales = stack.flatten(1).norm(dim=1).clamp_min(torch.finfo(stack.dtype).tiny)
    lefts, rights = _steps(stack.shape[1]), _steps(stack.shape[2])
    kept = captured_energy(stack / scales[:, None, None], lefts, rights).numpy()
    best, found = -1.0, None
    for num_kept in [*range(1, int(_MOST_BANK * len(stack)) + 1), len(stack)]:
        bank_rank = num_kept if num_kept < len(stack) else None
        for row, left_rank in enumerate(lefts):
            # Affordable right ranks are a prefix: the count grows by the same number with each.
            none = TuckerRanks(left_rank, 0, bank_rank).num_weights(*stack.shape)
            each = TuckerRanks(left_rank, 1, bank_rank).num_weights(*stack.shape) - none
            reach = bisect_right(rights, (budget - none) / each)
            if reach and kept[num_kept - 1, row, reach - 1] > best:
                best = kept[num_kept - 1, row, reach - 1]
                found = TuckerRanks(left_rank, rights[reach - 1], bank_rank)
    return found


def _steps(size: int) -> list[int]:
    stepped = size >= _SMALLEST_STEPPED
    return [at for at in range(1, size + 1) if not stepped or at < _STEP or at % _STEP == 0 or at == size]


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
