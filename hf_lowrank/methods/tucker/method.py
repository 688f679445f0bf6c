"""Tucker decompositions of a model: one stack of blocks, one bank, two structures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.methods.metric import moment_metric
from hf_lowrank.methods.problem import Problem, Solved
from hf_lowrank.methods.stacking import INPUT_SIDES, BlockLayout, block_layout, stack_blocks
from hf_lowrank.methods.together import Specs, TensorMethod
from hf_lowrank.methods.tucker.ranks import tucker_ranks
from hf_lowrank.methods.tucker.tucker import BlockMetrics, Tucker, TuckerRanks, refitted, tucker
from hf_lowrank.remote_code.lowrank_plan import Plan, Spec

PART = "tucker_factors"
_SHRINKAGE = 0.01


@dataclass(frozen=True)
class TuckerMethod(TensorMethod):
    """Formats III (two ranks: left, right) and IV (three: bank, left, right) of Ren et al. (ICLR 2022).

    Args:
        needs: `input_moment` for errors in the metric of the inputs.
    """

    needs: frozenset[str] = frozenset()
    structure: ClassVar[str] = "tucker"

    def specs(self, problem: Problem, ranks: Sequence[int]) -> tuple[Specs, Specs]:
        """Specs of the modules and of the part they share."""
        if len(ranks) not in (2, 3):
            raise InputError(
                f"ranks of a tucker method are two (left, right) or three (bank, left, right), got {len(ranks)}."
            )
        *bank, left, right = ranks
        return _specs(problem, TuckerRanks(left, right, bank[0] if bank else None))

    def specs_within(self, problem: Problem, budget: float) -> tuple[Specs, Specs] | None:
        """The specs that keep most of each block in `budget` numbers; see `tucker_ranks`."""
        stack, metrics = self._stack(problem)
        found = tucker_ranks(stack if metrics is None else metrics.whiten(stack), budget)
        return None if found is None else _specs(problem, found)

    def least(self, problem: Problem) -> int:
        """Stored numbers at ranks of 1."""
        num_blocks = sum(layout.num_blocks for layout in _layouts(problem))
        return TuckerRanks(1, 1).num_weights(num_blocks, problem.width, problem.width)

    def solved(self, problem: Problem, plan: Plan) -> Iterable[Solved]:
        """The one bank and all its members."""
        spec = plan["shared"][PART]
        stack, metrics = self._stack(problem)
        ranks = TuckerRanks(spec["left_rank"], spec["right_rank"], spec.get("bank_size"))
        found = tucker(stack, ranks, metrics, problem.progress)
        state = {"left": found.left, "right": found.right}
        if found.mixing is not None:
            state["core"] = found.core
        own: Iterable[torch.Tensor]
        if metrics is not None and found.mixing is None:
            own = (_refitted(problem, matrix, found) for matrix in problem.matrices)
        else:
            parts = found.core if found.mixing is None else found.mixing
            own = parts.split([layout.num_blocks for layout in _layouts(problem)])
        members = {matrix.name: {"own": part} for matrix, part in zip(problem.matrices, own, strict=True)}
        yield Solved(members, PART, state)

    def _stack(self, problem: Problem) -> tuple[torch.Tensor, BlockMetrics | None]:
        """All blocks, and the metrics common to them where the method looks at text."""
        layouts = _layouts(problem)
        stack = stack_blocks([problem.weight(matrix) for matrix in problem.matrices], layouts)
        if not self.needs:
            return stack, None
        moments, counts = zip(*(problem.moment(matrix) for matrix in problem.matrices), strict=True)
        return stack, _metrics(moments, layouts, max(counts))


def _refitted(problem: Problem, matrix: DenseMatrix, found: Tucker) -> torch.Tensor:
    """Its own matrices, best in the metric of its own inputs."""
    layout = block_layout(matrix, problem.width)
    moment, num_tokens = problem.moment(matrix)
    missing = -len(moment) % problem.width
    metric = moment_metric(F.pad(moment, (0, missing, 0, missing)), num_tokens, _SHRINKAGE)
    return refitted(problem.weight(matrix), layout, found.left, found.right, metric)


def _specs(problem: Problem, ranks: TuckerRanks) -> tuple[Specs, Specs]:
    layouts = _layouts(problem)
    ranks.check(sum(layout.num_blocks for layout in layouts), problem.width, problem.width)
    part: Spec = {
        "structure": "tucker_basis",
        "width": problem.width,
        "left_rank": ranks.left,
        "right_rank": ranks.right,
    }
    structure = "tucker"
    if ranks.bank is not None:
        part |= {"structure": "tucker_bank", "bank_size": ranks.bank}
        structure = "banked_tucker"
    modules = {
        matrix.name: {"structure": structure, "shared": PART, "input_side": layout.input_side}
        for matrix, layout in zip(problem.matrices, layouts, strict=True)
    }
    return modules, {PART: part}


def _layouts(problem: Problem) -> list[BlockLayout]:
    return [block_layout(matrix, problem.width) for matrix in problem.matrices]


def _metrics(moments: Sequence[torch.Tensor], layouts: Sequence[BlockLayout], num_tokens: int) -> BlockMetrics:
    """The metric of either side, averaged over the blocks, and the weight of each block.

    On the side of its inputs a block's metric is their moment, of mean 1 on the diagonal; on the other, the identity.
    What was divided out is its weight.
    """
    width = layouts[0].left
    sums = {side: torch.zeros(width, width, dtype=moments[0].dtype, device=moments[0].device) for side in INPUT_SIDES}
    weights = []
    for moment, layout in zip(moments, layouts, strict=True):
        on_left = layout.input_side == "left"
        num_in, num_out = layout.grid if on_left else layout.grid[::-1]
        scales = torch.empty(num_in, dtype=moment.dtype)
        for index, start in enumerate(range(0, len(moment), width)):
            piece = moment[start : start + width, start : start + width]
            scales[index] = float(piece.diagonal().mean()) or 1.0
            sums[layout.input_side][: len(piece), : len(piece)] += num_out * piece / scales[index].to(piece)
        sums["right" if on_left else "left"].diagonal().add_(layout.num_blocks)
        weights.append(scales.repeat_interleave(num_out) if on_left else scales.repeat(num_out))
    left, right = (moment_metric(sums[side] / sums[side].trace(), num_tokens, _SHRINKAGE) for side in INPUT_SIDES)
    return BlockMetrics(left, right, torch.cat(weights).to(moments[0].device))


TUCKER = TuckerMethod()
WHITENED_TUCKER = TuckerMethod(needs=frozenset({"input_moment"}))
