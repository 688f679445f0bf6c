"""Symmetric matrices by panels of their lower triangle: half the work to make, half the room to keep."""

from collections.abc import Iterator, Mapping

import torch

_HEIGHT = 256


def gram_panels(rows: torch.Tensor, weights: torch.Tensor | None = None) -> Iterator[tuple[int, torch.Tensor]]:
    """`X^T X` of (N, n) `X`: the first row of each panel, and the panel up to the diagonal, (h, first row + h).

    Args:
        weights: (N, 1) in `X^T diag(w) X`, so that no weighted copy of `X` is made.
    """
    for start in range(0, rows.shape[1], _HEIGHT):
        end = start + _HEIGHT
        left = rows[:, start:end] if weights is None else rows[:, start:end] * weights
        yield start, left.T @ rows[:, :end]


def from_panels(panels: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """The whole matrix (n, n) whose panels, by first row, these are."""
    size = max(start + len(panel) for start, panel in panels.items())
    whole = next(iter(panels.values())).new_empty(size, size)
    for start, panel in panels.items():
        whole[start : start + len(panel), : panel.shape[1]] = panel
        whole[:start, start : start + len(panel)] = panel[:, :start].T
    return whole
