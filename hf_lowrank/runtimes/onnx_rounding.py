"""Matrices of a graph of ONNX in whole numbers: rounded here, or as the model holds them."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from hf_lowrank.runtimes.onnx_graph import rebuild_
from hf_lowrank.runtimes.options import INT4, INT8
from hf_lowrank.runtimes.stored import StoredGrid

# Smaller matrices cost nothing, and their rounding is felt.
_LEAST_NUMBERS = 1024
_LARGEST = 127
# Of a row of 4 bits numbers share a step by so many.
_GROUP = 32
_CONTRIB = "com.microsoft"
# Of products of 4 bits: inputs in 8 bits, sums in whole numbers.
_ACCURACY = 4

Array = NDArray[Any]


def rounded(
    model: onnx.ModelProto, precision: str, stored: Sequence[StoredGrid] = (), is_dynamic: bool = True
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A graph whose large matrices and tables are whole numbers and steps, and what could not be.

    `int8` has a step for each output of a matrix and each row of a table, `int4` one for each 32 inputs; `as-stored`
    the steps of the model's own rounding, `W[i, j] = rows[i] * codes[i, j] * columns[j]`, where the columns scale the
    inputs. Inputs are rounded to 8 bits when they are seen, once for all matrices that read the same.

    Args:
        stored: What the model's matrices were rounded to.
        is_dynamic: Whether products are of whole numbers; else the matrix is scaled first, for runtimes that know
            that pattern and do what is best.
    """
    return _Rounding(model, precision, stored, is_dynamic).run()


