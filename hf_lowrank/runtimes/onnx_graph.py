"""What is done to a traced graph of ONNX: what is there twice becomes one, and every product one kind of node."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

# Nodes that give something else each time.
_DRAWN = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


def tidied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph with each number and each computation once, and products of matrices as `MatMul` alone.

    Tracing writes a product that several layers share once for each of them, and constants by the hundred.
    """
    graph = model.graph
    weights = {one.name: one for one in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            made = onnx.TensorProto()
            made.CopyFrom(node.attribute[0].t)
            made.name = node.output[0]
            weights[made.name] = made
        elif node.op_type == "Gemm" and (pair := _as_product(node, weights)):
            nodes += pair
        else:
            nodes.append(node)
    rebuild_(graph, _once(nodes, weights, {one.name for one in graph.output}), weights.values())
    return model


def rebuild_(graph: Any, nodes: Iterable[Any], weights: Iterable[Any]) -> None:
    """Give a graph these nodes, and of the weights those that are used."""
    kept = [_copied(node) for node in nodes]
    used = {name for node in kept for name in node.input} | {one.name for one in graph.output}
    held = [_copied(weight) for weight in weights if weight.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(held)


def _as_product(node: Any, weights: dict[str, Any]) -> list[Any]:
    """`MatMul` and `Add` for a `Gemm` of a linear layer; nothing for any other."""
    said = {one.name: one.f or one.i for one in node.attribute}
    weight = weights.get(node.input[1])
    if weight is None or said.get("alpha", 1.0) != 1 or said.get("beta", 1.0) != 1 or said.get("transA", 0):
        return []
    values = numpy_helper.to_array(weight)
    turned = numpy_helper.from_array(np.ascontiguousarray(values.T if said.get("transB") else values))
    turned.name = f"{node.input[1]}_{node.name}_columns"
    weights[turned.name] = turned
    has_bias = len(node.input) > 2
    product = f"{node.output[0]}_product" if has_bias else node.output[0]
    made = [onnx.helper.make_node("MatMul", [node.input[0], turned.name], [product], name=f"{node.name}/MatMul")]
    if has_bias:
        made.append(onnx.helper.make_node("Add", [product, node.input[2]], [*node.output], name=f"{node.name}/Add"))
    return made


def _once(nodes: Iterable[Any], weights: dict[str, Any], outputs: set[str]) -> list[Any]:
    """The nodes without those that compute what an earlier one does."""
    instead: dict[str, str] = _same(weights)
    seen: dict[Any, Any] = {}
    kept = []
    for node in nodes:
        node.input[:] = [instead.get(name, name) for name in node.input]
        if node.op_type == "Identity" and node.output[0] not in outputs:
            instead[node.output[0]] = node.input[0]
            continue
        about = tuple(sorted(one.SerializeToString(deterministic=True) for one in node.attribute))
        key = node.domain, node.op_type, *node.input, about, len(node.output)
        first = seen.setdefault(key, node)
        if first is node or node.op_type in _DRAWN or outputs & {*node.output}:
            kept.append(node)
        else:
            instead |= dict(zip(node.output, first.output, strict=True))
    return kept


def _same(weights: dict[str, Any]) -> dict[str, str]:
    """Name of a weight -> name of the first one with the same numbers, if it is another."""
    first: dict[Any, str] = {}
    found = {}
    for name, weight in weights.items():
        values = numpy_helper.to_array(weight)
        key = weight.data_type, values.shape, hashlib.sha256(np.ascontiguousarray(values).data).digest()
        if first.setdefault(key, name) != name:
            found[name] = first[key]
    return found


def _copied(one: Any) -> Any:
    made = type(one)()
    made.CopyFrom(one)
    return made
