"""Codes, lengths and one non-linear decoder for the rows of several matrices, trained from the best linear ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils import skip_init

from hf_lowrank.files.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.methods.rows.row_autoencoder import RowCodes
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_autoencoder_linear import NonlinearDecoder

_LEAK = 0.01
# Largest entry of the start before the hyperbolic tangent, which is linear up to there but for a hundredth.
_SMALL = 0.2
_EPSILON = 1e-12
_STEPS_TO_KEEP = 25


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

    @property
    def products(self) -> list[torch.Tensor]:
        """The rows of each matrix."""
        (_, rank), (width, _) = self.decoder["first.weight"].shape, self.decoder["last.weight"].shape
        decoder = skip_init(NonlinearDecoder, width, rank).to(self.codes[0])
        decoder.load_state_dict(self.decoder)
        with torch.no_grad():
            pairs = zip(self.codes, self.norms, strict=True)
            return [F.normalize(decoder(codes), dim=1) * norms.to(codes)[:, None] for codes, norms in pairs]


def train_rows(
    rows: Sequence[torch.Tensor],
    start: RowCodes,
    seed: int = 0,
    training: RowTraining = RowTraining(),
    checkpoint: Checkpoint = NOT_KEPT,
    progress: Progress = no_progress,
) -> NonlinearCodes:
    """Codes and a non-linear decoder for the rows (N, D) of several matrices, no worse than the linear ones.

    The decoder starts as the linear one, which two leaky rectifiers of opposite sign make; what is left of its width
    starts with random kinks and no effect.

    Args:
        checkpoint: Keeps the state now and then; a run that was killed goes on there, to the same numbers.
    """
    run = _Run(rows, start, seed, training)
    if (kept := checkpoint.load()) is not None:
        run.load(kept)
    for _ in progress(range(len(run.losses), training.steps + 1), "training a decoder"):
        if run.is_over:
            break
        run.advance()
        if run.is_over or len(run.losses) % _STEPS_TO_KEEP == 0:
            checkpoint.save(run.state())
    return run.best()


class _Run:
    """The state of one training."""

    def __init__(self, rows: Sequence[torch.Tensor], start: RowCodes, seed: int, training: RowTraining) -> None:
        kind = torch.promote_types(rows[0].dtype, torch.float32)
        self._training = training
        self._norms = start.norms
        self._lengths = [len(own) for own in rows]
        self._rows, self._row_norms = torch.cat(list(rows)).to(kind), torch.cat(start.norms).to(kind)
        decoder, scale = _as_nonlinear(start, seed)
        self._decoder = decoder.to(self._rows)
        codes = torch.cat(start.codes).to(kind).requires_grad_()
        self._parameters = [codes, *self._decoder.parameters()]
        outward = list(self._decoder.last.parameters())  # the smaller by that scale, and so their steps
        inward = [one for one in self._parameters if not any(one is own for own in outward)]
        self._rates = training.learning_rate, training.learning_rate * scale
        self._optimizer = torch.optim.Adam([{"params": own} for own in (inward, outward)])
        self.losses: list[float] = []
        self._kept = self._copies()

    @property
    def is_over(self) -> bool:
        """Whether all steps are made, or the last ones were of no use."""
        step, patience = len(self.losses) - 1, self._training.patience
        if step < patience:
            return step == self._training.steps
        fell = min(self.losses[-patience:]) <= self.losses[-1 - patience] * (1 - 1e-3)
        return step == self._training.steps or not fell

    def advance(self) -> None:
        """Find the loss, keep what has it if it is the least, and make a step unless it was the last."""
        training, codes = self._training, self._parameters[0]
        with torch.enable_grad():
            loss = training.loss(F.normalize(self._decoder(codes), dim=1), self._rows, self._row_norms)
        if not self.losses or float(loss.detach()) < min(self.losses):
            self._kept = self._copies()
        self.losses.append(float(loss.detach()))
        if self.is_over:
            return
        fraction = (len(self.losses) - 1) / training.steps
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * fraction)) / 2
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()

    def best(self) -> NonlinearCodes:
        """What had the least loss."""
        codes, *numbers = self._kept
        state = dict(zip((name for name, _ in self._decoder.named_parameters()), numbers, strict=True))
        return NonlinearCodes(list(codes.split(self._lengths)), self._norms, state, self.losses)

    def state(self) -> dict[str, Any]:
        """All that the rest depends on."""
        lists = {"parameters": self._copies(), "kept": self._kept, "losses": self.losses}
        return {**lists, "optimizer": self._optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        with torch.no_grad():
            for parameter, value in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        self._kept = [value.to(self._rows) for value in state["kept"]]
        self.losses = state["losses"]

    def _copies(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]


def _as_nonlinear(start: RowCodes, seed: int) -> tuple[NonlinearDecoder, float]:
    """The non-linear decoder that gives the directions of a linear one, and the scale of its rows."""
    rank, width = start.basis.shape
    basis, offset = start.basis.float().cpu(), start.offset.float().cpu()
    decoder: Any = skip_init(NonlinearDecoder, width, rank)  # nobody else's draws change
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
