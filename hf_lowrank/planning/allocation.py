"""How a budget is shared among matrices: one function an allocation, one row of `ALLOCATIONS` each."""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hf_lowrank.planning.curves import Curve

Choices = list[int]

_MOST_EXCHANGES = 20


def uniform(curves: Sequence[Curve], budget: float) -> Choices:
    """The same fraction of every matrix; where that would not make it faster, some stay dense and the rest gives more.

    The smallest matrices are the first to stay dense: they gain the least speed.
    """
    order = sorted(range(len(curves)), key=lambda index: curves[index].dense_cost)
    num_dense = 0
    while num_dense < len(order) and _uniform_cost(curves, order[:num_dense], 1.0) < budget:
        num_dense += 1
    dense = order[:num_dense]
    while dense and _uniform_cost(curves, dense, 0.0) > budget:
        dense.pop()
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _uniform_cost(curves, dense, middle) <= budget else (low, middle)
    choices = _uniform_choices(curves, dense, low)
    ranked = [index for index in range(len(curves)) if index not in dense]
    return _fill(curves, choices, budget, ranked)


def least_error(curves: Sequence[Curve], budget: float) -> Choices:
    """The choices with the least total error that fit: one threshold on error saved per unit of cost, for all.

    Lagrangian bisection, `min sum error + price * cost`, then the spare budget goes where it saves most, then pairs of
    matrices exchange budget while that helps (staying dense is a jump, which no price alone can weigh). With errors
    from spectra the threshold is one on the squared singular values over all matrices.
    """
    low, high = 0.0, 1.0
    while _total(curves, _cheapest(curves, high)) > budget:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _total(curves, _cheapest(curves, middle)) > budget else (low, middle)
    choices = _fill(curves, _cheapest(curves, high), budget, range(len(curves)), may_turn_dense=True)
    for _ in range(_MOST_EXCHANGES):
        better = _exchange(curves, choices, budget)
        if better is None:
            break
        choices = _fill(curves, better, budget, range(len(curves)), may_turn_dense=True)
    return choices


def settled(options: Sequence[Sequence[Sequence[Curve]]], budget: float) -> list[Curve]:
    """Out of several ways to hold the same matrices, the one with the least error at the price the budget sets.

    Args:
        options: One entry for what is decided on its own: the ways to choose from, and of each way its curves.
    """
    low, high = 0.0, 1.0
    while _total_of(_settled_at(options, high), high) > budget:
        high *= 4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _total_of(_settled_at(options, middle), middle) > budget else (low, middle)
    return _settled_at(options, high)


@dataclass(frozen=True)
class Allocation:
    """A way to share a budget.

    Args:
        choose: From curves and a budget in the unit of their costs to one choice per curve; never above the budget.
        errors: Where the curves' errors come from: `none`, `spectra` (see `spectral_errors`), `curvature` (see
            `predicted_errors`) or `probes`, one short run of the model a matrix (see `measured_errors`), whose outcome
            is also compared with those of `curvature` and `uniform` on the whole model.
    """

    choose: Callable[[Sequence[Curve], float], Choices]
    errors: str


ALLOCATIONS: dict[str, Allocation] = {
    "uniform": Allocation(uniform, errors="none"),
    "energy": Allocation(least_error, errors="spectra"),
    "first_order": Allocation(least_error, errors="curvature"),
    "measured": Allocation(least_error, errors="probes"),
}


def _settled_at(options: Sequence[Sequence[Sequence[Curve]]], price: float) -> list[Curve]:
    def value(curves: Sequence[Curve]) -> float:
        return sum(float(np.min(curve.errors + price * curve.costs)) for curve in curves)

    return [curve for ways in options for curve in min(ways, key=value)]


def _total_of(curves: Sequence[Curve], price: float) -> float:
    return _total(curves, _cheapest(curves, price))


def _total(curves: Sequence[Curve], choices: Choices) -> float:
    return float(sum(curve.costs[choice] for curve, choice in zip(curves, choices, strict=True)))


def _uniform_choices(curves: Sequence[Curve], dense: list[int], fraction: float) -> Choices:
    return [
        curve.dense if index in dense else curve.rank_for(fraction * curve.dense_cost)
        for index, curve in enumerate(curves)
    ]


def _uniform_cost(curves: Sequence[Curve], dense: list[int], fraction: float) -> float:
    return _total(curves, _uniform_choices(curves, dense, fraction))


def _cheapest(curves: Sequence[Curve], price: float) -> Choices:
    # Ties go to the cheaper choice: the first minimum along increasing costs.
    return [int(np.argmin(curve.errors + price * curve.costs)) for curve in curves]


def _fill(
    curves: Sequence[Curve], choices: Choices, budget: float, among: Sequence[int], may_turn_dense: bool = False
) -> Choices:
    """Raise ranks one by one while the budget allows, the step that saves most error per cost first.

    Among equals the matrix that is left with the smallest fraction is first, so that a uniform plan stays uniform.
    """
    spare = budget - _total(curves, choices)
    last = [curve.dense - (not may_turn_dense or np.isinf(curve.errors[-1])) for curve in curves]
    queue = [_step(curves[index], choices[index], index) for index in among if choices[index] < last[index]]
    heapq.heapify(queue)
    while queue:
        *_, index = heapq.heappop(queue)
        costs = curves[index].costs
        cost = float(costs[choices[index] + 1] - costs[choices[index]])
        if cost > spare:
            continue
        spare -= cost
        choices[index] += 1
        if choices[index] < last[index]:
            heapq.heappush(queue, _step(curves[index], choices[index], index))
    return choices


def _exchange(curves: Sequence[Curve], choices: Choices, budget: float) -> Choices | None:
    """The choices after the best move of budget from one matrix to another, None if no move saves error."""
    spare = budget - _total(curves, choices)
    best, found = 1e-12, None
    for giver, giving in enumerate(curves):
        freed = spare + giving.costs[choices[giver]] - giving.costs[: choices[giver]]  # at each lower choice
        lost = giving.errors[: choices[giver]] - giving.errors[choices[giver]]
        for taker, taking in enumerate(curves):
            if taker == giver or not len(freed):
                continue
            reach = np.searchsorted(taking.costs, taking.costs[choices[taker]] + freed, side="right") - 1
            saved = taking.errors[choices[taker]] - taking.errors[reach] - lost
            lower = int(np.argmax(saved))
            if saved[lower] > best:
                best, found = float(saved[lower]), (giver, lower, taker, int(reach[lower]))
    if found is None:
        return None
    giver, lower, taker, higher = found
    changed = list(choices)
    changed[giver], changed[taker] = lower, higher
    return changed


def _step(curve: Curve, choice: int, index: int) -> tuple[float, float, int]:
    cost = float(curve.costs[choice + 1] - curve.costs[choice])
    saved = float(curve.errors[choice] - curve.errors[choice + 1])
    return -saved / max(cost, 1e-12), float(curve.costs[choice + 1]) / curve.dense_cost, index
