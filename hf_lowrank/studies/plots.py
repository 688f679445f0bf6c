"""Pictures of an analysis or a comparison, alone (.png) or on one page with its tables (.html)."""

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hf_lowrank.errors import InputError
from hf_lowrank.files.scratch import write_file, write_text
from hf_lowrank.records.wording import examples_in_words
from hf_lowrank.studies.analysis_report import Analysis, MatrixAnalysis
from hf_lowrank.studies.comparison_report import Cell, Comparison

SUFFIXES = (".png", ".html")
_DPI = 110
_COLUMNS = 4  # of the small multiples
_WIDE_RANGE = 4  # of perplexities: beyond it the axis is logarithmic
_MOST_TICKS, _MOST_NUMBERS = 12, 600  # in the maps
_LINE_STYLES = ("-", "--", "-.", ":")
_MARKERS = "osD^vPX*"
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")  # Okabe and Ito
_STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:2em auto;max-width:1300px;padding:0 1em;color:#222}
img{max-width:100%}table{border-collapse:collapse;margin:1em 0;font-size:13px}
th,td{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}thead th{border-bottom:2px solid #888}"""


def save_page(result: Analysis | Comparison, path: str | Path) -> None:
    """Write the picture of a result as `.png`, or with the tables as an `.html` file that needs no other.

    Raises:
        InputError: If the name ends in neither, or there is no such folder.
    """
    path = Path(path)
    check_output(path)
    figure = analysis_figure(result) if isinstance(result, Analysis) else comparison_figure(result)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=_DPI)
    if path.suffix.lower() == ".png":
        write_file(path, lambda draft: draft.write_bytes(picture.getvalue()))
    else:
        write_text(path, _page(result, picture.getvalue()))


def check_output(path: str | Path) -> None:
    """Check the name of a file to write.

    Raises:
        InputError: If its suffix is none of `SUFFIXES`, or there is no folder for it.
    """
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"There is no folder {Path(path).parent} to write {Path(path).name} to. Make it first.")
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"A plot is written as {' or '.join(SUFFIXES)}, got {str(path)!r}.")


def analysis_figure(analysis: Analysis) -> Figure:
    """Size against quality, the spectrum of every kind of matrix over depth, and what each budget keeps where."""
    kinds = _by_kind(analysis.matrices)
    num_rows = math.ceil(len(kinds) / _COLUMNS)
    targets = _by_kind([matrix for matrix in analysis.matrices if matrix.planned and matrix.role == "block"])
    num_layers = max((len(group) for group in targets.values()), default=1)
    heights = [3.6, 0.5 + 2.3 * num_rows, 1.5 + max(0.3 * num_layers, 1.6)]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    top, middle, bottom = np.asarray(figure.subfigures(3, 1, height_ratios=heights))
    how = f"{analysis.method}, {analysis.allocation} allocation, {analysis.storage} storage"
    figure.suptitle(f"{analysis.architecture}: {how}", fontsize=13)
    _draw_sizes(top, analysis)
    _draw_spectra(middle, kinds, num_rows, analysis.method)
    if targets:
        _draw_maps(bottom, analysis, targets)
    return figure


