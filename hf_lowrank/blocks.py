"""The repeated blocks of a model, and running only those after a given one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank.targets import DenseMatrix


def block_name(path: str) -> str:
    """The block a module is in: its path up to and including the first number (`bert.encoder.layer.3`), or empty."""
    parts = path.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def find_blocks(model: PreTrainedModel, matrices: Sequence[DenseMatrix]) -> list[str]:
    """Names of the blocks that hold matrices, in the order of the model."""
    names = {block_name(matrix.path) for matrix in matrices if matrix.role == "block"}
    return [name for name, _ in model.named_modules() if name in names]


@contextmanager
def recorded_outputs(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What each named block returns, as it returns it, filled in by the next run."""
    outputs: dict[str, Any] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def replayed_outputs(model: PreTrainedModel, names: Sequence[str], outputs: dict[str, Any]) -> Iterator[None]:
    """Within, the named blocks compute nothing and return what was recorded: only what follows them is run."""
    blocks = {name: model.get_submodule(name) for name in names}
    for name, block in blocks.items():
        block.__dict__["forward"] = _returning(outputs[name])
    try:
        yield
    finally:
        for block in blocks.values():
            del block.__dict__["forward"]


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode and without gradients for the parameters within; as it was afterwards."""
    training = model.training
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def weight_replaced(matrix: DenseMatrix, weight: torch.Tensor) -> Iterator[None]:
    """Within, the matrix holds `weight` (O, I) instead of its own, in the host's own layout."""
    parameter: Any = matrix.module.weight
    own = parameter.data
    parameter.data = (weight.T if isinstance(matrix.module, Conv1D) else weight).to(own).contiguous()
    try:
        yield
    finally:
        parameter.data = own
