"""The result of `compare`: one cell a method and budget, the dense model first."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_lowrank.analysis_report import Grid


@dataclass(frozen=True)
class Cell:
    """One method at one budget.

    Args:
        method: As it was spelled; `dense` for the model as it is.
        budget: Fraction of the replaced matrices' parameters that stay.
        target_bytes: Of those matrices, None for the dense model.
        scores: By text: the task's metrics and, for a compressed model, its agreement with the dense one.
        g: By text: `ln(perplexity / dense perplexity)`; empty for other tasks.
        relative_g: By text: `g` over that of the baseline at the same budget; empty without one.
        change: By text: of the metric from the dense model's.
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


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`: the dense model first, then budget by budget.

    Args:
        metric: The score that counts.
        texts: Names of the texts the models are scored on.
        baseline: What `relative_g` is relative to.
    """

    architecture: str
    task: str
    metric: str
    higher_is_better: bool
    texts: tuple[str, ...]
    baseline: str | None
    cells: tuple[Cell, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def tables(self) -> list[Grid]:
        """One table: a row a cell."""
        columns = [(text, name, key) for text in self.texts for name, key in self._columns()]
        rows = [["method", "kept", "matrices", "model", *(f"{text}\n{name}" for text, name, _ in columns)]]
        for cell in self.cells:
            target = "" if cell.target_bytes is None else f"{cell.target_bytes / 1e6:.2f} MB"
            row = [cell.method, f"{cell.budget:g}", target, f"{cell.size_bytes / 1e6:.2f} MB"]
            rows.append(row + [_number(key(cell, text)) for text, _, key in columns])
        return [(f"{self.architecture}, {self.task}{self._legend()}", rows)]

    def _legend(self) -> str:
        if self.metric != "perplexity":
            return ""
        relative = "" if self.baseline is None else f", g0: that of {self.baseline} at the same size"
        return f"; g: ln(perplexity / dense perplexity){relative}"

    def _columns(self) -> list[tuple[str, Callable[[Cell, str], float | None]]]:
        columns: list[tuple[str, Callable[[Cell, str], float | None]]] = [(self.metric.replace("_", " "), self.score)]
        if self.metric == "perplexity":
            columns.append(("g", lambda cell, text: cell.g.get(text)))
            if self.baseline is not None:
                columns.append(("g/g0", lambda cell, text: cell.relative_g.get(text)))
            return columns
        columns.append(("change", lambda cell, text: cell.change.get(text)))
        if any("cosine_to_dense" in scores for cell in self.cells for scores in cell.scores.values()):
            columns.append(("cosine to dense", lambda cell, text: cell.scores[text].get("cosine_to_dense")))
        return columns

    def score(self, cell: Cell, text: str) -> float | None:
        """The metric of a cell on a text; None where the dense model has none."""
        return cell.scores[text].get(self.metric)


def related(cells: Sequence[Cell], metric: str, baseline: str | None) -> Iterable[Cell]:
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
        )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}" if abs(value) < 10 else f"{value:,.2f}"
