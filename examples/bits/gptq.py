"""A plain GPTQ to compare with: a fixed number of bits, symmetric, one scale a group (Frantar et al., ICLR 2023)."""

import torch

_SHRINKS = torch.linspace(0.4, 1.0, 31)
_DAMPING = 0.01


def gptq(weight: torch.Tensor, moment: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """A weight (O, I) rounded to `2**bits` levels a group, errors made good in later columns.

    Columns go from the one of the largest second moment to that of the smallest, and scales are found before.

    Args:
        moment: `E[x x^T]` of its inputs, (I, I).
        group: Inputs to a scale of 16 bits; None is a row.
    """
    moment = moment.double() + _DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    weight, low, high = weight.double().clone(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = _scales(weight, moment.diagonal(), low, high, group or weight.shape[1])
    order = moment.diagonal().argsort(descending=True)
    root = torch.linalg.cholesky(torch.linalg.inv(moment[order][:, order]), upper=True)
    left, rounded = weight[:, order], torch.zeros_like(weight)
    for place, column in enumerate(order):
        scale = scales[:, column]
        rounded[:, column] = scale * (left[:, place] / scale).round().clamp(low, high)
        error = (left[:, place] - rounded[:, column]) / root[place, place]
        left[:, place + 1 :] -= error[:, None] * root[place, place + 1 :]
    return rounded.float()


def stored_bits(columns: int, bits: int, group: int | None) -> float:
    """Bits a number of a weight takes, its share of a scale too."""
    return bits + 16 / (group or columns)


def _scales(weight: torch.Tensor, importance: torch.Tensor, low: int, high: int, group: int) -> torch.Tensor:
    """The scale of each entry, (O, I): of some, of both signs, that of the least weighted error in its group."""
    found = torch.empty_like(weight)
    for start in range(0, weight.shape[1], group):
        part, weights = weight[:, start : start + group], importance[start : start + group]
        largest = part.gather(1, part.abs().argmax(1, keepdim=True))
        largest = torch.where(largest == 0, 1.0, largest)
        # The largest number takes the lowest level, of which there is one more.
        tried = torch.stack([largest * shrink / level for shrink in _SHRINKS for level in (low, -low, high)])
        rounded = tried * (part / tried).round().clamp(low, high)
        errors = ((part - rounded).square() * weights).sum(-1, keepdim=True)
        found[:, start : start + group] = tried.gather(0, errors.argmin(0, keepdim=True))[0]
    return found.half().double()
