"""Multiply-adds of models, dense or compressed."""

from typing import Any

from torch import nn

from hf_lowrank.remote_code.lowrank_dense import dense_kind, dense_shape
from hf_lowrank.remote_code.lowrank_structures import named_shared_parts, named_structures


def count_multiply_adds(model: nn.Module) -> int:
    """Multiply-adds for one token of all matrix products with weights."""
    ours = multiplying(model)
    inside = {id(part) for structure in ours for part in structure.modules()}
    dense = (module for module in model.modules() if id(module) not in inside and dense_kind(module) == "linear")
    total = sum(rows * columns for rows, columns in map(dense_shape, dense))
    return total + sum(int(structure.multiply_adds()) for structure in ours)


def multiplying(model: nn.Module) -> list[Any]:
    """Everything of ours that multiplies: the structures and the parts they share."""
    return [module for _, module in [*named_shared_parts(model), *named_structures(model)]]
