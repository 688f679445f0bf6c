"""Ranks of a Tucker decomposition from a budget: the ones that keep most in so many numbers."""

from bisect import bisect_right

import torch

from hf_lowrank.methods.tucker.tucker import TuckerRanks, captured_energy

# Ranks of large blocks come in steps of the processor's vectors.
_STEP = 8
_SMALLEST_STEPPED = 128
# A bank of nearly as many matrices as there are blocks saves next to nothing, and is mixed from in every step.
_MOST_BANK = 1 / 2


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
