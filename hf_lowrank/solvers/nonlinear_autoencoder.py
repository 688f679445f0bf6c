"""Codes, lengths and one non-linear decoder for the rows of several matrices, trained from the best linear ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from hf_lowrank.remote_code.lowrank_autoencoder_linear import NonlinearDecoder
from hf_lowrank.solvers.row_autoencoder import RowCodes

_LEAK = 0.01
# Largest entry of the start before the hyperbolic tangent, which is linear up to there but for a hundredth.
_SMALL = 0.2
_EPSILON = 1e-12


@dataclass(frozen=True)
class RowTraining:
    """The loss `cosine * mean(1 - cos) + rmse * RMSE` of Banaei et al. (Findings of EACL 2023), and how it is lowered.

    Lengths are put back before the loss is taken. Adam on all rows at once, at a rate that falls to zero along a
    cosine; training ends early, by the training loss alone, when `patience` steps have lowered it by less than a
    thousandth.
    """

    cosine: float = 10 / 11
    rmse: float = 1 / 11
    steps: int = 300
    learning_rate: float = 1e-2
    patience: int = 30

    def loss(self, directions: torch.Tensor, rows: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Of decoded directions (N, D) of unit length, for rows (N, D) of lengths (N)."""
        cosines = F.cosine_similarity(directions, rows, dim=1)
        mean_square = (directions * norms[:, None] - rows).square().mean()
        return self.cosine * (1 - cosines).mean() + self.rmse * (mean_square + _EPSILON).sqrt()


@dataclass(frozen=True)
class NonlinearCodes:
    """What makes the rows of several matrices.

    Args:
        codes: Of each matrix, (N, R).
        norms: Of each matrix, (N).
        decoder: State of a `NonlinearDecoder`.
        losses: Of each step of training; the first is that of the linear start.
    """

    codes: list[torch.Tensor]
    norms: list[torch.Tensor]
    decoder: dict[str, torch.Tensor]
    losses: list[float]


def train_rows(
    rows: Sequence[torch.Tensor], start: RowCodes, seed: int = 0, training: RowTraining = RowTraining()
) -> NonlinearCodes:
    """Codes and a non-linear decoder for the rows (N, D) of several matrices, no worse than the linear ones.

    The decoder starts as the linear one, which two leaky rectifiers of opposite sign make; what is left of its width
    starts with random kinks and no effect.
    """
    lengths = [len(own) for own in rows]
    kind = torch.promote_types(rows[0].dtype, torch.float32)
    whole, norms = torch.cat(list(rows)).to(kind), torch.cat(start.norms).to(kind)
    codes = torch.cat(start.codes).to(kind).requires_grad_()
    decoder, scale = _as_nonlinear(start, seed)
    decoder = decoder.to(whole)
    parameters = [codes, *decoder.parameters()]
    outward = list(decoder.last.parameters())  # the smaller by that scale, and so their steps
    inward = [parameter for parameter in parameters if not any(parameter is own for own in outward)]
    rates = training.learning_rate, training.learning_rate * scale
    optimizer = torch.optim.Adam([{"params": own} for own in (inward, outward)])
    losses: list[float] = []
    best, kept = math.inf, [parameter.detach().clone() for parameter in parameters]
    for step in range(training.steps + 1):
        with torch.enable_grad():
            loss = training.loss(F.normalize(decoder(codes), dim=1), whole, norms)
        losses.append(float(loss.detach()))
        if losses[-1] < best:
            best, kept = losses[-1], [parameter.detach().clone() for parameter in parameters]
        before = losses[-1 - training.patience] if step >= training.patience else math.inf
        if step == training.steps or min(losses[-training.patience :]) > before * (1 - 1e-3):
            break
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * step / training.steps)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = dict(zip((name for name, _ in decoder.named_parameters()), kept[1:], strict=True))
    return NonlinearCodes(list(kept[0].split(lengths)), start.norms, state, losses)


def _as_nonlinear(start: RowCodes, seed: int) -> tuple[NonlinearDecoder, float]:
    """The non-linear decoder that gives the directions of a linear one, and the scale of its rows."""
    rank, width = start.basis.shape
    basis, offset = start.basis.float().cpu(), start.offset.float().cpu()
    decoder: Any = NonlinearDecoder(width, rank)
    draws = torch.Generator().manual_seed(seed)
    largest = torch.cat([codes.float().cpu() @ basis + offset for codes in start.codes]).abs().max()
    scale = _SMALL / max(float(largest), _EPSILON)
    eye = torch.eye(rank)
    undo = torch.cat([eye, -eye], dim=1) / (1 + _LEAK)  # of two rectifiers of opposite sign
    spread = torch.cat(start.codes).float().std().cpu().clamp_min(_EPSILON)
    with torch.no_grad():
        for child in decoder.children():
            child.bias.zero_()
        decoder.first.weight.copy_(torch.cat([eye, -eye]))
        mixed = torch.randn(2 * rank, rank, generator=draws) * rank**-0.5
        decoder.second.weight.copy_(torch.cat([undo, -undo, mixed @ undo]))
        decoder.second.bias[2 * rank :] = torch.randn(2 * rank, generator=draws) * spread
        outward = basis.T * (scale / (1 + _LEAK))
        decoder.last.weight.copy_(torch.cat([outward, -outward, torch.zeros(width, 2 * rank)], dim=1))
        decoder.last.bias.copy_(offset * scale)
    return decoder, scale
