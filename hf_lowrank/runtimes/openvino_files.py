"""Graphs of OpenVINO: made of those of ONNX, rounded by NNCF, and run. Needs the extra `openvino`."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import nncf
import numpy as np
import openvino
import torch

from hf_lowrank.files.scratch import temporary_folder
from hf_lowrank.hosts.outputs import Batch
from hf_lowrank.runtimes.graphs import PAST, Graph
from hf_lowrank.runtimes.onnx_files import save_onnx, traced
from hf_lowrank.runtimes.onnx_graph import tidied
from hf_lowrank.runtimes.onnx_rounding import rounded
from hf_lowrank.runtimes.options import FLOAT, INT4, INT8, STORED, Draft, Written

# Ends of the names that sentence-transformers and optimum look for.
_ENDINGS = {FLOAT: "", INT8: "_qint8_quantized", INT4: "_qint4_quantized", STORED: "_stored"}
# Of 4 bits; where a rank is no multiple of it, fewer share a step.
_GROUP = 32


def write(graph: Graph, whole: Any, draft: Draft) -> Written:
    """Write a graph of a plain model.

    In `int8` inputs have one step each, found on the text, so that whole numbers go from one product to the next.

    Args:
        whole: The model it is of.
    """
    with temporary_folder() as scratch, _quiet():
        model = tidied(traced(graph, whole, scratch))
        notes: tuple[str, ...] = ()
        if draft.precision == STORED:
            model, notes = rounded(model, STORED, draft.stored, is_dynamic=False)
        save_onnx(model, scratch / "graph.onnx")
        made = openvino.Core().read_model(scratch / "graph.onnx")
        if draft.precision == INT8:
            made = _in_eight_bits(made, graph, draft.batches)
        elif draft.precision == INT4:
            made = _in_four_bits(made)
        path = draft.folder / f"openvino_{graph.stem}{_ENDINGS[draft.precision]}.xml"
        openvino.save_model(made, path, compress_to_fp16=False)
    return Written(path, notes)


def session(path: Path, num_threads: int | None = None) -> "OpenVINOSession":
    """The file in OpenVINO, on processors."""
    return OpenVINOSession(path, num_threads)


class OpenVINOSession:
    """A file of OpenVINO on processors, where it computes in float32 what is not rounded.

    Args:
        num_threads: Of one call; None leaves it to the runtime.
    """

    def __init__(self, path: Path, num_threads: int | None = None) -> None:
        threads = {} if num_threads is None else {"INFERENCE_NUM_THREADS": num_threads}
        hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        self._model: Any = openvino.Core().compile_model(path, "CPU", {**hints, **threads})
        self._inputs, self._outputs = _named(self._model.inputs), _named(self._model.outputs)
        shapes = {name: one.partial_shape for name, one in self._inputs.items() if name.startswith(PAST)}
        self.past = {name: (shape[1].get_length(), shape[3].get_length()) for name, shape in shapes.items()}

    def __call__(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Every output by name; what the graph does not read is left out."""
        found = self._model({one: _array(given[name]) for name, one in self._inputs.items()})
        return {name: torch.from_numpy(np.array(found[one])) for name, one in self._outputs.items()}


def _in_eight_bits(model: Any, graph: Graph, batches: Sequence[Batch]) -> Any:
    names = [one.any_name for one in model.inputs]
    rows = [graph.read(batch, turn) for turn, batch in enumerate(batches)]
    given = [{name: _array(row[name]) for name in names} for row in rows]
    return nncf.quantize(model, nncf.Dataset(given), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(given))


def _in_four_bits(model: Any) -> Any:
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_SYM,
        group_size=_GROUP,
        all_layers=True,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        ),
    )


def _named(places: Sequence[Any]) -> dict[str, Any]:
    """Inputs or outputs by name; a tensor may have names of the graph's inside as well, which are paths."""
    return {min(one.names, key=lambda name: name.startswith("/")): one for one in places}


def _array(value: torch.Tensor) -> Any:
    return np.ascontiguousarray(value.detach().numpy())


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF draws bars and tables on standard output, where ours is."""
    nncf.set_log_level(logging.ERROR)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
