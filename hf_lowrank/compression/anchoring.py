"""Solving matrices again in the order they run, on what the compressed model before them really gives."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from hf_lowrank.data.calibration import Calibration
from hf_lowrank.files.checkpoint import NOT_KEPT, Checkpoint
from hf_lowrank.hosts.blocks import Walk, block_name, calls_in_order, frozen
from hf_lowrank.hosts.matrices import DenseMatrix, JointMatrix, Matrix
from hf_lowrank.hosts.outputs import mean_distance, real_rows, sees_all
from hf_lowrank.methods.encoding import ENCODERS
from hf_lowrank.methods.factors import Factors
from hf_lowrank.methods.matrix.anchored import AnchoredMoments, AnchoredTarget
from hf_lowrank.methods.matrix.svd import decompose
from hf_lowrank.methods.metric import BlockMetric, Metric
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.lowrank_structures import structure_name

# Of what is missing, the share that is asked for; MPIFA (ICML 2025) takes a quarter.
_SHARE = 0.5
_PAIRS = {"low_rank", "joint_low_rank"}
_SUMS = {"add", "__add__", "__radd__", "__iadd__", "add_"}

OutputMetric = Callable[[DenseMatrix], Metric]


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
    matrices: Sequence[Matrix],
    output_metric: OutputMetric,
    calibration: Calibration,
    *,
    checkpoint: Checkpoint = NOT_KEPT,
    progress: Progress = no_progress,
) -> Anchoring:
    """Solve the pairs of factors of `small` again, block by block, to undo what the pairs before them do.

    The target of a matrix is its output in the dense model; its input is that in the compressed one. Where its output
    is added to another tensor, the residual stream, the difference of that tensor in the two models is part of the
    target, so that a block takes back errors of all before it. Half of what is then missing is asked for: all of it
    fits the text too closely. Modules with one input (query, key, value) are solved together. Ranks stay; biases,
    where there are any, follow the means.

    A block keeps its new factors only if they bring the outputs of the whole model nearer to the dense model's on
    `calibration.probes`. A module that runs more than once, or not on every token, stays as it is.

    Args:
        small: Compressed, with a `LowRankLinear` for each of the matrices, or `JointLinear` layers; what else stands
            there is left alone.
        matrices: Of `dense`.
        output_metric: What errors at the outputs of a matrix cost.
        checkpoint: Keeps each finished block, so that none is solved twice.
    """
    solvable = [m for m in matrices if {_structure(small, member) for member in m.members} <= _PAIRS]
    members = [member.path for matrix in solvable for member in matrix.members if block_name(member.path)]
    paths = calls_in_order(dense, members, calibration.probes[0])
    blocks = calls_in_order(dense, list(dict.fromkeys(map(block_name, paths))), calibration.probes[0])
    with frozen(dense), frozen(small), torch.no_grad():
        pair = _Pair(Walk(dense, blocks, calibration.batches), Walk(small, blocks, calibration.batches))
        before = mean_distance(small, dense, calibration.probes)
        found = Anchoring(before, before)
        for name in progress(blocks, "anchoring"):
            block, finished = small.get_submodule(name), checkpoint.part(f"anchored-{name}")
            known = finished.load()
            if known is None:
                before_it = _copy(block)
                pair.solve([path for path in paths if block_name(path) == name], solvable, output_metric)
                distance = mean_distance(small, dense, calibration.probes)
                known = {"distance": distance, "state": _copy(block) if distance < found.after else before_it}
                finished.save(known)
            block.load_state_dict(known["state"])
            (found.accepted if known["distance"] < found.after else found.refused).append(name)
            found.after = min(found.after, known["distance"])
            pair.dense.advance()
            pair.small.advance()
    return found


def _copy(block: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in block.state_dict().items()}


def _structure(model: PreTrainedModel, matrix: DenseMatrix) -> str | None:
    return structure_name(model.get_submodule(matrix.path))


@dataclass(frozen=True)
class _Pair:
    """Both models at the same block."""

    dense: Walk
    small: Walk

    def solve(self, paths: Sequence[str], matrices: Sequence[Matrix], output_metric: OutputMetric) -> None:
        """Set the factors of these modules of the present block, those first that run first."""
        groups = _groups(self.dense, paths)
        following = [*(group[0] for group in groups[1:]), None]
        for group, before in zip(groups, following, strict=True):
            together = [matrix for matrix in matrices if {member.path for member in matrix.members} <= {*group}]
            self._solve_group(together, before, output_metric)

    def _solve_group(self, group: Sequence[Matrix], before: str | None, output_metric: OutputMetric) -> None:
        members = [member for matrix in group for member in matrix.members]
        weight = torch.cat([member.weight for member in members])  # (sum of O, I)
        has_biases = all(member.module.bias is not None for member in members)
        wanted = self._moments(members, weight, before).target(weight, has_biases)
        start = 0
        for matrix in group:
            stop = start + matrix.shape[0]
            self._set_factors(matrix, wanted.rows(start, stop), output_metric)
            start = stop

    def _set_factors(self, matrix: Matrix, target: AnchoredTarget, output_metric: OutputMetric) -> None:
        metric = BlockMetric([(cache(partial(output_metric, member)), member.shape[0]) for member in matrix.members])
        structures: list[Any] = [self.small.model.get_submodule(member.path) for member in matrix.members]
        factors = decompose(target.weight, metric, target.input_metric).factors(structures[0].rank)
        change = target.bias_change(matrix.weight, factors.product)
        lengths = [member.shape[0] for member in matrix.members]
        parts = zip(matrix.members, structures, factors.up.split(lengths), change.split(lengths), strict=True)
        for member, structure, up, moved in parts:
            bias: Any = member.module.bias
            encode = ENCODERS[structure_name(structure) or ""]
            state = encode(Factors(up, factors.down), None if bias is None else bias + moved, member.weight.dtype)
            structure.load_state_dict(state)
        if isinstance(matrix, JointMatrix):
            structures[0].shared.down.weight.copy_(factors.down)

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
            missing *= _SHARE
            moments.add(real_rows(inputs, batch), real_rows(missing, batch))
        return moments


def _groups(walk: Walk, paths: Sequence[str]) -> list[list[str]]:
    """The modules of the present block that see all there is, together those with the very same input."""
    with _watched(walk.model, paths) as watch:
        walk.run(0)
    groups: list[list[str]] = []
    previous: torch.Tensor | None = None
    for path, inputs in watch.inputs.items():
        if not sees_all(inputs, walk.batches[0]):
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
