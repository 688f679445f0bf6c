"""The published non-linear autoencoder for a token table: its sizes, what it is expected to lose, and its training."""

from bisect import bisect_right
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from hf_lowrank.files.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.methods.factors import BandedSolution
from hf_lowrank.methods.rows.nonlinear_autoencoder import NonlinearCodes, train_rows
from hf_lowrank.methods.rows.row_autoencoder import RowAutoencoder, rows_by_direction
from hf_lowrank.methods.tables.banded import CLOSED_FORM, BandedTable
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_nonlinear_table import NonlinearAutoencoderTable


class NonlinearTable:
    """Codes, lengths and a non-linear decoder for one table (Banaei et al., Findings of EACL 2023).

    Rank `R` stands for what one linear autoencoder costs, `R (V + D) + D` numbers. Training is for one size; while the
    sizes of a model are chosen, the linear autoencoder of rank `R` with the least cosine error stands for the trained
    one.

    Args:
        weight: (V, D); training is where it is.
        seed: Of the draws of the training.
        checkpoint: Keeps the state now and then; a run that was killed goes on there, to the same numbers.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        seed: int = 0,
        checkpoint: Checkpoint = NOT_KEPT,
        progress: Progress = no_progress,
    ) -> None:
        self._weight = weight
        self._seed = seed
        self._checkpoint = checkpoint
        self._progress = progress
        self._linear = BandedTable(weight, objective=CLOSED_FORM["direction"], most_bands=1)

    def sizes(self, rank: int, itemsize: int | None = None) -> dict[str, int]:
        """The longest codes that cost no more than one linear autoencoder of that rank, decoder and lengths paid for.

        Where that would not pay for codes of one number, those; see `NonlinearAutoencoderTable.num_weights`.

        Args:
            itemsize: Bytes of a stored number, for tables that have an order of the rows to pay for: not this one.
        """
        cost = partial(NonlinearAutoencoderTable.num_weights, *self._weight.shape)
        lengths = range(1, self._weight.shape[1] + 1)
        return {"code_length": bisect_right(lengths, cost(rank=rank), key=lambda length: cost(code_length=length))}

    def expected(self, sizes: dict[str, int]) -> BandedSolution:
        """What stands for the trained autoencoder while sizes are chosen: the linear one that costs as much."""
        cost, (rows, columns) = NonlinearAutoencoderTable.num_weights(*self._weight.shape, **sizes), self._weight.shape
        return self._linear.at_rank(min(max(1, (cost - columns) // (rows + columns)), rows, columns))

    @property
    def errors(self) -> NDArray[np.float64]:
        """Loss expected at rank 1, 2, ..., `min(V, D)`, as a fraction of that of zeros: that of the linear one."""
        return self._linear.errors

    def at_sizes(self, sizes: dict[str, int]) -> NonlinearCodes:
        """Codes, lengths and decoder of those sizes, trained from the best linear ones."""
        length = sizes["code_length"]
        rows = self._weight.to(torch.promote_types(self._weight.dtype, torch.float32))
        start = RowAutoencoder([rows_by_direction(rows)]).solve(length)
        kept = self._checkpoint.part(f"nonlinear-{length}")
        return train_rows([rows], start, self._seed, checkpoint=kept, progress=self._progress)
