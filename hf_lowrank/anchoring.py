"""Solving matrices again in the order they run, on what the compressed model before them really gives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from hf_lowrank.blocks import Walk, block_name, calls_in_order, frozen
from hf_lowrank.calibration import Calibration
from hf_lowrank.outputs import mean_distance, real_tokens
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_structures import structure_name
from hf_lowrank.solvers.anchored import AnchoredMoments
from hf_lowrank.solvers.metric import Metric
from hf_lowrank.solvers.storage import ENCODERS
from hf_lowrank.solvers.svd import decompose
from hf_lowrank.targets import DenseMatrix, dense_weight

_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_"}


@dataclass
class Anchoring:
    """What anchoring did.

    Args:
        before: Mean distance of the outputs from the dense model's on text that nothing was solved on; see
            `Said.distance`.
        after: The same of the model as it was left.
        accepted: Blocks that keep their new factors.
        refused: Blocks that are as they were, since the new factors did not help on that text.
    """

    before: float
    after: float
    accepted: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def anchor_(
    small: PreTrainedModel,
    dense: PreTrainedModel,
    matrices: Sequence[DenseMatrix],
    output_metric: Callable[[DenseMatrix], Metric],
    calibration: Calibration,
    *,
    progress: Progress = no_progress,
) -> Anchoring:
    """Solve the pairs of factors of `small` again, block by block, to undo what the pairs before them do.

    The target of a matrix is its output in the dense model; its input is that in the compressed one. Where its output
    is added to another tensor, the residual stream, the difference of that tensor in the two models is part of the
    target, so that a block takes back errors of all before it. Modules with one input (query, key, value) are solved
    together. Ranks stay; biases, where there are any, are set so that outputs are right on average.

    A block keeps its new factors only if they bring the outputs of the whole model nearer to the dense model's on
    `calibration.probes`. A module that runs more than once, or not on every token, stays as it is.

    Args:
        small: Compressed, with a `LowRankLinear` for each of the matrices; others are left alone.
        matrices: Of `dense`.
        output_metric: What errors at the outputs of a matrix cost.
    """
    solvable = {m.path: m for m in matrices if structure_name(small.get_submodule(m.path)) == "low_rank"}
    paths = calls_in_order(dense, [path for path in solvable if block_name(path)], calibration.probes[0])
    blocks = calls_in_order(dense, list(dict.fromkeys(map(block_name, paths))), calibration.probes[0])
    with frozen(dense), frozen(small), torch.no_grad():
        pair = _Pair(Walk(dense, blocks, calibration.batches), Walk(small, blocks, calibration.batches))
        before = mean_distance(small, dense, calibration.probes)
        found = Anchoring(before, before)
        for name in progress(blocks, "anchoring"):
            block = small.get_submodule(name)
            kept = {key: value.clone() for key, value in block.state_dict().items()}
            pair.solve([solvable[path] for path in paths if block_name(path) == name], output_metric)
            distance = mean_distance(small, dense, calibration.probes)
            if distance < found.after:
                found.after = distance
                found.accepted.append(name)
            else:
                block.load_state_dict(kept)
                found.refused.append(name)
            pair.dense.advance()
            pair.small.advance()
    return found


@dataclass(frozen=True)
class _Pair:
    """Both models at the same block."""

    dense: Walk
    small: Walk

    def solve(self, matrices: Sequence[DenseMatrix], output_metric: Callable[[DenseMatrix], Metric]) -> None:
        """Set the factors of the present block, those first that run first."""
        by_path = {matrix.path: matrix for matrix in matrices}
        groups = _groups(self.dense, list(by_path))
        following = [*(group[0] for group in groups[1:]), None]
        for group, before in zip(groups, following, strict=True):
            self._solve_group([by_path[path] for path in group], before, output_metric)

    def _solve_group(
        self, group: Sequence[DenseMatrix], before: str | None, output_metric: Callable[[DenseMatrix], Metric]
    ) -> None:
        weight = torch.cat([dense_weight(matrix.module) for matrix in group])  # (sum of O, I)
        biases: list[Any] = [matrix.module.bias for matrix in group]
        wanted = self._moments(group, weight, before).target(weight, all(bias is not None for bias in biases))
        start = 0
        for matrix, bias in zip(group, biases, strict=True):
            stop = start + matrix.shape[0]
            target, dense = wanted.rows(start, stop), weight[start:stop]
            structure: Any = self.small.model.get_submodule(matrix.path)
            solved = decompose(target.weight, output_metric(matrix), target.input_metric).factors(structure.rank)
            moved = None if bias is None else bias + target.bias_change(dense, solved.product)
            structure.load_state_dict(ENCODERS["low_rank"](solved, moved, dense.dtype))
            start = stop

    def _moments(self, group: Sequence[DenseMatrix], weight: torch.Tensor, before: str | None) -> AnchoredMoments:
        paths = [matrix.path for matrix in group]
        moments = AnchoredMoments(weight)
        for index, batch in enumerate(self.dense.batches):
            with _watched(self.dense.model, paths) as wanted:
                self.dense.run(index, before)
            with _watched(self.small.model, paths) as found:
                self.small.run(index, before)
            inputs = found.inputs[paths[0]]
            missing = (wanted.inputs[paths[0]] - inputs) @ weight.T  # (B, T, sum of O)
            parts = missing.split([matrix.shape[0] for matrix in group], dim=-1)  # views
            for path, part in zip(paths, parts, strict=True):
                if path in wanted.addends and path in found.addends:
                    part += (wanted.addends[path] - found.addends[path]).reshape(part.shape)
            real = real_tokens(batch)
            moments.add(*(values.reshape(*real.shape, -1)[real] for values in (inputs, missing)))
        return moments


def _groups(walk: Walk, paths: Sequence[str]) -> list[list[str]]:
    """The modules of the present block that see every token, together those with the very same input."""
    with _watched(walk.model, paths) as watch:
        walk.run(0)
    num_tokens = walk.batches[0]["input_ids"].numel()
    groups: list[list[str]] = []
    previous: torch.Tensor | None = None
    for path, inputs in watch.inputs.items():
        if inputs.numel() != num_tokens * inputs.shape[-1]:
            continue
        if inputs is not previous:
            groups.append([])
        groups[-1].append(path)
        previous = inputs
    return groups


class _Watch(TorchFunctionMode):
    """Notes what modules are given, and the tensors that their outputs, as they are, are added to.

    A residual connection is found by what it does, not by the name of an architecture: a sum of which one operand
    holds the output of a module (dropout in evaluation mode hands on its input) and the other one is as large and not
    made from that output (as it is in the polynomial of an activation).
    """

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[str, torch.Tensor] = {}
        self.addends: dict[str, torch.Tensor] = {}
        self._outputs: dict[str, torch.Tensor] = {}
        self._origins = WeakIdKeyDictionary()  # tensor -> paths of the modules whose outputs it is made from

    def hook(self, path: str) -> Callable[[Any, Any, torch.Tensor], None]:
        """Watches one module."""

        def note(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self.inputs[path], self._outputs[path] = inputs[0], output
            self._origins[output] = {path} | self._origins.get(output, set())

        return note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if getattr(func, "__name__", "") in _SUMS and not kwargs and len(operands) == 2:
            self._note_sum(*operands)
            self._note_sum(*operands[::-1])
        origins = set().union(*(self._origins.get(operand, ()) for operand in operands))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result) if origins else ():
            if isinstance(leaf, torch.Tensor):
                self._origins[leaf] = origins
        return result

    def _note_sum(self, operand: torch.Tensor, other: torch.Tensor) -> None:
        for path, output in self._outputs.items():
            is_sum_of_it = _are_same(operand, output) and other.numel() == output.numel()
            is_independent = path not in self._origins.get(other, ())
            if path not in self.addends and is_independent and is_sum_of_it:
                self.addends[path] = other.clone()  # now: the sum may be formed in its place


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


@contextmanager
def _watched(model: PreTrainedModel, paths: Sequence[str]) -> Iterator[_Watch]:
    watch = _Watch()
    hooks = [model.get_submodule(path).register_forward_hook(watch.hook(path)) for path in paths]
    try:
        with watch:
            yield watch
    finally:
        for hook in hooks:
            hook.remove()
