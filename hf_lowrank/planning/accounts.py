"""What a budget comes to: a price for every choice, and how much there is to spend."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_lowrank.hosts.latency import measure_latency, typical_length
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.planning.budgets import Budget
from hf_lowrank.planning.prices import FilePrice, Price, WeightPrice
from hf_lowrank.planning.sizes import overhead_bytes, parameter_bytes
from hf_lowrank.planning.timing import LayerTimes
from hf_lowrank.progress import Progress

_BATCH_SIZE = 8


@dataclass(frozen=True)
class Account:
    """What a budget comes to in one unit: parameters, bytes or seconds.

    Args:
        whole: What the budget's fraction is of.
        fixed: What of it is not up to the plan.
        limit: What the whole may cost.
    """

    price: Price
    whole: float
    fixed: float
    limit: float


def make_account(
    model: PreTrainedModel,
    matrices: Sequence[DenseMatrix],
    budget: Budget,
    number_bytes: float,
    structures: Sequence[str],
    progress: Progress,
) -> Account:
    """The account of a budget that is not a rank.

    Args:
        matrices: All that the targets speak of.
        number_bytes: What a number takes in the compressed model.
        structures: All that may come into the plan, that of low-rank linear layers first: what time they take, and
            how much code is saved with them.
    """
    num_dense = sum(matrix.num_weights for matrix in matrices)
    if budget.kind == "keep_targets":
        return Account(WeightPrice(1), num_dense, 0, math.floor(budget.value * num_dense))
    if budget.kind == "keep_params":
        whole = sum(p.numel() for p in model.parameters())
        return Account(WeightPrice(1), whole, whole - num_dense, math.floor(budget.value * whole))
    if budget.kind == "keep_latency":
        length = typical_length(model)
        times = LayerTimes(matrices, structures[:1], _BATCH_SIZE * length, progress)
        seconds = measure_latency({"dense": model}, _BATCH_SIZE, length)["dense"].median
        layers = sum(times.of_dense(matrix) for matrix in matrices)
        return Account(times, seconds, max(seconds - layers, 0.0), budget.value * seconds)
    size = parameter_bytes(model) / model.dtype.itemsize * number_bytes
    fixed = size - num_dense * number_bytes + overhead_bytes(model, structures)
    return Account(FilePrice(number_bytes), size, fixed, budget.value)