def comparison_figure(comparison: Comparison) -> Figure:
    """One panel a text: the metric of every method over the bytes of the replaced matrices."""
    figure = Figure(figsize=(6.5 * len(comparison.texts), 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{comparison.architecture}, {comparison.task}", fontsize=13)
    methods = list(dict.fromkeys(cell.method for cell in comparison.cells[1:]))
    panels = figure.subplots(1, len(comparison.texts), squeeze=False, sharey=True)[0]
    for panel, text in zip(panels, comparison.texts, strict=True):
        for index, method in enumerate(methods):
            cells = [cell for cell in comparison.cells[1:] if cell.method == method]
            points = [((cell.target_bytes or 0) / 1e6, comparison.score(cell, text)) for cell in cells]
            panel.plot(*zip(*sorted(points), strict=True), label=method, **_looks(index))
            for cell, (place, _) in zip(cells, points, strict=True):
                panel.vlines(place, *_ends(comparison, cell, text), color=_looks(index)["color"], linewidth=1)
        if (dense := comparison.score(comparison.cells[0], text)) is not None:
            panel.axhline(dense, color="black", linestyle=(0, (1, 2)), label="dense")
            panel.annotate(f"dense: {dense:.4g}", (0.02, dense), xycoords=panel.get_yaxis_transform(), va="bottom")
        panel.set_xlabel("size of the replaced matrices in MB")
        size = examples_in_words(comparison.cells[0].scores[text])
        panel.set_title(f"{text} text, {size}; bars: 95 % interval of the change from dense", fontsize=9)
        panel.grid(alpha=0.3)
    scores = [comparison.score(cell, text) for cell in comparison.cells for text in comparison.texts]
    known = [score for score in scores if score is not None]
    if comparison.metric == "perplexity" and max(known) > _WIDE_RANGE * min(known):
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[0].yaxis.set_minor_formatter(NullFormatter())
    better = "higher" if comparison.higher_is_better else "lower"
    panels[0].set_ylabel(f"{comparison.metric.replace('_', ' ')} ({better} is better)")
    panels[-1].legend(fontsize=9)
    return figure


def _ends(comparison: Comparison, cell: Cell, text: str) -> list[float]:
    """Between which scores the interval of a cell's change from dense puts it; nothing where there is none."""
    dense, scores = comparison.score(comparison.cells[0], text), cell.scores[text]
    if dense is None or "change_low" not in scores:
        return [math.nan, math.nan]
    unit = dense if comparison.metric == "perplexity" else 1.0
    return [dense + unit * scores[name] for name in ("change_low", "change_high")]


def _draw_sizes(figure: Any, analysis: Analysis) -> None:
    left, right = figure.subplots(1, 2)
    models = [analysis.dense, *analysis.budgets]
    for panel, unit, amounts in (
        (left, "size of the weights in MB", [model.size_bytes / 1e6 for model in models]),
        (right, "million multiply-adds a token", [model.multiply_adds / 1e6 for model in models]),
    ):
        panel.plot(amounts, [model.predicted_loss for model in models], label=analysis.loss_name, **_looks(0))
        if analysis.dense.measured_damage is not None:
            measured = [model.measured_damage or 0.0 for model in models]
            panel.plot(amounts, measured, label="measured damage of the whole model", **_looks(1))
        for amount, model in zip(amounts, models, strict=True):
            label = "dense" if model is analysis.dense else f"{model.budget:g}"
            spot = (amount, max(model.predicted_loss, model.measured_damage or 0.0))
            panel.annotate(label, spot, xytext=(0, 6), textcoords="offset points", fontsize=9, ha="center")
        panel.set_xlabel(unit)
        is_damage = analysis.dense.measured_damage is not None
        panel.set_ylabel("damage (KL in nats, or 1 - cosine)" if is_damage else analysis.loss_name)
        panel.margins(x=0.08, y=0.12)
        panel.grid(alpha=0.3)
    right.legend(fontsize=9)
    figure.suptitle(f"Size and quality (points: {analysis.budget_kind})", fontsize=11)


def _draw_spectra(figure: Any, kinds: dict[str, list[MatrixAnalysis]], num_rows: int, method: str) -> None:
    panels = figure.subplots(num_rows, _COLUMNS, squeeze=False, sharey=True)
    for panel in panels.flat[len(kinds) :]:
        panel.set_visible(False)
    for index, (panel, (name, group)) in enumerate(zip(panels.flat, kinds.items(), strict=False)):
        shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(group)))
        for layer, matrix in enumerate(group):
            spectrum = matrix.metric_spectrum or matrix.spectrum
            heights = np.maximum(np.array(spectrum.values) / (spectrum.values[0] or 1.0), 1e-6)
            style = _LINE_STYLES[min(layer * len(_LINE_STYLES) // len(group), len(_LINE_STYLES) - 1)]
            is_end = layer in (0, len(group) - 1) and len(group) > 1
            label = f"layer {_layer(matrix)}" if is_end else None
            panel.plot(spectrum.ranks, heights, color=shades[layer], linestyle=style, linewidth=1.2, label=label)
        panel.axvline(group[0].break_even_rank, color="black", linewidth=0.8, linestyle=":")
        panel.set_yscale("log")
        panel.set_ylim(1e-4, 1.5)
        panel.set_title(f"{_short(name)}  ({' x '.join(map(str, group[0].shape))})", fontsize=9)
        panel.tick_params(labelsize=8)
        if len(group) > 1:
            panel.legend(fontsize=7, loc="lower left")
        if index % _COLUMNS == 0:
            panel.set_ylabel("value / largest", fontsize=8)
        panel.set_xlabel("rank", fontsize=8)
    is_metric = any(matrix.metric_spectrum for group in kinds.values() for matrix in group)
    metric = f"of the targets in the metric of {method}" if is_metric else "of the weights"
    lines = "a line a layer, the first dark; vertical: break-even rank of two factors"
    figure.suptitle(f"Singular values {metric} ({lines})", fontsize=11)


def _draw_maps(figure: Any, analysis: Analysis, maps: dict[str, list[MatrixAnalysis]]) -> None:
    panels = figure.subplots(1, len(analysis.budgets), squeeze=False, sharey=True)[0]
    layers = sorted({_layer(matrix) for group in maps.values() for matrix in group})
    step = math.ceil(len(layers) / _MOST_TICKS)
    for budget, panel in enumerate(panels):
        kept = np.full((len(layers), len(maps)), np.nan)
        for column, group in enumerate(maps.values()):
            for matrix in group:
                planned = matrix.planned[budget]
                kept[layers.index(_layer(matrix)), column] = planned.parameters / matrix.parameters
        image = panel.imshow(kept, vmin=0, vmax=1, cmap="cividis", aspect="auto", origin="lower")
        if kept.size * len(panels) <= _MOST_NUMBERS:
            _write_cells(panel, kept)
        panel.set_xticks(range(len(maps)), [_short(name) for name in maps], rotation=60, ha="right", fontsize=8)
        panel.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
        panel.set_title(f"{analysis.budget_kind} {analysis.budgets[budget].budget:g}", fontsize=10)
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=panels, label="fraction kept", pad=0.01)
    figure.suptitle("Fraction of the parameters of each matrix that is kept (1: stays dense)", fontsize=11)


def _write_cells(panel: Any, kept: Any) -> None:
    for (row, column), value in np.ndenumerate(kept):
        if not math.isnan(value):
            text = "1" if value == 1 else f"{value:.2f}".lstrip("0")
            panel.text(
                column, row, text, ha="center", va="center", fontsize=7, color="white" if value < 0.55 else "black"
            )


def _by_kind(matrices: Sequence[MatrixAnalysis]) -> dict[str, list[MatrixAnalysis]]:
    """Matrices that have the same place in their block, by depth."""
    kinds: dict[str, list[MatrixAnalysis]] = {}
    for matrix in matrices:
        name = ".".join(part for part in matrix.name.split(".") if not part.isdigit())
        kinds.setdefault(name, []).append(matrix)
    return kinds


def _layer(matrix: MatrixAnalysis) -> int:
    return next((int(part) for part in matrix.name.split(".") if part.isdigit()), 0)


def _short(name: str) -> str:
    """The last parts of a name, those that tell matrices of a block apart."""
    parts = [
        part for part in name.split(".") if part not in ("encoder", "layer", "layers", "transformer", "h", "model")
    ]
    return ".".join(parts[-3:])


def _looks(index: int) -> dict[str, Any]:
    """Line, marker and color of one curve: told apart without color."""
    return {
        "color": _COLORS[index % len(_COLORS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINE_STYLES[index % len(_LINE_STYLES)],
    }


def _page(result: Analysis | Comparison, picture: bytes) -> str:
    title = f"{result.architecture}: {'analysis' if isinstance(result, Analysis) else 'comparison'}"
    image = f'<img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    tables = "".join(f"<h2>{escape(name)}</h2>{_table(rows)}" for name, rows in result.tables())
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    end = f"<p>{escape(result.recommendation)}</p>" if isinstance(result, Analysis) else ""
    body = f"<h1>{escape(title)}</h1>{image}{tables}{end}"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    head = "".join(f"<th>{escape(cell).replace(chr(10), '<br>')}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
