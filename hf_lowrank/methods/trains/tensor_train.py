"""Tensor trains: one matrix, or the same matrix of many layers, as a product of three small tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hf_lowrank.errors import InputError
from hf_lowrank.remote_code.lowrank_tensor_train import factor_shape

Metrics = tuple[torch.Tensor | None, torch.Tensor | None]

_CONJUGATE_STEPS = 30
_MOST_SWEEPS = 60
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class TensorTrain:
    """A matrix product operator of three cores.

    With outputs `o = (o_1, o_2, o_3)` and inputs `i = (i_1, i_2, i_3)` counted in mixed radix,
    `W[o, i] = first[o_1, i_1, :] central[:, o_2, i_2, :] last[:, o_3, i_3]`.

    Shapes:
        first    (o_1, i_1, L)
        central  (L, o_2, i_2, R)
        last     (R, o_3, i_3)

    Args:
        shape: `(O, I)`; what the cores hold beyond it is filling.
    """

    first: torch.Tensor
    central: torch.Tensor
    last: torch.Tensor
    shape: tuple[int, int]

    @property
    def ranks(self) -> tuple[int, int]:
        """`(L, R)`."""
        return self.central.shape[0], self.central.shape[3]

    def matrix(self) -> torch.Tensor:
        """The matrix itself, (O, I)."""
        whole = torch.einsum("oia,apqb,bst->opsiqt", self.first, self.central, self.last)
        rows, columns = whole.shape[0] * whole.shape[1] * whole.shape[2], whole[0, 0, 0].numel()
        return whole.reshape(rows, columns)[: self.shape[0], : self.shape[1]]


def modes(weight: torch.Tensor) -> torch.Tensor:
    """The matrix (O, I), filled up with zeros, as a tensor of three modes (o_1 i_1, o_2 i_2, o_3 i_3)."""
    outputs, inputs = factor_shape(weight.shape[0]), factor_shape(weight.shape[1])
    whole = weight.new_zeros(_product(outputs), _product(inputs))
    whole[: weight.shape[0], : weight.shape[1]] = weight
    split = whole.reshape(*outputs, *inputs).permute(0, 3, 1, 4, 2, 5)
    return split.reshape(*(o * i for o, i in zip(outputs, inputs, strict=True)))


def cut_spectra(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values at the two cuts of the train, float64: the ranks an exact one needs, and what fewer lose."""
    tensor = modes(weight).double()
    return torch.linalg.svdvals(tensor.flatten(1)), torch.linalg.svdvals(tensor.flatten(0, 1))


