"""Graphs of ONNX: traced, saved in files of any size, and run by ONNX Runtime. Needs the extra `onnx`."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from hf_lowrank.files.scratch import temporary_folder
from hf_lowrank.runtimes.graphs import PAST, Graph
from hf_lowrank.runtimes.onnx_graph import tidied
from hf_lowrank.runtimes.onnx_rounding import rounded
from hf_lowrank.runtimes.options import FLOAT, INT4, INT8, STORED, Draft, Written

# What ONNX Runtime, OpenVINO and text-embeddings-inference of two years ago read too.
_OPSET = 18
_MOST_BYTES = 1 << 31  # of one protocol buffer
_EXTERNAL = 1024

# Ends of the names that sentence-transformers, fastembed and transformers.js look for.
_ENDINGS = {FLOAT: "", INT8: "_qint8_avx512_vnni", INT4: "_q4", STORED: "_stored"}


def write(graph: Graph, whole: Any, draft: Draft) -> Written:
    """Write a graph of a plain model.

    Args:
        whole: The model it is of.
    """
    with temporary_folder() as scratch:
        model = tidied(traced(graph, whole, scratch))
        notes: tuple[str, ...] = ()
        if draft.precision != FLOAT:
            model, notes = rounded(model, draft.precision, draft.stored)
        path = draft.folder / f"{graph.stem}{_ENDINGS[draft.precision]}.onnx"
        save_onnx(model, path)
    return Written(path, notes)


def session(path: Path, num_threads: int | None = None) -> "OnnxSession":
    """The file in ONNX Runtime, on processors."""
    return OnnxSession(path, num_threads)


def traced(graph: Graph, whole: Any, folder: Path) -> onnx.ModelProto:
    """The ONNX graph of a model or of a part of one, in float32.

    Traced with attention written out, so that runtimes find the patterns they fuse.

    Args:
        whole: The model it is of, in which attention is set.
        folder: Where to write meanwhile; large weights stay there until they are saved elsewhere.
    """
    whole.set_attn_implementation("eager")
    first, second = graph.examples(whole)
    axes = graph.axes(first, second)
    path = folder / f"{graph.stem}.onnx"
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            graph,
            tuple(first.values()),
            str(path),
            dynamo=False,
            input_names=[*first],
            output_names=[*graph.outputs],
            dynamic_axes=axes,
            opset_version=_OPSET,
        )
    return onnx.load(path)


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph; weights beyond what one file may hold go to a second one beside it, `NAME.onnx_data`."""
    if model.ByteSize() < _MOST_BYTES:
        onnx.save(model, path)
    else:
        onnx.save(
            model,
            path,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=f"{path.name}_data",
            size_threshold=_EXTERNAL,
        )


class OnnxSession:
    """A file of ONNX on processors.

    Args:
        num_threads: Of one call; None leaves it to the runtime.
    """

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._names = [one.name for one in self._session.get_inputs()]
        self._outputs = [one.name for one in self._session.get_outputs()]
        shapes = {one.name: one.shape for one in self._session.get_inputs() if one.name.startswith(PAST)}
        self.past = {name: (shape[1], shape[3]) for name, shape in shapes.items()}

    def __call__(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every output by name; what the graph does not read is left out."""
        arrays = {name: np.ascontiguousarray(given[name].numpy()) for name in self._names}
        found: Any = self._session.run(self._outputs, arrays)
        return {name: torch.from_numpy(value) for name, value in zip(self._outputs, found, strict=True)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing tells of every size it reads, and prints what it cannot turn; outputs are checked anyway."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            log.setLevel(level)