class _Rounding:
    """The pass over one graph."""

    def __init__(self, model: onnx.ModelProto, precision: str, stored: Sequence[StoredGrid], is_dynamic: bool) -> None:
        self.model = model
        self.precision = precision
        self.is_dynamic = is_dynamic
        self.weights = {one.name: one for one in model.graph.initializer}
        self.grids: dict[bytes, tuple[StoredGrid, bool]] = {}
        for grid in stored:
            self.grids[_digest(grid.matrix)] = grid, False
            self.grids[_digest(grid.matrix.T)] = grid, True
        self.nodes: list[Any] = []
        self.made: dict[Any, Any] = {}
        self.notes: dict[str, None] = {}

    def run(self) -> tuple[onnx.ModelProto, tuple[str, ...]]:
        """The rounded graph and the notes."""
        for node in self.model.graph.node:
            if not self._replaced(node):
                self.nodes.append(node)
        rebuild_(self.model.graph, self.nodes, self.weights.values())
        if any(node.domain == _CONTRIB for node in self.nodes):
            self.model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
        return self.model, tuple(self.notes)

    def _replaced(self, node: Any) -> bool:
        """Whether other nodes have been put in the place of one."""
        place = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        weight = None if place is None else self.weights.get(node.input[place])
        if weight is None or weight.data_type != TensorProto.FLOAT or len(weight.dims) != 2:
            return False
        if weight.dims[0] * weight.dims[1] < _LEAST_NUMBERS:
            return False
        values = numpy_helper.to_array(weight)
        emit = self._product if node.op_type == "MatMul" else self._look_up
        if self.precision == INT4:
            (self._narrow_product if node.op_type == "MatMul" else self._narrow_look_up)(node, values)
            return True
        if self.precision == INT8:
            axis = 0 if node.op_type == "MatMul" else 1  # a step for each output, or for each row
            codes, steps = _in_eight_bits(values, axis)
            emit(node, codes, steps, None)
            return True
        return self._as_stored(node, values, emit)

    def _as_stored(self, node: Any, values: Array, emit: Callable[..., None]) -> bool:
        grid, is_turned = self.grids.get(_digest(values), (None, False))
        name = node.name.strip("/").replace("/", ".").rpartition(".")[0]
        if grid is None:
            self.notes[f"{name}: in float32, as it is not stored as a matrix that {node.op_type} could use"] = None
            return False
        if max(-int(grid.codes.min()) - 1, int(grid.codes.max())) > _LARGEST:
            self.notes[f"{name}: in float32, as its stored numbers take more than 8 bits"] = None
            return False
        codes = grid.codes.astype(np.int8)
        if node.op_type == "Gather" and not is_turned:
            emit(node, codes, grid.rows[:, None], grid.columns)
        elif node.op_type == "MatMul":  # (I, O): of a matrix (O, I) turned, or of a table's decoder as it is
            rows, columns = (grid.rows, grid.columns) if is_turned else (grid.columns, grid.rows)
            emit(node, np.ascontiguousarray(codes.T if is_turned else codes), rows[None], columns)
        else:
            return False
        return True

    def _product(self, node: Any, codes: Array, steps: Array, columns: Array | None) -> None:
        given = self._scaled(node.input[0], columns)
        if not self.is_dynamic:
            names = [self._held(codes), self._held(steps[0])]
            weight = self._added("DequantizeLinear", names, axis=1)
            self._end("MatMul", [given, weight], node)
            return
        if ("rounded", given) not in self.made:
            names = [f"{given}_{part}" for part in ("codes", "step", "zero")]
            self.nodes.append(helper.make_node("DynamicQuantizeLinear", [given], names))
            self.made["rounded", given] = names
        whole, step, zero = self.made["rounded", given]
        total = self._added("MatMulInteger", [whole, self._held(codes), zero])
        scale = self._added("Mul", [step, self._held(steps[0])])
        self._end("Mul", [self._added("Cast", [total], to=TensorProto.FLOAT), scale], node)

    def _look_up(self, node: Any, codes: Array, steps: Array, columns: Array | None) -> None:
        """Rows of a table: `steps[i] * codes[i, j] * columns[j]`."""
        found, step = (self._added("Gather", [self._held(part), node.input[1]]) for part in (codes, steps))
        values = [self._added("Cast", [found], to=TensorProto.FLOAT), step]
        if columns is not None:
            values = [self._added("Mul", values), self._held(columns)]
        self._end("Mul", values, node)

    def _narrow_product(self, node: Any, values: Array) -> None:
        inputs, outputs = values.shape
        codes, steps = _in_four_bits(values.T)
        names = [node.input[0], self._held(_packed(codes)), self._held(steps)]
        form: dict[str, Any] = {
            "K": inputs,
            "N": outputs,
            "bits": 4,
            "block_size": _GROUP,
            "accuracy_level": _ACCURACY,
        }
        self.nodes.append(
            helper.make_node("MatMulNBits", names, [*node.output], name=node.name, domain=_CONTRIB, **form)
        )

    def _narrow_look_up(self, node: Any, values: Array) -> None:
        if values.shape[1] % _GROUP:
            codes, steps = _in_eight_bits(values, 1)
            self._look_up(node, codes, steps, None)
            return
        codes, steps = _in_four_bits(values)
        names = [self._held(_packed(codes).reshape(len(values), -1)), node.input[1], self._held(steps)]
        form: dict[str, Any] = {"bits": 4, "block_size": _GROUP, "gather_axis": 0, "quantize_axis": 1}
        self.nodes.append(
            helper.make_node("GatherBlockQuantized", names, [*node.output], name=node.name, domain=_CONTRIB, **form)
        )

    def _scaled(self, given: str, columns: Array | None) -> str:
        """The inputs times the steps of a matrix's columns."""
        return given if columns is None else self._added("Mul", [given, self._held(columns)])

    def _held(self, values: Array) -> str:
        """The name of a weight with these numbers."""
        values = values.astype(np.float32) if values.dtype == np.float64 else values
        name = f"weight_{_digest(values).hex()[:16]}"
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
        return name

    def _added(self, kind: str, names: Sequence[str], **form: Any) -> str:
        """The output of a node, which is made once."""
        key = kind, *names
        if key not in self.made:
            self.made[key] = f"rounded_{len(self.made)}"
            self.nodes.append(helper.make_node(kind, names, [self.made[key]], **form))
        return str(self.made[key])

    def _end(self, kind: str, names: Sequence[str], node: Any) -> None:
        self.nodes.append(helper.make_node(kind, names, [*node.output], name=node.name))


def _in_eight_bits(values: Array, axis: int) -> tuple[Array, Array]:
    """Codes from -127 to 127, and a step for each line along `axis`."""
    steps = np.abs(values).max(axis=axis, keepdims=True) / _LARGEST
    steps = np.where(steps > 0, steps, 1).astype(np.float32)
    return np.rint(values / steps).astype(np.int8), steps


def _in_four_bits(values: Array) -> tuple[Array, Array]:
    """Codes from 0 to 15 that count from 8, (N, groups, 32), and the steps of the groups, (N, groups)."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % _GROUP))).reshape(len(values), -1, _GROUP)
    largest = np.take_along_axis(padded, np.abs(padded).argmax(-1)[..., None], -1)
    steps = np.where(largest != 0, largest / -8, 1).astype(np.float32)
    codes = np.clip(np.rint(padded / steps) + 8, 0, 15).astype(np.uint8)
    return codes, steps[..., 0]


def _packed(codes: Array) -> Array:
    """Two codes a byte, the first in the low half."""
    return np.ascontiguousarray(codes[..., ::2] | codes[..., 1::2] << 4)


def _digest(values: Array) -> bytes:
    head = f"{values.dtype}{values.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).digest()
