"""One small run of a dense model before any work: which of its matrices cannot be replaced, and what it is run on."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError, Note, one_line
from hf_lowrank.hosts.blocks import frozen
from hf_lowrank.hosts.dummy_inputs import Inputs, dummy_inputs, run_quietly
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.remote_code.lowrank_dense import dense_kind


@dataclass(frozen=True)
class Rehearsal:
    """What a small run of a dense model showed.

    Args:
        inputs: What it was run on; None where no input could be made.
        read: Paths of the matrices whose weight something besides their own layer computes with.
    """

    inputs: Inputs | None
    read: frozenset[str]


def rehearse(model: PreTrainedModel, matrices: Sequence[DenseMatrix]) -> Rehearsal:
    """Run a dense model once, and of the models inside it those with matrices that this did not reach.

    Raises:
        InputError: If the model changes its own weights while it runs.
    """
    watch = _Watch(matrices)
    with frozen(model), watch.hooked(model), watch:
        inputs = _inputs_taken_by(model)
        for name, inner in model.named_modules():
            if isinstance(inner, PreTrainedModel) and inner is not model and not watch.has_reached(f"{name}."):
                _inputs_taken_by(inner)
    if watch.written:
        raise InputError(
            f"{type(model).__name__} changes its own weights while it runs ({min(watch.written)}), so that what is "
            "saved would not compute the same. Switch that off in its configuration first (RWKV: rescale_every=0)."
        )
    return Rehearsal(inputs, frozenset(watch.read))


def require_same_inputs(model: PreTrainedModel, inputs: Inputs | None) -> None:
    """Check that a compressed model runs on what the dense one ran on; where that was nothing, it is said.

    Raises:
        InputError: If it does not.
    """
    name = type(model).__name__
    if inputs is None:
        warnings.warn(Note(f"No input for {name} could be made, so it was not run. Try it on yours."), stacklevel=3)
        return
    try:
        run_quietly(model, inputs)
    except Exception as error:  # hosts of all families, each with errors of its own
        raise InputError(
            f"{name} was made and cannot run: {one_line(error)} Compress fewer of its layers: exclude_modules."
        ) from error


def _inputs_taken_by(model: PreTrainedModel) -> Inputs | None:
    try:
        return dummy_inputs(model)
    except InputError:
        return None


class _Watch(TorchDispatchMode):
    """Notes which weights are computed with while no layer they belong to is being called, or written to."""

    def __init__(self, matrices: Sequence[DenseMatrix]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.read: set[str] = set()
        self.written: set[str] = set()
        self._matrices = matrices
        self._paths: dict[int, str] = {id(matrix.module.weight): matrix.path for matrix in matrices}
        self._called: list[int] = []  # ids of the weights of the layers that are being called
        self._reached: set[str] = set()

    def has_reached(self, prefix: str) -> bool:
        """Whether every matrix whose path begins so was called."""
        return all(path in self._reached for path in self._paths.values() if path.startswith(prefix))

    @contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        """Within, calls of the layers that have the weights are seen; a tied head is one."""
        layers: list[Any] = [(module, module) for module in model.modules() if dense_kind(module) is not None]
        layers += [(matrix.caller, matrix.module) for matrix in self._matrices if matrix.kind == "experts"]
        hooks: list[Any] = []
        for called, layer in layers:
            if id(layer.weight) in self._paths:
                hooks.append(called.register_forward_pre_hook(partial(self._enter, id(layer.weight))))
                hooks.append(called.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, weight: int, module: Any, inputs: Any) -> None:
        self._reached.add(self._paths[weight])
        self._called.append(weight)

    def _leave(self, module: Any, inputs: Any, output: Any) -> None:
        self._called.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            if id(value) in self._paths and id(value) not in self._called:
                self.read.add(self._paths[id(value)])
                if str(func).split(".")[1].endswith("_"):  # torch's way to name what writes
                    self.written.add(self._paths[id(value)])
                    raise RuntimeError("a weight is written to")
        return func(*args, **(kwargs or {}))
