"""Decompositions on disk: a matrix is decomposed once, and memory holds the ranks that are in use."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_lowrank.files.scratch import write_file
from hf_lowrank.methods.factors import Factors
from hf_lowrank.methods.matrix.svd import Decomposition


@dataclass(frozen=True)
class StoredDecomposition:
    """Every truncation of one matrix (O, I), read from a file at the rank that is asked for.

    Column `k` of `up` and row `k` of `down` are the same at every rank that has them, so the file holds those of the
    full rank: `up` (R, O) transposed, so that a rank is a piece of it, `down` (R, I) and `singular_values` (R).

    Args:
        device: Where the factors are wanted.
    """

    path: Path
    device: torch.device

    @cached_property
    def singular_values(self) -> torch.Tensor:
        """See `Decomposition`."""
        with safe_open(self.path, framework="pt") as file:
            values: torch.Tensor = file.get_tensor("singular_values").clone()
        return values

    def factors(self, rank: int) -> Factors:
        """See `Decomposition`."""
        with safe_open(self.path, framework="pt", device=str(self.device)) as file:
            up, down = (file.get_slice(key)[:rank].clone() for key in ("up", "down"))  # no view of the file
        return Factors(up.T, down)


def store_decomposition(found: Decomposition, path: Path) -> None:
    """Write the file of a `StoredDecomposition`; it is there whole or not at all."""
    factors = found.factors(len(found.singular_values))
    tensors = {"up": factors.up.T, "down": factors.down, "singular_values": found.singular_values}
    whole = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    write_file(path, lambda draft: save_file(whole, draft))
