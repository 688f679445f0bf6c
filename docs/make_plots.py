"""Draw the pictures of docs from the tables of docs/results.md, so that each number is written down once.

pip install '.[plot]'
python docs/make_plots.py
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

DOCS = Path(__file__).parent
COLOURS = {"plain SVD": "#9aa0a6", "input-whitened SVD": "#1f77b4", "default": "#d62728"}
STORAGES = {"low_rank": "#1f77b4", "pivoted": "#d62728"}
MAKERS = {"OpenVINO": "#1f77b4", "ONNX Runtime": "#ff7f0e", "float16": "#9aa0a6", "hf_lowrank": "#d62728"}
Line = list[tuple[float, float]]  # (fraction kept, value)


def main() -> None:
    """Draw it."""
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    style = {"svg.hashsalt": "hf_lowrank", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9.5}
    with mpl.rc_context({**mpl.rcParamsDefault, "backend": "Agg", **style}):
        for name, (read, draw) in PICTURES.items():
            numbers = read(page)
            # The numbers ride in the file: a test sees when the tables have gone on without it.
            draw(numbers).savefig(DOCS / name, metadata={"Date": None, "Description": json.dumps(numbers)})
            print(DOCS / name)


def read_kept(page: str) -> dict[str, Any]:
    """Everything that is drawn: of each panel its lines by name, and the dense score where there is one."""
    sentences = _section(page, "Sentence encoder: ")
    causal = _section(page, "Language models")
    speed = list(_rows(_section(page, "Speed")))
    return {
        "dense": float(re.findall(r"Dense: (\d+\.\d+)", sentences)[0]),
        "sentences": _lines(next(_tables(sentences))),
        "causal": _lines(next(_tables(causal))),
        "speed": {
            storage: [(float(row[1]), float(row[3].rstrip("x"))) for row in speed if row[0] == f"`{storage}`"]
            for storage in STORAGES
        },
    }


def read_sizes(page: str) -> dict[str, list[tuple[float, float, float]]]:
    """By whom -> megabytes, score and cosine of each model made smaller."""
    found: dict[str, list[tuple[float, float, float]]] = {maker: [] for maker in MAKERS}
    for row in _rows(next(_tables(_section(page, "Bits: ")))):
        for maker in MAKERS:
            if row[0].strip("*").startswith(maker):
                found[maker].append((float(row[1]), float(row[4].split()[0]), float(row[5])))
    return found


def _section(page: str, start: str) -> str:
    sections = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    return next(text for title, text in sections.items() if title.startswith(start))


def _tables(text: str) -> Iterator[str]:
    yield from re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)


def _rows(text: str) -> Iterator[list[str]]:
    for line in re.findall(r"^\|(.*)\|$", text, re.MULTILINE):
        yield [cell.strip() for cell in line.split("|")]


def _lines(table: str) -> dict[str, Line]:
    """The rows that are drawn, up to where the columns speak of another text."""
    rows = list(_rows(table))
    kept: list[float] = []
    for cell in rows[0][1:]:
        fraction = float(re.findall(r"0\.\d+", cell)[0])
        if kept and fraction > kept[-1]:
            break
        kept.append(fraction)
    found = {}
    for row in rows[2:]:
        name = _drawn_as(row[0])
        if name is not None:
            found[name] = [
                (k, float(re.findall(r"\d+\.\d+", cell)[0])) for k, cell in zip(kept, row[1:], strict=False)
            ]
    return found


def _drawn_as(row: str) -> str | None:
    starts = {"plain SVD, uniform": "plain SVD", "input-whitened, uniform ranks": "input-whitened SVD"}
    name = row.strip("*")
    return "default" if "default" in name else next((v for k, v in starts.items() if name in (k, f"{k} ranks")), None)


def draw_kept(numbers: dict[str, Any]) -> Any:
    """Three panels: a sentence encoder, a language model, and the time of an encoder."""
    figure, panels = plt.subplots(1, 3, figsize=(10.2, 3.1), layout="constrained")
    for name, colour in COLOURS.items():
        points = [(1.0, numbers["dense"]), *numbers["sentences"][name]]
        _plot(panels[0], points, colour, name)
        growth = [(k, 100 * math.expm1(value)) for k, value in [(1.0, 0.0), *numbers["causal"][name]]]
        _plot(panels[1], growth, colour, name)
    for storage, colour in STORAGES.items():
        _plot(panels[2], [(1.0, 1.0), *numbers["speed"][storage]], colour, storage)
    titles = ("all-MiniLM-L6-v2", "GPT-2 of 3.5 M parameters", "encoder of BERT-base size")
    units = ("STS-B dev, Spearman x 100", "growth of WikiText-2 perplexity, %", "times as fast, 8 x 128 tokens")
    for panel, title, unit in zip(panels, titles, units, strict=True):
        panel.set(title=title, ylabel=unit, xlabel="kept of the replaced matrices, %")
        panel.invert_xaxis()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False)
    return figure


def _plot(panel: Any, points: Line, colour: str, label: str) -> None:
    panel.plot([100 * k for k, _ in points], [v for _, v in points], "o-", color=colour, label=label, markersize=3.5)


def draw_sizes(numbers: dict[str, list[tuple[float, float, float]]]) -> Any:
    """Two panels over megabytes: how far the embeddings are from the dense ones, and a score of what they are for."""
    figure, panels = plt.subplots(1, 2, figsize=(10.2, 3.1), layout="constrained")
    for maker, colour in MAKERS.items():
        sizes, scores, cosines = zip(*sorted(numbers[maker]), strict=True)
        line = "o-" if maker == "hf_lowrank" else "o"
        panels[0].plot(sizes, [1 - cosine for cosine in cosines], line, color=colour, label=maker, markersize=4)
        panels[1].plot(sizes, scores, line, color=colour, label=maker, markersize=4)
    panels[0].set(yscale="log", ylabel="1 - cosine to the dense embeddings")
    panels[1].set(ylabel="STS-B test, Spearman x 100")
    for panel in panels:
        panel.set(xlabel="MB of weights (dense: 90.9)", xscale="log", title="all-MiniLM-L6-v2, nothing trained")
        panel.set_xticks([3.5, 5, 7, 9, 13, 23, 45], ["3.5", "5", "7", "9", "13", "23", "45"])
        panel.minorticks_off()
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False)
    return figure


PICTURES = {"results.svg": (read_kept, draw_kept), "sizes.svg": (read_sizes, draw_sizes)}

if __name__ == "__main__":
    main()
