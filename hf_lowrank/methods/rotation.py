"""Factors turned within their rank, so that quantizers that know nothing of factors lose little of them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from hf_lowrank.remote_code.lowrank_structures import named_structures, structure_name

# The pairs of factors a structure computes with: the other factor, and the one whose rows are the components.
_PAIRS: dict[str, Callable[[Any], Iterable[tuple[torch.Tensor, torch.Tensor]]]] = {
    "low_rank": lambda one: [(one.up.weight, one.down.weight)],
    "joint_low_rank": lambda one: [(one.up.weight, one.shared.down.weight)],
    "low_rank_experts": lambda one: [(one.up, one.down)],
    "low_rank_embedding": lambda one: [(one.codes.weight, one.basis)],
    "autoencoder_embedding": lambda one: zip((b.weight for b in one.codes), one.basis.split(one.ranks), strict=True),
}
_PAIRS["autoencoder_head"] = _PAIRS["autoencoder_embedding"]


@torch.no_grad()
def rotate_(model: torch.nn.Module) -> None:
    """Turn the factors of every matrix within their rank, so that no component stands out; see `rotation`.

    What several matrices or tables share, or are tied by, is turned once. Exact to rounding.
    """
    found: dict[int, tuple[torch.Tensor, dict[int, torch.Tensor]]] = {}
    for _, structure in named_structures(model):
        for up, down in _PAIRS.get(str(structure_name(structure)), lambda _: [])(structure):
            found.setdefault(down.data_ptr(), (down, {}))[1][up.data_ptr()] = up
    for down, ups in found.values():
        turn = rotation(down.shape[-2]).to(down.device)
        down.copy_(turn.T @ down.double())
        for up in ups.values():
            up.copy_(up.double() @ turn)


def rotation(rank: int) -> torch.Tensor:
    """An orthogonal (R, R) matrix, drawn, always the same: `up Q` and `Q^T down` have the product of `up` and `down`.

    No component stands out then, in no factor and in no state between them: all rows of `down` have about one length.
    A quantizer that takes one scale for a whole matrix, or for all the states of a call, loses far less so (QuIP:
    Chee et al., NeurIPS 2023), and the rotation costs nothing that runs.
    """
    drawn = torch.randn(rank, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    turned: torch.Tensor = torch.linalg.qr(drawn).Q
    return turned
