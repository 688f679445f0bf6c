"""The result of `compare`: one cell a method and budget, the dense model first."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_lowrank.records.wording import change_in_words, verdict
from hf_lowrank.studies.analysis_report import Grid

# How far what a model says is from the dense model, and what the table calls it; the first there is.
_DISTANCES = {
    "kl_from_dense": "KL from dense",
    "rmse_from_dense": "RMSE",
    "cosine_to_dense": "cosine to dense",
}


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Args:
        method: As it was spelled; `dense` for the model as it is.
        budget: Fraction of the replaced matrices' parameters that stay.
        target_bytes: Of those matrices, None for the dense model.
        scores: By text: the task's metrics and, for a compressed model, its agreement with the dense one; see
            `hf_lowrank.evaluation.base.Task.compare`.
        g: By text: `ln(perplexity / dense perplexity)`; empty for other tasks.
        relative_g: By text: `g` over that of the baseline at the same budget; empty without one.
        change: By text: of the metric from the dense model's.
        verdict: By text: whether that is `better`, `worse` or `unclear`; see `hf_lowrank.records.wording`.
    """

    method: str
    budget: float
    parameters: int
    size_bytes: int
    target_bytes: int | None
    multiply_adds: int
    scores: dict[str, dict[str, float]]
    g: dict[str, float]
    relative_g: dict[str, float]
    change: dict[str, float]
    verdict: dict[str, str]


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: the dense model first, then budget by budget.

    Args:
        metric: The score that counts.
        texts: Names of the texts the models are scored on.
        baseline: What `relative_g` is relative to.
        about: What was compared, name -> value: the model, the data and how many examples, the calibration, the seed.
    """

    architecture: str
    task: str
    metric: str
    higher_is_better: bool
    texts: tuple[str, ...]
    baseline: str | None
    cells: tuple[Cell, ...]
    about: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def tables(self) -> list[Grid]:
        """A row a cell; then what was compared."""
        columns = [(text, name, key) for text in self.texts for name, key in self._columns()]
        rows = [["method", "kept", "matrices", "model", *(f"{text}\n{name}" for text, name, _ in columns)]]
        for cell in self.cells:
            target = "" if cell.target_bytes is None else f"{cell.target_bytes / 1e6:.2f} MB"
            row = [cell.method, f"{cell.budget:g}", target, f"{cell.size_bytes / 1e6:.2f} MB"]
            rows.append(row + [_shown(key(cell, text)) for text, _, key in columns])
        about = [["", "value"], *([name, value] for name, value in self.about.items())]
        return [(f"{self.architecture}, {self.task}{self._legend()}", rows), ("what was compared", about)]

    def _legend(self) -> str:
        if self.metric != "perplexity":
            return ""
        relative = "" if self.baseline is None else f", g0: that of {self.baseline} at the same size"
        return f"; g: ln(perplexity / dense perplexity){relative}"

    def _columns(self) -> list[tuple[str, Callable[[Cell, str], float | str | None]]]:
        columns: list[tuple[str, Callable[[Cell, str], float | str | None]]] = [
            (self.metric.replace("_", " "), self.score)
        ]
        if self.metric == "perplexity":
            columns.append(("g", lambda cell, text: cell.g.get(text)))
            if self.baseline is not None:
                columns.append(("g/g0", lambda cell, text: cell.relative_g.get(text)))
        columns.append(("change, 95 % interval", self.change))
        there = {name for cell in self.cells for scores in cell.scores.values() for name in scores}
        if name := next((name for name in _DISTANCES if name in there and name != self.metric), None):
            columns.append((_DISTANCES[name], lambda cell, text: cell.scores[text].get(name)))
        return columns

    def change(self, cell: Cell, text: str) -> str:
        """The change from dense on a text in words; empty for the dense model."""
        if cell is self.cells[0]:
            return ""
        return change_in_words(cell.scores[text], self.cells[0].scores[text], self.metric, self.higher_is_better)

    def score(self, cell: Cell, text: str) -> float | None:
        """The metric of a cell on a text; None where the dense model has none."""
        return cell.scores[text].get(self.metric)


def related(cells: Sequence[Cell], metric: str, baseline: str | None, higher_is_better: bool) -> Iterable[Cell]:
    """The cells with what they are relative to the dense one and to the baseline at the same budget."""
    dense = {text: scores[metric] for text, scores in cells[0].scores.items() if metric in scores}
    g: dict[tuple[str, float, str], float] = {}
    for cell in cells if metric == "perplexity" else ():
        for text, scores in cell.scores.items():
            g[cell.method, cell.budget, text] = math.log(scores[metric] / dense[text])
    for cell in cells:
        own = {text: g[key] for text in dense if (key := (cell.method, cell.budget, text)) in g}
        base = {text: g.get((baseline or "", cell.budget, text), 0.0) for text in dense}
        yield replace(
            cell,
            g=own,
            relative_g={text: own[text] / base[text] for text in own if base[text] > 0},
            change={text: cell.scores[text][metric] - was for text, was in dense.items()},
            verdict={text: verdict(cell.scores[text], higher_is_better) for text in dense},
        )


def _shown(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"
