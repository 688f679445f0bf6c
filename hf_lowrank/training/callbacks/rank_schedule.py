"""Ranks that shrink while a compressed model is trained, and a penalty that lowers ranks before it is compressed."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix, dense_weight
from hf_lowrank.hosts.targets import Patterns, find_matrices, select_matrices
from hf_lowrank.methods.factors import truncated
from hf_lowrank.options import checked
from hf_lowrank.remote_code.lowrank_linear import LowRankLinear
from hf_lowrank.remote_code.lowrank_structures import named_structures, replace_
from hf_lowrank.training.callbacks.schedules import Span, compressed_model, cubic

_POWER_STEPS = 12


class RankScheduleCallback(TrainerCallback):
    """Lowers the ranks of a compressed model step by step: `RankScheduleCallback(0.5)` ends with half of each.

    A cut between `start` and `end` replaces the factors of every `LowRankLinear` by the best ones of the rank that a
    cubic schedule has reached; the columns that fall away are zero and stay zero, since each one's gradient is a
    multiple of its partner, and the optimizer begins anew for the factors that were cut. Resuming is exact. At the end
    the layers and the plan have the target ranks. The cuts are made on whole factors: one process or several with
    whole copies, not FSDP or DeepSpeed.

    Args:
        target: Rank by module name (as in the plan), or the fraction of each present rank that stays.
        start: Of the schedule: a share of the training below 1, else a step.
        end: The same.
        cuts: How many.

    Raises:
        InputError: If the model has no such layers, or a target is no lower rank.
    """

    @checked
    def __init__(
        self, target: float | Mapping[str, int], *, start: float = 0.0, end: float = 0.6, cuts: int = 10
    ) -> None:
        if isinstance(target, (int, float)) and not 0 < target < 1:
            raise InputError(f"target must be a fraction between 0 and 1, or ranks by name, got {target:g}.")
        if cuts < 1:
            raise InputError(f"cuts must be at least 1, got {cuts}.")
        self._target = target
        self._span = Span(start, end)
        self._cuts = cuts
        self._layers: list[tuple[str, Any, int, int]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._span.steps(state.max_steps)
        model: Any = compressed_model(kwargs["model"])
        found = [] if model is None else named_structures(model.base_model)
        layers: dict[str, Any] = {name: module for name, module in found if type(module) is LowRankLinear}
        if not layers:
            raise InputError(
                "There are no layers of two factors whose ranks could fall. Compress the model first, with "
                'storage="low_rank"; hf_lowrank.convert_storage_ makes its rows pivoted afterwards.'
            )
        self._layers = [(name, layer, layer.rank, self._rank_of(name, layer)) for name, layer in layers.items()]
        if isinstance(self._target, Mapping) and (unknown := set(self._target) - set(layers)):
            raise InputError(f"target names {min(unknown)!r}, which is no low-rank layer of the model.")

    def _rank_of(self, name: str, layer: LowRankLinear) -> int:
        if not isinstance(self._target, Mapping):
            return max(1, round(self._target * layer.rank))
        rank = self._target.get(name, layer.rank)
        if not 1 <= rank <= layer.rank:
            raise InputError(f"target of {name!r} must be between 1 and its present rank {layer.rank}, got {rank}.")
        return rank

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        before, now = (self._passed(state.global_step + offset, state.max_steps) for offset in (-1, 0))
        if before == now:
            return
        for _, layer, first, last in self._layers:
            rank = round(cubic(first, last, now / self._cuts))
            _zero_after_(layer, rank)
            for parameter in (layer.up.weight, layer.down.weight):
                kwargs["optimizer"].state.pop(parameter, None)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model: Any = compressed_model(kwargs["model"])
        for name, layer, _, last in self._layers:
            replace_(model.base_model, name, _cut(layer, last))
            model.config.compression["modules"][name]["rank"] = last

    def _passed(self, step: int, max_steps: int) -> int:
        """Cuts made up to a step."""
        return math.floor(self._span.progress(step, max_steps) * self._cuts + 1e-9)


@torch.no_grad()
def _zero_after_(layer: LowRankLinear, rank: int) -> None:
    best = truncated(layer.up.weight, layer.down.weight, rank)
    layer.up.weight.zero_()[:, :rank] = best.up
    layer.down.weight.zero_()[:rank] = best.down


@torch.no_grad()
def _cut(layer: LowRankLinear, rank: int) -> LowRankLinear:
    best = truncated(layer.up.weight, layer.down.weight, rank)
    bias, weight = layer.up.bias, layer.up.weight
    cut = LowRankLinear(layer.in_features, layer.out_features, rank, bias is not None, weight.device, weight.dtype)
    cut.up.weight.copy_(best.up)
    cut.down.weight.copy_(best.down)
    if bias is not None:
        cut.up.bias.copy_(bias)
    return cut.requires_grad_(weight.requires_grad)


class StableRankPenaltyCallback(TrainerCallback):
    """Lowers the stable rank of a dense model's matrices while it is trained, so that compressing it costs less.

    Adds `strength * sum_W ||W||_F^2 / ||W||_2^2 / min(O, I)` to what is minimized, decoupled from the optimizer's
    moments as AdamW's weight decay is: after each step `W -= lr * strength * gradient`. The largest singular value is
    found by a few steps of power iteration from a fixed start, so that a resumed training is exact.

    Args:
        strength: Weight of the penalty.
        target_modules: As in `CompressOptions`; default: all linear layers of the blocks.

    Raises:
        InputError: If the strength is not positive, or there is no such matrix.
    """

    @checked
    def __init__(self, strength: float, *, target_modules: Patterns | None = None) -> None:
        if not 0 < strength < math.inf:
            raise InputError(f"strength must be positive, got {strength:g}.")
        self._strength = strength
        self._target_modules = target_modules
        self._matrices: list[DenseMatrix] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._matrices = select_matrices(find_matrices(kwargs["model"]), {"block"}, self._target_modules, None)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rate = kwargs["lr_scheduler"].get_last_lr()[0]
        for matrix in self._matrices:
            weight = dense_weight(matrix.module)  # a view of the parameter
            weight.sub_(stable_rank_gradient(weight), alpha=rate * self._strength / min(weight.shape))


def stable_rank(weight: torch.Tensor) -> float:
    """`||W||_F^2 / ||W||_2^2`: between 1 and the rank."""
    values = torch.linalg.svdvals(weight.detach().double()).square()
    return float(values.sum() / values[0])


def stable_rank_gradient(weight: torch.Tensor) -> torch.Tensor:
    """`2 W / s^2 - 2 ||W||_F^2 / s^3 u v^T` with the largest singular value `s` and its vectors."""
    wide = weight.float()
    right = wide.abs().sum(dim=0)  # (I): has a part along the first singular vector, and depends on nothing else
    for _ in range(_POWER_STEPS):
        left = torch.nn.functional.normalize(wide @ right, dim=0)
        right = torch.nn.functional.normalize(wide.T @ left, dim=0)
    largest = left @ wide @ right
    if not largest > 0:
        return torch.zeros_like(weight)
    outer = torch.outer(left, right) * (wide.square().sum() / largest)
    return (2 / largest.square() * (wide - outer)).to(weight.dtype)