def tensor_train(weight: torch.Tensor, ranks: Sequence[int], metrics: Metrics = (None, None)) -> TensorTrain:
    """The tensor train of a weight (O, I) by successive truncated SVDs (TT-SVD: Oseledets, SIAM J. Sci. Comput. 2011).

    The squared error is at most the sum of what the two cuts discard, and at most twice that of the best train of
    these ranks. With metrics, the cores are then made the best for each other under
    `tr(G (W - W') C (W - W')^T)`, one after the other: whitening would not leave a train.

    Args:
        ranks: `(L, R)`.
        metrics: `G` (O, O) and `C` (I, I); None is the identity.

    Raises:
        InputError: If a rank is out of bounds.
    """
    tensor = modes(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    sizes = factor_shape(weight.shape[0]), factor_shape(weight.shape[1])
    left, right = _checked(ranks, tensor.shape)
    vectors, values, rest = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    remainder = (values[:left, None] * rest[:left]).reshape(left * tensor.shape[1], tensor.shape[2])
    second, values, rest = torch.linalg.svd(remainder, full_matrices=False)
    second, rest = second[:, :right] * values[:right].sqrt(), values[:right, None].sqrt() * rest[:right]
    found = _as_train(vectors[:, :left], second.reshape(left, -1, right), rest, sizes, weight.shape)
    return found if metrics == (None, None) else _fitted(found, weight, metrics)


def shared_tensor_trains(weights: Sequence[torch.Tensor], ranks: Sequence[int]) -> list[TensorTrain]:
    """Tensor trains of several matrices (O, I) with one central core in common, by alternating least squares.

    The central core holds most of the numbers; what sets the matrices apart is in the outer ones (MPOBERT: Liu et al.,
    Findings of EMNLP 2023). Every step is the least-squares solution for one of the three, so the error never grows.
    It starts at the train of the mean singular directions: the first matrix' own central core.
    """
    stack = torch.stack([modes(w.to(torch.promote_types(w.dtype, torch.float32))) for w in weights])  # (B, p, c, s)
    sizes = factor_shape(weights[0].shape[0]), factor_shape(weights[0].shape[1])
    start = tensor_train(weights[int(stack.flatten(1).norm(dim=1).argmax())], ranks)
    central = start.central.flatten(1, 2)  # (L, c, R)
    last = start.last.flatten(1).expand(len(stack), -1, -1)
    first, error, total = None, float("inf"), float(stack.square().sum())
    for _ in range(_MOST_SWEEPS):
        first = _solved_first(stack, central, last)
        last = _solved_last(stack, central, first)
        central = _solved_central(stack, first, last, central)
        lost = float((stack - torch.einsum("bpl,lcr,brs->bpcs", first, central, last)).square().sum())
        if error - lost <= _TOLERANCE * total:
            break
        error = lost
    first = _solved_first(stack, central, last)
    shape = weights[0].shape
    return [_as_train(a, central, z, sizes, shape) for a, z in zip(first, last, strict=True)]


def _solved_first(stack: torch.Tensor, central: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    frame = torch.einsum("lcr,brs->blcs", central, last).flatten(2)  # (B, L, c s)
    solution: torch.Tensor = torch.linalg.lstsq(frame.mT, stack.flatten(2).mT).solution  # (B, L, p)
    return solution.mT


def _solved_last(stack: torch.Tensor, central: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    frame = torch.einsum("bpl,lcr->bpcr", first, central).flatten(1, 2)  # (B, p c, R)
    solution: torch.Tensor = torch.linalg.lstsq(frame, stack.flatten(1, 2)).solution  # (B, R, s)
    return solution


def _solved_central(stack: torch.Tensor, first: torch.Tensor, last: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    target = torch.einsum("bpl,bpcs,brs->lcr", first, stack, last)
    firsts, lasts = first.mT @ first, last @ last.mT  # (B, L, L), (B, R, R)
    return _conjugate_gradients(lambda core: torch.einsum("blm,mcq,bqr->lcr", firsts, core, lasts), target, start)


def _fitted(found: TensorTrain, weight: torch.Tensor, metrics: Metrics) -> TensorTrain:
    """One core after the other, there and back, as the minimizer of the error in the metrics."""
    cores = [found.first, found.central, found.last]
    for index in (1, 0, 1, 2, 1):

        def product(core: torch.Tensor, index: int = index) -> torch.Tensor:
            parts = [core if position == index else other for position, other in enumerate(cores)]
            return TensorTrain(parts[0], parts[1], parts[2], found.shape).matrix()

        def adjoint(matrix: torch.Tensor, index: int = index) -> torch.Tensor:
            probe = torch.zeros_like(cores[index]).requires_grad_()
            with torch.enable_grad():
                value = product(probe, index)
            return torch.autograd.grad(value, probe, _measured(matrix, metrics))[0]

        cores[index] = _conjugate_gradients(
            lambda core: adjoint(product(core)), adjoint(weight.to(cores[index])), cores[index]
        )
    return TensorTrain(cores[0], cores[1], cores[2], found.shape)


def _measured(matrix: torch.Tensor, metrics: Metrics) -> torch.Tensor:
    output_metric, input_metric = metrics
    matrix = matrix if output_metric is None else output_metric.to(matrix) @ matrix
    return matrix if input_metric is None else matrix @ input_metric.to(matrix)


def _conjugate_gradients(
    operator: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """Towards the solution of `operator(x) = target`, symmetric and positive: no step makes the quadratic larger."""
    solution, residual = start, target - operator(start)
    direction, size = residual, residual.square().sum()
    for _ in range(_CONJUGATE_STEPS):
        if size <= torch.finfo(size.dtype).eps ** 2 * target.square().sum():
            break
        image = operator(direction)
        curvature = (direction * image).sum()
        if curvature <= 0:
            break
        step = size / curvature
        solution, residual = solution + step * direction, residual - step * image
        previous, size = size, residual.square().sum()
        direction = residual + size / previous * direction
    return solution


def _as_train(
    first: torch.Tensor,
    central: torch.Tensor,
    last: torch.Tensor,
    sizes: tuple[tuple[int, ...], tuple[int, ...]],
    shape: Sequence[int],
) -> TensorTrain:
    """Cores with one index a mode, (p, L), (L, c, R) and (R, s), as cores with an output and an input index each."""
    pairs = list(zip(*sizes, strict=True))
    return TensorTrain(
        first.reshape(*pairs[0], -1),
        central.reshape(len(central), *pairs[1], -1),
        last.reshape(-1, *pairs[2]),
        (shape[0], shape[1]),
    )


def _checked(ranks: Sequence[int], sizes: Sequence[int]) -> tuple[int, int]:
    """Two ranks within the bounds that three modes of these sizes set."""
    if len(ranks) != 2:
        raise InputError(f"ranks of a tensor train are two (left, right), got {len(ranks)}.")
    left, right = ranks
    bounds = {"left": (left, min(sizes[0], sizes[1] * sizes[2])), "right": (right, min(sizes[2], sizes[0] * sizes[1]))}
    for name, (rank, bound) in bounds.items():
        if not 1 <= rank <= bound:
            raise InputError(f"The {name} rank must be between 1 and {bound} for modes {tuple(sizes)}, got {rank}.")
    return left, right


def _product(sizes: Sequence[int]) -> int:
    return int(torch.tensor(sizes).prod())
