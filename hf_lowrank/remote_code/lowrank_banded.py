"""Rows in bands of codes of one length, with a linear decoder for all: the core of a token table and of its head."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .lowrank_linear import factor_std
from .lowrank_tables import CodedRows

# Rows of a band, and the length of their codes.
Band = tuple[int, int]

_LARGEST_INT16 = 2**15
# What a code may miss of a row and still be that row's, as a fraction.
_REACHED = 1e-3


def bands_of(num_rows: int, row_length: int, sizes: dict[str, int]) -> list[Band]:
    """The bands that the sizes in a spec stand for, without empty ones.

    Raises:
        ValueError: If a size is out of bounds.
    """
    bounds = {name: num_rows if name in ("frequent", "common") else min(num_rows, row_length) for name in sizes}
    for name, bound in bounds.items():
        if not 1 <= sizes[name] <= bound:
            raise ValueError(
                f"{name} must be between 1 and {bound} for a {num_rows} x {row_length} matrix, got {sizes[name]}."
            )
    first = sizes["frequent"]
    second = min(sizes["common"], num_rows - first)
    ranks = (sizes["frequent_rank"], sizes["common_rank"], sizes["rank"])
    bands = zip((first, second, num_rows - first - second), ranks, strict=True)
    return [(rows, rank) for rows, rank in bands if rows]


def sizes_of_bands(bands: list[Band]) -> dict[str, int]:
    """The sizes that stand for one to three bands."""
    rows, ranks = [*(rows for rows, _ in bands), 1], [rank for _, rank in bands]
    lengths = ranks + ranks[-1:] * (3 - len(ranks))
    return {
        "frequent": rows[0],
        "common": rows[1],
        "frequent_rank": lengths[0],
        "common_rank": lengths[1],
        "rank": lengths[2],
    }


class BandedAutoencoder(CodedRows):
    """What a token table and a head have in common: rows in bands, each with codes of one length and a decoder.

        W_v = codes_v @ basis_k + offset_k        for the rows v of band k

    A row costs what it is worth: frequent ones have long codes, rare ones short codes. Each decoder is fitted to its
    band alone (GroupReduce: Chen et al., NeurIPS 2018; adaptive input representations: Baevski and Auli, ICLR 2019).

    Args:
        num_rows: `V`.
        row_length: `D`.
        sizes: What they are called in a plan; see `bands_of`.
    """

    SIZES = ("frequent", "common", "frequent_rank", "common_rank", "rank")
    place: torch.Tensor

    def __init__(self, num_rows: int, row_length: int, sizes: dict[str, int], **kind: Any) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.row_length = row_length
        self.sizes = sizes
        self.bands = bands_of(num_rows, row_length, sizes)
        self.codes = nn.ModuleList(self._band(*band, **kind) for band in self.bands)
        self.basis = nn.Parameter(torch.empty(sum(self.ranks), row_length, **kind))
        self.offset = nn.Parameter(torch.empty(len(self.bands), row_length, **kind))
        self.register_buffer("place", no_order(num_rows, kind["device"]))

    @staticmethod
    def num_weights(
        num_rows: int,
        row_length: int,
        *,
        rank: int,
        frequent: int = 0,
        common: int = 0,
        frequent_rank: int = 0,
        common_rank: int = 0,
    ) -> int:
        """Stored numbers, bias and order of the rows not counted: `sum over bands of R_k (V_k + D) + D`.

        `rank` alone counts one band: `R (V + D) + D`, the rule of Balazy et al.
        """
        sizes = {
            "frequent": frequent,
            "common": common,
            "frequent_rank": frequent_rank,
            "common_rank": common_rank,
            "rank": rank,
        }
        bands = bands_of(num_rows, row_length, sizes) if frequent else [(num_rows, rank)]
        return sum(length * (rows + row_length) + row_length for rows, length in bands)

    @property
    def ranks(self) -> list[int]:
        """Code length of each band."""
        return [rank for _, rank in self.bands]

    @property
    def rank(self) -> int:
        """Length of the longest codes."""
        return max(self.ranks)

    @property
    def places(self) -> torch.Tensor:
        """Where in the codes, one band after the other, each row is, (V)."""
        return self.place

    def to_dense(self) -> torch.Tensor:
        """The weight this module stands for, (V, D), from sums in float32 at least."""
        wide = torch.promote_types(self.basis.dtype, torch.float32)
        parts = zip(self.codes, self.basis.split(self.ranks), self.offset, strict=True)
        rows = [offset.to(wide) + band.weight.to(wide) @ basis.to(wide) for band, basis, offset in parts]
        return torch.cat(rows)[self.places.long()].to(self.basis.dtype)

    def reset_parameters(self, std: float) -> None:
        """Draw codes and decoders so that the rows' entries have standard deviation `std`; zero offsets, no order."""
        band: Any
        for band, basis in zip(self.codes, self.basis.split(self.ranks), strict=True):
            init.normal_(band.weight, std=factor_std(std, len(basis)))
            init.normal_(basis, std=factor_std(std, len(basis)))
        init.zeros_(self.offset)
        init.copy_(self.places, no_order(self.num_rows, self.places.device))

    @torch.no_grad()
    def _resize_rows_(self, num_rows: int) -> None:
        """Drop rows from the end, or add rows that equal the mean of the present ones, to the first band.

        Where the mean is not in the reach of that band's decoder, its codes get one entry more.
        """
        names = list(self.place.long().argsort().split([rows for rows, _ in self.bands]))
        bands: Any = self.codes
        codes = [band.weight.detach() for band in bands]
        bases = list(self.basis.detach().split(self.ranks))
        if num_rows > self.num_rows:
            mean = self.to_dense().mean(dim=0) - self.offset[0]
            codes[0], bases[0], code = _within_reach(codes[0], bases[0], mean)
            added = torch.arange(self.num_rows, num_rows, device=names[0].device)
            codes[0] = torch.cat([codes[0], code.expand(len(added), -1)])
            names[0] = torch.cat([names[0], added])
        kept = [index for index, name in enumerate(names) if bool((name < num_rows).any())]
        names, codes = zip(  # type: ignore[assignment]  # lists or tuples alike
            *((names[i][names[i] < num_rows], codes[i][names[i] < num_rows]) for i in kept), strict=True
        )
        self._become_(num_rows, torch.cat(list(names)), list(codes), [bases[i] for i in kept], self.offset[kept])

    def _become_(
        self,
        num_rows: int,
        order: torch.Tensor | None,
        codes: list[torch.Tensor],
        bases: list[torch.Tensor],
        offset: Any,
    ) -> None:
        first: Any = self.codes[0]
        is_trained = first.weight.requires_grad
        self.num_rows = num_rows
        self.bands = [(rows.shape[0], rows.shape[1]) for rows in codes]
        self.sizes = sizes_of_bands(self.bands)
        if order is not None:
            self.place = order.argsort().to(no_order(num_rows, "meta").dtype)
        self.codes = nn.ModuleList(self._band(*band, device="meta") for band in self.bands)
        for band, values in zip(self.codes, codes, strict=True):
            band.weight = nn.Parameter(values.contiguous(), is_trained)
        self.basis = nn.Parameter(torch.cat(bases), self.basis.requires_grad)
        self.offset = nn.Parameter(offset.clone(), self.offset.requires_grad)

    def _band(self, rows: int, rank: int, **kind: Any) -> nn.Module:
        """The module that holds the codes of one band."""
        raise NotImplementedError


def no_order(num_rows: int, device: Any) -> torch.Tensor:
    """The place of each row where they are in their own order, in the smallest type that holds it."""
    kind = torch.int16 if num_rows <= _LARGEST_INT16 else torch.int32
    return torch.arange(num_rows, device=device, dtype=kind)


def _within_reach(
    codes: torch.Tensor, basis: torch.Tensor, row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes and decoder that can make `row` (D) too, and its code; the other rows stay as they are."""
    code = torch.linalg.lstsq(basis.T.double(), row[:, None].double()).solution[:, 0]
    missing = row.double() - code @ basis.double()
    if missing.norm() > _REACHED * row.norm():
        codes = F.pad(codes, (0, 1))
        basis = torch.cat([basis, missing[None].to(basis)])
        code = torch.cat([code, code.new_ones(1)])
    return codes, basis, code.to(codes)
