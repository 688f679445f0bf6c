"""What errors in the numbers of a structure cost, from what errors in the weight it stands for do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_lowrank.methods.metric import moment_metric, shrunk
from hf_lowrank.methods.rounding.grids import as_columns
from hf_lowrank.methods.rounding.levels import Costs

_DRAWS = 32
_SHRINKAGE = 0.01


@dataclass
class Sensitivity:
    """The costs of parameters, as matrices with all dimensions but the last as rows.

    With costs `g` and a metric `C = L L^T` of the weight `W(p)` (O, I) and `J = dW / dp`, errors of `p` cost
    `J^T (diag(g) x C) J`. That is the covariance of the gradients of `<X, W(p)>` for `X = diag(g)^(1/2) N L^T` of
    standard normal numbers; the costs of its rows and the moment of its columns are kept, as KFAC does (Martens and
    Grosse, ICML 2015). What several structures share adds up.
    """

    seed: int
    _rows: dict[int, torch.Tensor] = field(default_factory=dict)
    _columns: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, structure: Any, costs: Sequence[Costs]) -> None:
        """Take note of a structure in the place of weights of these costs, those of experts one after the other."""
        generator = torch.Generator().manual_seed(self.seed)
        holders = [structure, *([structure.shared] if hasattr(structure, "shared") else [])]
        parameters = [p for holder in holders for p in holder.parameters() if p.is_floating_point() and p.dim() > 1]
        for parameter in parameters:
            parameter.requires_grad_(True)
        for _ in range(_DRAWS):
            with torch.enable_grad():
                weight = structure.to_dense()
            normal = torch.randn(weight.shape, generator=generator, dtype=torch.float64).flatten(0, -2)
            parts = zip(costs, normal.chunk(len(costs)), strict=True)
            drawn = torch.cat([columns.drawn(part * rows.sqrt()[:, None]) for (rows, columns), part in parts])
            direction = drawn.view(weight.shape).to(weight)
            gradients = torch.autograd.grad(weight, parameters, direction, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    self._note(id(parameter), gradient.flatten(0, -2).double() / _DRAWS**0.5)

    def of(self, parameter: nn.Parameter) -> Callable[[], Costs] | None:
        """What gives those of its rows and columns; None where nothing is known."""
        return partial(self._costs, id(parameter)) if id(parameter) in self._rows else None

    def _costs(self, key: int) -> Costs:
        rows, columns = self._rows[key], self._columns[key]
        costs = shrunk(rows, _SHRINKAGE)
        metric = moment_metric(columns, _DRAWS * len(rows), _SHRINKAGE)
        return costs / (float(rows.sum()) or 1.0), as_columns(metric, len(columns))

    def _note(self, key: int, gradient: torch.Tensor) -> None:
        self._rows[key] = self._rows.get(key, 0) + gradient.square().sum(1)
        self._columns[key] = self._columns.get(key, 0) + gradient.T @ gradient
