"""What low-rank solvers find."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """A rank-`R` matrix `W = up @ down`.

    Shapes:
        up    (O, R)
        down  (R, I)

    Those of several matrices of one shape, `W_e = up_e @ down_e`, are (E, O, R) and (E, R, I).
    """

    up: torch.Tensor
    down: torch.Tensor

    @property
    def product(self) -> torch.Tensor:
        """The matrix itself, (O, I)."""
        return self.up @ self.down


@dataclass(frozen=True)
class BandedSolution:
    """Numbers of a `BandedAutoencoder`.

    Args:
        codes: Of each band, (V_k, R_k), its rows in the order of `order`.
        bases: Of each band, (R_k, D).
        offset: (K, D).
        order: Row of the table that is at each place, (V).
    """

    codes: tuple[torch.Tensor, ...]
    bases: tuple[torch.Tensor, ...]
    offset: torch.Tensor
    order: torch.Tensor

    @property
    def product(self) -> torch.Tensor:
        """The table itself, (V, D)."""
        rows = [codes @ basis + mean for codes, basis, mean in zip(self.codes, self.bases, self.offset, strict=True)]
        return torch.empty_like(torch.cat(rows)).index_copy(0, self.order, torch.cat(rows))


def balanced(up: torch.Tensor, down: torch.Tensor) -> Factors:
    """The same product with column `k` of `up` and row `k` of `down` of equal length.

    Equal lengths keep both factors in the range of a 16-bit type and give both gradients of one scale. Where one of
    the two is zero (a rank-deficient matrix) the other stays as it is, so that training can still use it.
    """
    # In float64, which holds the square of every narrower number.
    up_norms, down_norms = up.norm(dim=0, dtype=torch.float64), down.norm(dim=1, dtype=torch.float64)  # (R), (R)
    usable = (up_norms > 0) & (down_norms > 0)
    scale = torch.where(usable, down_norms.sqrt() / up_norms.sqrt(), 1.0).to(up.dtype)
    return Factors(up * scale, down / scale[:, None])


def truncated(up: torch.Tensor, down: torch.Tensor, rank: int) -> Factors:
    """The best rank-`rank` approximation of `up @ down`, `U sqrt(S)` and `sqrt(S) V^T`, in float64 inside.

    The product is never formed: with `up = Q_u R_u` and `down^T = Q_d R_d` it has the singular values of `R_u R_d^T`.
    """
    left, left_core = torch.linalg.qr(up.double())
    right, right_core = torch.linalg.qr(down.double().T)
    vectors, values, others = torch.linalg.svd(left_core @ right_core.T)
    found = balanced(left @ vectors[:, :rank] * values[:rank], others[:rank] @ right.T)
    return Factors(found.up.to(up.dtype), found.down.to(down.dtype))
