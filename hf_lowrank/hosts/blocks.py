"""The repeated blocks of a model, and running only those after a given one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.hosts.matrices import DenseMatrix, turned
from hf_lowrank.hosts.outputs import Batch, run
from hf_lowrank.hosts.targets import BLOCK_ROLES


def block_name(path: str) -> str:
    """The block a module is in, or empty: its path up to the end of the first number (`bert.encoder.layer.3`).

    A number right after it belongs to it: a list of lists, as Funnel's `encoder.blocks.0.1`, is no block.
    """
    parts = path.split(".")
    before = list(takewhile(lambda part: not part.isdigit(), parts))
    numbers = list(takewhile(str.isdigit, parts[len(before) :]))
    return ".".join([*before, *numbers]) if numbers else ""


def find_blocks(model: PreTrainedModel, matrices: Sequence[DenseMatrix]) -> list[str]:
    """Names of the blocks that hold matrices, in the order of the model."""
    names = {block_name(matrix.path) for matrix in matrices if matrix.role in BLOCK_ROLES}
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


class Walk:
    """One model run block by block on the same batches, each block starting from what the one before it returned.

    What stands before the first block is run every time; what follows the present block is not run at all. Of each
    batch one block's output is held for each stack, of which an encoder-decoder has two.

    Args:
        names: Of the blocks, in the order they run, each once a run; see `calls_in_order`.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
        self._names = names
        self._position = 0
        self._returned: list[dict[str, Any]] = [{} for _ in batches]  # by stack, of its last block that was passed

    @property
    def block(self) -> str:
        """Name of the present block."""
        return self._names[self._position]

    def run(self, index: int, before: str | None = None) -> Any:
        """What the present block returns for batch `index`; nothing if it is left as it reaches module `before`."""
        passed = self._names[: self._position]
        outputs = {name: self._returned[index][_stack(name)] for name in passed}
        with replayed_outputs(self.model, passed, outputs), left_at(self.model, self.block, before):
            try:
                run(self.model, self.batches[index])
            except Reached as reached:
                return reached.output
        raise RuntimeError(f"{self.block} was not run.")

    @torch.no_grad()
    def advance(self) -> list[Any]:
        """Run the present block on every batch and go to the next; what it returned, batch by batch."""
        returned = [self.run(index) for index in range(len(self.batches))]
        for known, output in zip(self._returned, returned, strict=True):
            known[_stack(self.block)] = output
        self._position += 1
        return returned


def _stack(block: str) -> str:
    return block.rpartition(".")[0]


class Reached(Exception):
    """Leaves a run where all that is wanted of it is known.

    Args:
        output: What the block that was left gave.
    """

    def __init__(self, output: Any) -> None:
        self.output = output


@contextmanager
def left_at(model: PreTrainedModel, after: str, before: str | None) -> Iterator[None]:
    """Within, a run is left, by `Reached`, after a block or before a module."""

    def leave(output: Any) -> None:
        raise Reached(output)

    hooks = [model.get_submodule(after).register_forward_hook(lambda module, inputs, output: leave(output))]
    if before is not None:
        hooks.append(model.get_submodule(before).register_forward_pre_hook(lambda module, inputs: leave(None)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def calls_in_order(model: PreTrainedModel, names: Sequence[str], batch: Batch) -> list[str]:
    """The named modules in the order in which one run calls them; those called more than once are left out."""
    calls = every_call(model, names, batch)
    return [name for name in calls if calls.count(name) == 1]


def every_call(model: PreTrainedModel, names: Sequence[str], batch: Batch) -> list[str]:
    """Each call of one of the named modules in one run, in order."""
    calls: list[str] = []

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, inputs: calls.append(name)

    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        with frozen(model), torch.no_grad():
            run(model, {name: value[:1].to(model.device) for name, value in batch.items()})  # one sequence shows it
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def hidden_states(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns, (B, T, D)."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


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
def weight_replaced(matrix: DenseMatrix, make_weight: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Within, the matrix holds what `make_weight` gives, (O, I), instead of its own, in the host's own layout.

    A linear layer, or a mixture's experts, hold it while called, so that of many that are replaced at once one is in
    memory; a table holds it all the time, because a tied head reads it too.
    """
    parameter: Any = matrix.module.weight
    own = parameter.data

    def replace(*_: Any) -> None:
        parameter.data = turned(matrix.module, make_weight()).to(own).contiguous()

    def restore(*_: Any) -> None:
        parameter.data = own

    hooks: list[Any] = []
    if matrix.role == "embedding":
        replace()
    else:
        hooks += [matrix.caller.register_forward_pre_hook(replace), matrix.caller.register_forward_hook(restore)]
    try:
        yield
    finally:
        restore()
        for hook in hooks:
            hook.remove()
