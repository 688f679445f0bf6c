"""Ranks of tensors at several cuts, for one relative tolerance."""

from collections.abc import Callable, Sequence

import torch

_HALVINGS = 40

Ranks = tuple[int, ...]


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
