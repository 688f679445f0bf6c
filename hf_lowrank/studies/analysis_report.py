"""The result of `analyze`: every matrix of a model as it is and at every budget, and the whole model."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from hf_lowrank.planning.timing import NUM_TOKENS

# Points of a spectrum that are kept, evenly spaced over its ranks: enough for a plot, little for a large model.
_SPECTRUM_POINTS = 64

ENERGY, DAMAGE = "energy lost", "predicted damage"
# KL in nats or 1 - cosine: at 0.03 the STS-B score of an encoder stayed within 0.2 of 82 points (docs/results.md).
_HARDLY = 0.03

# Title, then rows of text, the header first.
Grid = tuple[str, list[list[str]]]


@dataclass(frozen=True)
class Spectrum:
    """Singular values `s_1 >= s_2 >= ...` of one matrix, and what they say of its rank.

    Args:
        ranks: Which of them are in `values`; evenly spaced, the first and the last among them.
        effective_rank: `exp(-sum p_i ln p_i)` with `p_i = s_i / sum s` (Roy and Vetterli, EUSIPCO 2007): `k` where `k`
            of them are equal and the others 0.
        stable_rank: `sum s_i^2 / s_1^2`.
        rank_90: The least rank that holds 90 % of the energy `sum s_i^2`.
        rank_99: The least that holds 99 % of it.
    """

    ranks: tuple[int, ...]
    values: tuple[float, ...]
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_99: int


@dataclass(frozen=True)
class PlannedMatrix:
    """One matrix at one budget.

    Args:
        structure: What would hold it; `dense` if it would stay as it is.
        relative_error: `||W - W'||_F / ||W||_F`.
        metric_error: The same in the metric of the method: for `whitened_svd` the relative error of the outputs.
        predicted_loss: Its part of the model's; see `Analysis`.
        seconds: Of one call on `NUM_TOKENS` tokens, None if not measured.
    """

    structure: str
    rank: int | None
    parameters: int
    multiply_adds: int
    relative_error: float
    metric_error: float
    predicted_loss: float
    seconds: float | None


@dataclass(frozen=True)
class MatrixAnalysis:
    """One matrix as it is, and at every budget.

    Args:
        shape: `(O, I)`, `(V, D)` for an embedding, or `(E, O, I)` for experts.
        break_even_rank: `floor(O I / (O + I))`, the largest at which two factors are no larger than the matrix.
        metric_spectrum: In the metric of the method, None where it looks at no text or the matrix is no target.
        norm: `||W||_F`, in the metric of the method where it is a target: `energy lost` of all that is in it.
        planned: One a budget; empty if the matrix is no target.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    parameters: int
    break_even_rank: int
    spectrum: Spectrum
    metric_spectrum: Spectrum | None
    norm: float
    planned: tuple[PlannedMatrix, ...]


@dataclass(frozen=True)
class PlannedModel:
    """The whole model at one budget.

    Args:
        budget: Fraction that stays, of what `Analysis.budget_kind` says.
        size_bytes: Of all parameters, as the compressed model stores them.
        multiply_adds: For one token.
        predicted_loss: Sum over the matrices.
        measured_damage: Of the whole compressed model on text set aside, in nats of KL divergence or 1 - cosine; None
            if the allocation does not run the model.
        seconds: Of all target layers on `NUM_TOKENS` tokens, None if not measured.
    """

    budget: float
    parameters: int
    size_bytes: int
    multiply_adds: int
    predicted_loss: float
    measured_damage: float | None
    seconds: float | None


