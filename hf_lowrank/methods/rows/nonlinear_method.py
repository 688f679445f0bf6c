"""The published offline compression: non-linear decoders, one for the same matrix of all layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_lowrank.methods.encoding import StateDict
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.rows.method import AutoencoderMethod, Group
from hf_lowrank.methods.rows.nonlinear_autoencoder import train_rows
from hf_lowrank.planning.allocation import uniform
from hf_lowrank.planning.curves import Curve
from hf_lowrank.remote_code.lowrank_autoencoder_linear import ROWS


@dataclass(frozen=True)
class NonlinearAutoencoderMethod(AutoencoderMethod):
    """Codes and lengths for every row, and a non-linear decoder for the rows of a group (Banaei et al., EACL 2023).

    Every group keeps the same fraction of its numbers, decoder and lengths paid for, by the published rule
    `10 R^2 + (N + 6 + 4 D) R + N + D`. Trained from the linear autoencoder of the same code length.
    """

    decoder: ClassVar[str] = "nonlinear_decoder"
    structure: ClassVar[str] = "nonlinear_autoencoder"

    def _choices(self, curves: Sequence[Curve], budget: float) -> list[int]:
        return uniform(curves, budget)

    def _solved(
        self, problem: Problem, group: Group, rank: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], StateDict]:
        start = self._autoencoder(problem, group).solve(rank)
        weights = [problem.weight(matrix) for matrix in group.members]
        rows = [weight if group.rows == ROWS[0] else weight.T for weight in weights]
        kept = problem.checkpoint().part(f"{group.part}-{group.rows}-{rank}")
        found = train_rows(rows, start, problem.seed, checkpoint=kept, progress=problem.progress)
        return found.codes, found.norms, found.decoder


NONLINEAR_AUTOENCODER = NonlinearAutoencoderMethod(None)
SEPARATED_NONLINEAR_AUTOENCODER = NonlinearAutoencoderMethod(None, is_separate=True)
