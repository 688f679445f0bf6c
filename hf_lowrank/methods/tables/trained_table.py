"""The published training of a linear autoencoder of a token table (Balazy et al., RepL4NLP 2021).

Kept to compare with, and as one more objective: on real tables it does not reach the closed form of `BandedTable`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hf_lowrank.files.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.methods.factors import BandedSolution, balanced
from hf_lowrank.methods.tables.banded import BandedTable, TableObjective
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_banded import Band

# `|x|^alpha` has no gradient at zero.
_EPSILON = 1e-10


@dataclass(frozen=True)
class PublishedTraining:
    """The loss `cosine * mean(1 - cos) + l2 * RMSE + l1 * mean |e' - e|^alpha`, and how it is brought down.

    `alpha` falls from 1 to `last_alpha` over the first `epochs`, then stays; Adam, whose rate is multiplied by `decay`
    every `decay_epochs`. The defaults are the published ones. Training ends early, by the training loss alone, when
    `patience` epochs after the first `epochs` have not lowered it by a thousandth.
    """

    cosine: float = 0.9975 / 5
    l1: float = 0.0025
    l2: float = 0.0
    last_alpha: float = 0.1
    epochs: int = 20
    extra_epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 1e-3
    decay: float = 0.5
    decay_epochs: int = 4
    patience: int = 3
    seed: int = 1

    def loss(self, found: torch.Tensor, wanted: torch.Tensor, epoch: int) -> torch.Tensor:
        """Of decoded rows (N, D) in that epoch."""
        difference = found - wanted
        alpha = max(1 - (1 - self.last_alpha) * epoch / self.epochs, self.last_alpha)
        total = self.cosine * (1 - F.cosine_similarity(found, wanted, dim=1)).mean()
        total = total + self.l1 * (difference.abs() + _EPSILON).pow(alpha).mean()
        return total + self.l2 * (difference.square().mean() + _EPSILON).sqrt()


class TrainedTable(BandedTable):
    """One band whose codes and decoder come from training an encoder and a decoder, both linear with bias.

    Args:
        weight: (V, D); training is where it is.
        checkpoint: Keeps each finished epoch; a run that was killed goes on there, to the same numbers.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        training: PublishedTraining = PublishedTraining(),
        checkpoint: Checkpoint = NOT_KEPT,
        progress: Progress = no_progress,
    ) -> None:
        directions = TableObjective(frequency_power=0, is_relative=True, uses_metric=False)
        super().__init__(weight, objective=directions, most_bands=1)
        self._training = training
        self._checkpoint = checkpoint
        self._progress = progress
        self._solved: dict[int, BandedSolution] = {}

    def solve(self, bands: Sequence[Band]) -> BandedSolution:
        ((_, rank),) = bands
        if rank not in self._solved:
            self._solved[rank] = self._train(rank)
        return self._solved[rank]

    def _train(self, rank: int) -> BandedSolution:
        wide = self._weight.to(torch.promote_types(self._weight.dtype, torch.float32))
        run = _Run(wide, rank, self._training)
        checkpoint = self._checkpoint.part(str(rank))
        if (kept := checkpoint.load()) is not None:
            run.load(kept)
        epochs = range(run.epoch, self._training.epochs + self._training.extra_epochs)
        for _ in self._progress(epochs, "training the autoencoder"):
            if run.has_converged:
                break
            run.one_epoch()
            checkpoint.save(run.state())
        with torch.no_grad():
            codes, decoder = run.encoder(wide), run.decoder
            pair = balanced(codes, decoder.weight.detach().T)
        order = torch.arange(len(wide), device=wide.device)
        return BandedSolution((pair.up,), (pair.down,), decoder.bias.detach()[None], order)


class _Run:
    """The state of one training."""

    def __init__(self, rows: torch.Tensor, rank: int, training: PublishedTraining) -> None:
        self._rows = rows
        self._training = training
        with torch.random.fork_rng(devices=[]):  # nobody else's draws change
            torch.manual_seed(training.seed)
            self.encoder = nn.Linear(rows.shape[1], rank, dtype=rows.dtype).to(rows.device)
            self.decoder = nn.Linear(rank, rows.shape[1], dtype=rows.dtype).to(rows.device)
        parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
        self._optimizer = torch.optim.Adam(parameters, training.learning_rate)
        self.losses: list[float] = []

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.losses)

    @property
    def has_converged(self) -> bool:
        """Whether the last epochs were of no use."""
        annealed = self.losses[self._training.epochs :]
        before, after = annealed[: -self._training.patience], annealed[-self._training.patience :]
        return bool(before) and min(after) > min(before) * (1 - 1e-3)

    def one_epoch(self) -> None:
        """Every row once, in an order of this epoch's own."""
        training, epoch = self._training, self.epoch
        draws = torch.Generator().manual_seed(training.seed * 1000 + epoch)
        for group in self._optimizer.param_groups:
            group["lr"] = training.learning_rate * training.decay ** (epoch // training.decay_epochs)
        total = 0.0
        for chosen in torch.randperm(len(self._rows), generator=draws).split(training.batch_size):
            batch = self._rows[chosen.to(self._rows.device)]
            with torch.enable_grad():
                loss = training.loss(self.decoder(self.encoder(batch)), batch, epoch)
                self._optimizer.zero_grad()
                loss.backward()
            self._optimizer.step()
            total += float(loss.detach()) * len(batch)
        self.losses.append(total / len(self._rows))

    def state(self) -> dict[str, Any]:
        """All that the rest depends on."""
        parts: dict[str, Any] = {"encoder": self.encoder, "decoder": self.decoder, "optimizer": self._optimizer}
        return {name: part.state_dict() for name, part in parts.items()} | {"losses": self.losses}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.encoder.load_state_dict(state["encoder"])
        self.decoder.load_state_dict(state["decoder"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.losses = state["losses"]