@dataclass(frozen=True)
class Analysis:
    """The result of `analyze`.

    Args:
        loss_name: What `predicted_loss` is: `predicted damage` (change of the output, from one short run a matrix) or
            `energy lost` (discarded squared singular values over the norm, in the metric of the method).
        dense: The model as it is.
    """

    architecture: str
    method: str
    allocation: str
    storage: str
    budget_kind: str
    loss_name: str
    dense: PlannedModel
    budgets: tuple[PlannedModel, ...]
    matrices: tuple[MatrixAnalysis, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def tables(self) -> list[Grid]:
        """The whole model at every budget, then every matrix."""
        is_metric = any(matrix.metric_spectrum for matrix in self.matrices)
        how = f"in the metric of {self.method}" if is_metric else "of the weights"
        title = f"Every matrix: spectrum and relative error {how}"
        return [("The whole model", self._model_rows()), (title, self._matrix_rows())]

    @property
    def recommendation(self) -> str:
        """What to do next: the least budget looked at that hardly changes what the model says, where that is known."""
        known = [model for model in self.budgets if model.measured_damage is not None]
        if not known:
            return (
                "next: energy says which matrices give, not what quality costs. Look again with text like that the "
                "model is for, --calibration TEXT, and a method that looks at it."
            )
        good = min((model for model in known if _damage(model) <= _HARDLY), key=lambda m: m.parameters, default=None)
        if good is not None:
            flag = self.budget_kind.replace("_", "-")
            return (
                f"recommended: --{flag} {good.budget:g}, the least of these whose measured damage is at most "
                f"{_HARDLY} ({_damage(good):.4f}), before refinement and recovery."
            )
        best = min(known, key=_damage)
        return (
            f"recommended: none of these as they are; the least damage is {_damage(best):.4f}, at {best.budget:g}; "
            f"{_HARDLY} is hardly felt. Keep more, or compress and train it back with recover."
        )

    def _loss(self, loss: float) -> str:
        """A predicted loss on a scale: damage as it is, energy as the share of all there is."""
        whole = sum(matrix.norm for matrix in self.matrices if matrix.planned)
        return f"{loss:.4g}" if self.loss_name != ENERGY else f"{loss / whole:.1%}"

    def _model_rows(self) -> list[list[str]]:
        header = [
            self.budget_kind,
            "parameters",
            "weights",
            "multiply-adds\na token",
            self.loss_name.replace(" ", "\n"),
        ]
        has_damage = any(model.measured_damage is not None for model in self.budgets)
        header += ["measured\ndamage"] * has_damage
        header += [f"target layers,\n{NUM_TOKENS} tokens"] * (self.dense.seconds is not None)
        rows = [header]
        for model in (self.dense, *self.budgets):
            row = ["dense" if model is self.dense else f"{model.budget:g}", f"{model.parameters:,}"]
            row += [f"{model.size_bytes / 1e6:.2f} MB", f"{model.multiply_adds:,}", self._loss(model.predicted_loss)]
            if has_damage:
                row.append("" if model.measured_damage is None else f"{model.measured_damage:.4g}")
            if model.seconds is not None:
                row.append(f"{model.seconds * 1e3:.1f} ms")
            rows.append(row)
        return rows

    def _matrix_rows(self) -> list[list[str]]:
        ranks = ["effective\nrank", "stable\nrank", "90 %\nenergy", "99 %\nenergy", "break-\neven"]
        rows = [["matrix", "shape", *ranks, *(f"{model.budget:g}: rank\n(error)" for model in self.budgets)]]
        for matrix in self.matrices:
            seen = matrix.metric_spectrum or matrix.spectrum
            row = [matrix.name, " x ".join(map(str, matrix.shape)), f"{seen.effective_rank:.0f}"]
            row += [f"{seen.stable_rank:.1f}", str(seen.rank_90), str(seen.rank_99), str(matrix.break_even_rank)]
            shown = [f"{one.rank} ({one.metric_error:.2f})" if one.rank else one.structure for one in matrix.planned]
            rows.append(row + (shown or ["no target"] * len(self.budgets)))
        return rows


def _damage(model: PlannedModel) -> float:
    return model.measured_damage or 0.0


def spectrum_of(singular_values: torch.Tensor) -> Spectrum:
    """The summary of singular values, largest first."""
    values = singular_values.double().cpu()
    total, energies = float(values.sum()), values.square()
    shares = values[values > 0] / total if total > 0 else values[:0]
    held = (energies.cumsum(0) / energies.sum()).tolist() if total > 0 else []
    count = min(_SPECTRUM_POINTS, len(values))
    ranks = sorted({round(1 + index * (len(values) - 1) / max(count - 1, 1)) for index in range(count)})
    return Spectrum(
        ranks=tuple(ranks),
        values=tuple(float(f"{float(values[rank - 1]):.6g}") for rank in ranks),
        effective_rank=math.exp(float(-(shares * shares.log()).sum())) if total > 0 else 0.0,
        stable_rank=float(energies.sum() / energies[0]) if total > 0 else 0.0,
        rank_90=1 + sum(share < 0.90 for share in held) if held else 0,
        rank_99=1 + sum(share < 0.99 for share in held) if held else 0,
    )
