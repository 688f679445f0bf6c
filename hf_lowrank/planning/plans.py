"""What every plan is made of, whatever method makes it."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.hosts.targets import OUTPUT_EMBEDDINGS
from hf_lowrank.hosts.untouched import largest_others
from hf_lowrank.planning.accounts import Account
from hf_lowrank.planning.budgets import Budget
from hf_lowrank.remote_code.lowrank_plan import Plan, Spec


def as_plan(specs: dict[str, Spec], shared: dict[str, Spec], kept_dense: dict[str, Any]) -> Plan:
    """The plan of these specs, with its record of what stays dense and why."""
    plan: Plan = {
        "format_version": 1,
        "modules": {name: spec for name, spec in specs.items() if name != OUTPUT_EMBEDDINGS},
        "provenance": {"kept_dense": kept_dense},
    }
    if shared:
        plan["shared"] = shared
    if OUTPUT_EMBEDDINGS in specs:
        plan["output_embeddings"] = specs[OUTPUT_EMBEDDINGS]
    return plan


def specs_of(plan: Plan) -> dict[str, Spec]:
    """The spec of every replaced matrix by its name."""
    return {**plan["modules"], OUTPUT_EMBEDDINGS: plan.get("output_embeddings")}


def out_of_reach(
    budget: Budget, account: Account, least: float, model: PreTrainedModel, matrices: Sequence[DenseMatrix]
) -> str:
    """What to say where not even the smallest replacement, of cost `least`, fits the budget.

    Args:
        matrices: All that it can reach.
    """
    smallest = account.fixed + least
    if budget.kind == "target_size":
        reachable, asked = f"{math.ceil(smallest / 1e4) / 100:.2f}MB", f"{budget.value / 1e6:.2f}MB"
    else:
        reachable, asked = f"{math.ceil(smallest / account.whole * 1e4) / 1e4:.4f}", f"{budget.value:g}"
    others = largest_others(model, matrices) if account.fixed else []
    beyond = f" It cannot reach {' and '.join(others)}." if others else ""
    return (
        f"{budget.kind}={asked} is out of reach: the smallest model with these targets is {reachable}.{beyond} "
        "Raise the budget, or let more modules be compressed."
    )


def require_in_memory(matrices: Sequence[DenseMatrix]) -> None:
    """Raise `InputError` at a weight that is not in memory."""
    for matrix in matrices:
        weight: Any = matrix.module.weight
        if weight.device.type == "meta":
            raise InputError(f"The weight of {matrix.path!r} is not in memory. Load the model without offloading.")
