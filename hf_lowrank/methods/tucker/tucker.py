"""Tucker decomposition of stacked blocks: factors shared by all blocks, a small matrix of its own for each."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.methods.metric import Metric
from hf_lowrank.methods.stacking import BlockLayout, cut_blocks, join_blocks
from hf_lowrank.progress import Progress, no_progress

_TOLERANCE = 1e-5
_MOST_SWEEPS = 50


@dataclass(frozen=True)
class TuckerRanks:
    """Sizes of a Tucker decomposition of `B` blocks (m, n).

    Args:
        left: Columns of the left factor, at most m.
        right: Columns of the right factor, at most n.
        bank: Matrices that all blocks are mixed from (format IV), below B; None gives each block its own (format III).
    """

    left: int
    right: int
    bank: int | None = None

    def num_weights(self, num_blocks: int, left: int, right: int) -> int:
        """Stored numbers: `K (rl rr) + B K + m rl + n rr`, or `B (rl rr) + m rl + n rr` without a bank."""
        matrices = num_blocks if self.bank is None else self.bank
        mixing = 0 if self.bank is None else num_blocks * self.bank
        return matrices * self.left * self.right + mixing + left * self.left + right * self.right

    def check(self, num_blocks: int, left: int, right: int) -> None:
        """Raise `InputError` unless each rank is between 1 and the size it cuts."""
        sizes = {"left": left, "right": right} | ({} if self.bank is None else {"bank": num_blocks})
        for name, bound in sizes.items():
            if not 1 <= getattr(self, name) <= bound:
                raise InputError(
                    f"The {name} rank must be between 1 and {bound} for {num_blocks} blocks of {left} x {right}, "
                    f"got {getattr(self, name)}. Choose one within."
                )


@dataclass(frozen=True)
class Tucker:
    """Blocks `W_i = left (sum_k mixing_ik core_k) right^T`; without `mixing`, `W_i = left core_i right^T`.

    Shapes:
        left    (m, rl)
        right   (n, rr)
        core    (K, rl, rr) with `mixing`, (B, rl, rr) without
        mixing  (B, K)
    """

    left: torch.Tensor
    right: torch.Tensor
    core: torch.Tensor
    mixing: torch.Tensor | None = None

    @property
    def ranks(self) -> TuckerRanks:
        """The sizes."""
        bank = None if self.mixing is None else self.mixing.shape[1]
        return TuckerRanks(self.left.shape[1], self.right.shape[1], bank)

    def cores(self) -> torch.Tensor:
        """The small matrix of each block, (B, rl, rr)."""
        return self.core if self.mixing is None else torch.tensordot(self.mixing, self.core, dims=1)

    def blocks(self) -> torch.Tensor:
        """The blocks themselves, (B, m, n)."""
        return self.left @ self.cores() @ self.right.T


@dataclass(frozen=True)
class BlockMetrics:
    """How much errors of the blocks count: `sum_i w_i tr(A (W_i - W_i') C (W_i - W_i')^T)`.

    Factors shared by all blocks ask for metrics common to all: `A` of the left axis, `C` of the right one, and a
    weight `w_i` for how much a block sees. They are whitened away before the decomposition and put back after it.

    Args:
        weights: (B), positive; None counts all blocks alike.
    """

    left: Metric
    right: Metric
    weights: torch.Tensor | None = None

    def whiten(self, stack: torch.Tensor) -> torch.Tensor:
        """`sqrt(w_i) L_A^T W_i L_C` for each block of (B, m, n)."""
        whitened = torch.empty_like(stack)
        for index, block in enumerate(stack):
            rooted = self.right.rooted(self.left.rooted(block).T).T
            whitened[index] = rooted if self.weights is None else rooted * self.weights[index].sqrt()
        return whitened

    def unwhiten(self, found: Tucker) -> Tucker:
        """The decomposition of the blocks from that of the whitened ones, of the same ranks."""
        core, mixing = found.core, found.mixing
        if self.weights is not None:
            scale = self.weights.rsqrt().to(core)
            core = core if mixing is not None else core * scale[:, None, None]
            mixing = None if mixing is None else mixing * scale[:, None]
        return orthonormal(Tucker(self.left.unroot(found.left), self.right.unroot(found.right), core, mixing))


def tucker(
    stack: torch.Tensor,
    ranks: TuckerRanks,
    metrics: BlockMetrics | None = None,
    progress: Progress = no_progress,
    tolerance: float = _TOLERANCE,
) -> Tucker:
    """The Tucker decomposition of `stack` (B, m, n) in the given metrics: `hosvd`, then `hooi` until it stops gaining.

    All factors but the core have orthonormal columns. Formats III and IV of Ren et al., "Exploring extreme
    parameter compression for pre-trained language models" (ICLR 2022).

    Args:
        tolerance: Share of the energy `||W||^2` that a sweep must still gain to be followed by another.

    Raises:
        InputError: If a rank is out of bounds.
    """
    ranks.check(*stack.shape)
    whitened = stack if metrics is None else metrics.whiten(stack)
    found = hooi(whitened, hosvd(whitened, ranks), progress, tolerance)
    return found if metrics is None else metrics.unwhiten(found)


def hosvd(stack: torch.Tensor, ranks: TuckerRanks) -> Tucker:
    """The higher-order singular value decomposition of (B, m, n), cut to `ranks`.

    The factor of each mode is made of the leading eigenvectors of that mode's Gram matrix (m x m, n x n and B x B), so
    that no unfolding is copied and the largest decomposition is of the size of a block. The squared error is at most
    the sum of the eigenvalues cut off (De Lathauwer et al., SIAM J. Matrix Anal. Appl. 2000).
    """
    left, right = _leading(_left_gram(stack), ranks.left), _leading(_right_gram(stack), ranks.right)
    mixing = None if ranks.bank is None else _leading(bank_gram(stack), ranks.bank)
    mixed = stack if mixing is None else torch.tensordot(mixing.T, stack, dims=1)
    return Tucker(left, right, left.T @ mixed @ right, mixing)


def hooi(
    stack: torch.Tensor, start: Tucker, progress: Progress = no_progress, tolerance: float = _TOLERANCE
) -> Tucker:
    """Higher-order orthogonal iteration: each factor in turn is made the best for the others.

    The error `||W||^2 - ||core||^2` never grows. Blocks are mixed down to the bank before they are multiplied by a
    factor, so that a sweep costs a fraction of the product of all modes (De Lathauwer et al., 2000, part II).
    """
    found, total = start, float(_energy(stack))
    captured = float(_energy(found.core))
    for _ in progress(range(_MOST_SWEEPS), "decomposing"):
        improved = _sweep(stack, found)
        gained = float(_energy(improved.core)) - captured
        if gained > 0:  # within rounding of the optimum it may not be
            found, captured = improved, captured + gained
        if gained <= tolerance * total:
            break
    return found


def refitted(
    weight: torch.Tensor, layout: BlockLayout, left: torch.Tensor, right: torch.Tensor, metric: Metric
) -> torch.Tensor:
    """The own matrices of the blocks of one weight (O, I) that are best between given factors, (p, rl, rr).

    With `F` and `G` the factors on the sides of its inputs and of its outputs, one copy for each row or column of the
    grid, `tr((W - G M F^T) C (W - G M F^T)^T)` is least at `M = G^T W C F (F^T C F)^-1`: exact in the metric `C` of
    all inputs of this very weight, where the decomposition knows one metric for all blocks.

    Args:
        left: Factor with orthonormal columns, as `right`.
        metric: Of the inputs, of those too that are missing from the last block.
    """
    blocks = cut_blocks(weight.to(left.dtype), layout)
    rows, columns = layout.grid
    if layout.input_side == "left":
        factor, projected = torch.block_diag(*[left] * rows), blocks @ right
    else:
        factor, projected = torch.block_diag(*[right] * columns), left.T @ blocks
    wanted = join_blocks(projected, layout.of_blocks(*projected.shape[1:]))  # G^T W
    basis, triangle = torch.linalg.qr(metric.rooted(factor))
    found = torch.linalg.solve_triangular(triangle, basis.T @ metric.rooted(wanted.T), upper=True)  # M^T
    return cut_blocks(found.T.to(left.dtype), layout.of_blocks(left.shape[1], right.shape[1]))


def orthonormal(found: Tucker) -> Tucker:
    """The same blocks by factors with orthonormal columns, their triangular parts in the core.

    Training needs it: factors as large as an inverse covariance makes them leave the core with gradients of 1e3.
    """
    left, from_left = torch.linalg.qr(found.left)
    right, from_right = torch.linalg.qr(found.right)
    core = from_left @ found.core @ from_right.T
    if found.mixing is None:
        return Tucker(left, right, core)
    mixing, from_mixing = torch.linalg.qr(found.mixing)
    return Tucker(left, right, torch.tensordot(from_mixing, core, dims=1), mixing)


def captured_energy(stack: torch.Tensor, lefts: Sequence[int], rights: Sequence[int]) -> torch.Tensor:
    """`||core||^2` of `hosvd(stack, ranks)` for many ranks of (B, m, n): corners of the one core of full ranks.

    Shapes:
        found  (B, len(lefts), len(rights)), float64, by the size of the bank minus one and the ranks on either side
    """
    num_blocks, height, width = stack.shape
    full = hosvd(stack, TuckerRanks(height, width, num_blocks))
    rows, columns = torch.as_tensor(lefts) - 1, torch.as_tensor(rights) - 1
    corners = [part.double().square().cumsum(0)[rows].cumsum(1)[:, columns] for part in full.core.cpu()]
    return torch.stack(corners).cumsum(0)


def relative_error(stack: torch.Tensor, found: Tucker) -> float:
    """`||W - W'||_F / ||W||_F` over all blocks, one block at a time."""
    cores = found.cores()
    lost = sum(
        float(_energy(block - found.left @ core @ found.right.T)) for block, core in zip(stack, cores, strict=True)
    )
    total = float(_energy(stack))
    return (lost / total) ** 0.5 if total > 0 else 0.0


def _sweep(stack: torch.Tensor, found: Tucker) -> Tucker:
    """One better left factor, right factor and bank; the core follows from the last."""
    mixed = stack if found.mixing is None else torch.tensordot(found.mixing.T, stack, dims=1)  # (K, m, n)
    left = _leading(_left_gram(mixed @ found.right), found.left.shape[1])
    half = left.T @ mixed  # (K, rl, n)
    right = _leading(_right_gram(half), found.right.shape[1])
    if found.mixing is None:
        return Tucker(left, right, half @ right)
    del mixed, half
    cores = torch.stack([left.T @ block @ right for block in stack])  # (B, rl, rr)
    mixing = _leading(bank_gram(cores), found.mixing.shape[1])
    return Tucker(left, right, torch.tensordot(mixing.T, cores, dims=1), mixing)


def _left_gram(stack: torch.Tensor) -> torch.Tensor:
    """`sum_k X_k X_k^T`, (m, m)."""
    gram = stack.new_zeros(stack.shape[1], stack.shape[1])
    for block in stack:
        gram.addmm_(block, block.T)
    return gram


def _right_gram(stack: torch.Tensor) -> torch.Tensor:
    """`sum_k X_k^T X_k`, (n, n): one product of the unfolding, which needs no copy."""
    tall = stack.reshape(-1, stack.shape[2])
    return tall.T @ tall


def bank_gram(stack: torch.Tensor) -> torch.Tensor:
    """Inner products of the blocks, (B, B)."""
    flat = stack.reshape(len(stack), -1)
    return flat @ flat.T


def _leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The eigenvectors of the `rank` largest eigenvalues of a symmetric matrix, found in float64."""
    vectors: torch.Tensor = torch.linalg.eigh(gram.double()).eigenvectors
    return vectors[:, -rank:].flip(1).to(gram.dtype)


def _energy(tensor: torch.Tensor) -> torch.Tensor:
    # Row by row: a float64 sum of squares without a float64 copy of all.
    return torch.stack([part.double().square().sum() for part in tensor]).sum()
