"""Multiply-adds of models, dense or compressed."""

import math
from typing import Any

from torch import nn

from hf_lowrank.remote_code.lowrank_dense import dense_kind, dense_shape, named_dense
from hf_lowrank.remote_code.lowrank_structures import named_shared_parts, named_structures


def count_multiply_adds(model: nn.Module) -> int:
    """Multiply-adds for one token of all matrix products with weights."""
    ours = multiplying(model)
    inside = {id(part) for structure in ours for part in structure.modules()}
    dense = (module for _, module in named_dense(model) if id(module) not in inside)
    return sum(map(dense_multiply_adds, dense)) + sum(int(structure.multiply_adds()) for structure in ours)


def dense_multiply_adds(part: Any) -> int:
    """Those for one token of a host's module, or of what a structure stands for; of experts, those a token goes to."""
    hosts = getattr(part, "HOSTS", None)
    if hosts is not None:
        return 0 if hosts == "embedding" else int(getattr(part, "num_active", 1)) * math.prod(shape_of(part)[-2:])
    kind = dense_kind(part)
    # Routers of mixtures are linear layers of the hosts' own.
    if kind == "linear" or (kind is None and type(part).__name__.endswith("Router") and hasattr(part, "weight")):
        return math.prod(dense_shape(part))
    return int(part.num_active) * math.prod(dense_shape(part)) if kind == "experts" else 0


def multiplying(model: nn.Module) -> list[Any]:
    """Everything of ours that multiplies: the structures and the parts they share."""
    return [module for _, module in [*named_shared_parts(model), *named_structures(model)]]


def shape_of(part: Any) -> tuple[int, ...]:
    """The shape of the weight a structure stands for, `(E, O, I)` of experts; of a shared part its own."""
    kind = getattr(part, "HOSTS", None)
    if kind is None:
        return part.shape[0], part.shape[1]
    if kind == "embedding":
        return part.num_embeddings, part.embedding_dim
    return *((part.num_experts,) if kind == "experts" else ()), part.out_features, part.in_features
