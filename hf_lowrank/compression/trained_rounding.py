"""Rounded weights as numbers for a while: on their grid, but free to change, and rounded weights again afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.methods.rounding.coding import Steps, pack
from hf_lowrank.remote_code.lowrank_codes import STEPS_PER_OCTAVE, Grid, unpack
from hf_lowrank.remote_code.lowrank_packed import GridTensor, Rounding, as_matrix, remember_


@dataclass(frozen=True)
class RoundedWeight:
    """A parameter of a model that is on a grid.

    Args:
        module: Holds it, as `name`.
        note: Of the bytes it is saved as.
        grid: What those say.
    """

    module: nn.Module
    name: str
    note: Rounding
    grid: Grid

    @property
    def parameter(self) -> nn.Parameter:
        """It."""
        return self.module.get_parameter(self.name)

    def on(self, device: torch.device) -> "RoundedWeight":
        """The same with its grid there."""
        return replace(self, grid=self.grid.to(device))

    def codes(self, values: torch.Tensor, reluctance: float = 0.0) -> torch.Tensor:
        """The codes of numbers in its place, the nearest but for those that are larger than they were.

        `|z| = min(floor(|x| + 1/2), max(floor(|x| + 1/2 - t), |z_0|))` of `x = w / (r_i c_j)`, the codes `z_0` there
        were and the reluctance `t`: the larger that is, the fewer bits, down to what there were and less.
        """
        sizes = as_matrix(self.module, values).float() / self.grid.rows[:, None] / self.grid.columns
        signs = sizes.sign()
        sizes = sizes.abs_().add_(0.5)
        larger = (sizes - reluctance).floor_().maximum(self.grid.codes.abs())
        return (sizes.floor_().minimum(larger) * signs).int()

    def weight(self, codes: torch.Tensor) -> torch.Tensor:
        """What stands in its place at these codes."""
        return self.note.restored(Grid(codes, self.grid.rows, self.grid.columns).weight())

    def packable(self) -> tuple[torch.Tensor, Steps]:
        """What its bytes are made of."""
        return self.codes(self.parameter.detach().cpu()), self._steps

    @cached_property
    def _steps(self) -> Steps:
        largest = self.grid.rows.max()
        parts = (self.grid.rows / largest, self.grid.columns)
        rows, columns = ((-STEPS_PER_OCTAVE * part.double().log2()).round().long() for part in parts)
        return Steps(float(largest), rows, columns)


@contextmanager
def as_numbers(model: PreTrainedModel) -> Iterator[list[RoundedWeight]]:
    """Within, a model with rounded weights is one of numbers, and these are what is on a grid: none of another.

    Afterwards those that have changed are packed anew: they must be on their grids. A checkpoint that is saved within
    holds numbers.

    Raises:
        InputError: If the weights are decoded whenever they are used.
    """
    plan: Any = model.config.compression
    if plan.get("packed") is None:
        yield []
        return
    if any(isinstance(parameter, GridTensor) for parameter in model.parameters()):
        raise InputError("Weights that are decoded whenever they are used do not learn. Load with materialize='once'.")
    packed, rounded = plan.pop("packed"), _rounded(model)
    try:
        yield rounded
    finally:
        plan["packed"] = packed
        _pack_(model, rounded)


def _rounded(model: PreTrainedModel) -> list[RoundedWeight]:
    places = [
        (module, name, note)
        for module in model.modules()
        for name, note in vars(module).get("rounded_parameters", {}).items()
    ]
    grids = unpack([(note.content, note.matrix) for _, _, note in places])
    return [RoundedWeight(*place, grid) for place, grid in zip(places, grids, strict=True)]


def _pack_(model: PreTrainedModel, rounded: list[RoundedWeight]) -> None:
    """Give the weights that are not what their bytes say new bytes, and write down how many these are."""
    changed = [one for one in rounded if not one.note.is_of(one.parameter, one.grid)]
    names = {module: name for name, module in model.named_modules()}
    packed: Any = model.config.plan["packed"]
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for one, content in zip(changed, pack([one.packable() for one in changed]), strict=True):
        remember_(one.module, one.name, content)
        key = f"{names[one.module]}.{one.name}"
        part = "tensors" if key.startswith(prefix) else "outside"
        packed[part][key.removeprefix(prefix)] = len(content)
