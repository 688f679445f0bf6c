"""The card of a compressed model: everything it says comes out of one report."""

import html
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from hf_lowrank.files.redaction import without_tokens
from hf_lowrank.methods.table import OF_TENSORS, known_method, paper_of
from hf_lowrank.planning.budgets import BUDGETS
from hf_lowrank.records.report import CompressionReport, QualityReport
from hf_lowrank.records.wording import (
    amount_in_words,
    change_in_words,
    examples_in_words,
    megabytes,
    milliseconds,
    shape_in_words,
    share,
    speed_in_words,
)
from hf_lowrank.sharing.cards.learning import learning_lines
from hf_lowrank.sharing.cards.metadata import card_data
from hf_lowrank.sharing.cards.pictures import LEGEND, LEGEND_OF_BITS, rank_picture
from hf_lowrank.sharing.cards.usage import snippet

REPORT_FILE = "compression_report.json"
KEPT_LINE = "<!-- What you write below this line is kept. -->"
_PRECISION = "ACCELERATE_MIXED_PRECISION"
_MODEL = "@MODEL@"  # where the dense model stands in a recorded command
_TEMPLATE = Path(__file__).with_name("template.md")
Row = tuple[str, str, str, str]


def make_card(report: CompressionReport, repo: str, notes: str = "") -> ModelCard:
    """The card of a model.

    Args:
        repo: Hub id or folder that the snippet loads from.
        notes: What stands below the last line, the user's own.
    """
    name = repo.rpartition("/")[2]
    text = _Text(report)
    paper = paper_of(report.method)
    card = ModelCard.from_template(
        card_data(report, name),
        template_path=str(_TEMPLATE),
        report_file=REPORT_FILE,
        title=name,
        summary=text.summary(),
        snippet=snippet(report, repo),
        rows=text.rows(),
        footnote=text.footnote(),
        making=text.making(),
        command=text.command()[1],
        command_language=text.command()[0],
        legend=LEGEND_OF_BITS if report.method == "rounding" else LEGEND,
        picture=rank_picture(report.modules),
        limits=text.limits(),
        method=report.method,
        bibtex="" if paper is None else paper.bibtex,
        kept_line=KEPT_LINE,
        notes=notes.strip(),
    )
    return ModelCard(without_tokens(str(card)).rstrip() + "\n")


@dataclass(frozen=True)
class _Text:
    """The sentences and rows of a card."""

    report: CompressionReport

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.report.provenance.get("settings", {}))

    def summary(self) -> str:
        report, origin = self.report, self.report.origin
        name = html.escape(origin.name) or "A dense model"
        base = f"[{html.escape(origin.base_model or '')}](https://huggingface.co/{origin.base_model})"
        link = base if origin.is_base else f"{name} (from {base})" if origin.base_model else name
        trained = ", trained on after compression" if report.training else ""
        what = f"**{report.kept_fraction:.1%} of its parameters**, its matrices replaced by smaller ones "
        what += f"(method `{report.method}`)"
        if report.bits:
            taken = f"**{share(report.size_bytes, report.dense_size_bytes)} of its bytes**, its numbers rounded to "
            taken += f"{report.bits[0]:.1f} to {report.bits[-1]:.1f} bits"
            what = taken if report.method == "rounding" else f"{taken}; {what}"
        return (
            f"{link} with {what}{trained}. It loads without hf_lowrank; the code it runs is in this "
            'repository: read it, and pin it with `revision="<commit>"`.'
        )

    def rows(self) -> list[Row]:
        report = self.report
        size = share(report.size_bytes, report.dense_size_bytes)
        work = share(report.multiply_adds, report.dense_multiply_adds)
        rows = [
            ("parameters", _count(report.dense_parameters), _count(report.parameters), f"{report.kept_fraction:.1%}"),
            *self._parts_rows(),
            ("weights", megabytes(report.dense_size_bytes), megabytes(report.size_bytes), size),
            ("multiply-adds a token", _count(report.dense_multiply_adds), _count(report.multiply_adds), work),
        ]
        if (latency := report.latency) is not None:
            name = f"latency of {shape_in_words(latency.batch_size, latency.sequence_length)} [1]"
            times = (milliseconds(latency.dense), milliseconds(latency.compressed))
            rows.append((name, *times, speed_in_words(latency.compressed)))
        return rows + [_quality_row(entry) for entry in report.quality]

    def _parts_rows(self) -> list[Row]:
        """For tensor methods what their papers count: all but the token embedding, and the replaced matrices."""
        if all(module.dense_parameters for module in self.report.modules):
            return []
        parts = self.report.parts.items()
        return [(f"... {name}", _count(old), _count(new), share(new, old)) for name, (old, new) in parts]

    def footnote(self) -> str:
        latency = self.report.latency
        notes = []
        if latency is not None:
            notes.append(f"[1] {latency.machine}; the median of interleaved rounds; other machines differ.")
        if not self.report.quality:
            notes.append(
                "**Quality was not evaluated.** `hf-lowrank evaluate PATH --dense MODEL ... --record` adds it."
            )
        return " ".join(notes)

    def making(self) -> list[str]:
        provenance, settings = self.report.provenance, self.settings
        lines = [self._method_line()]
        if text := provenance.get("text"):
            lines.append(_text_line(text))
        lines += learning_lines(provenance)
        lines += [_training_line(run) for run in self.report.training]
        seed = settings.get("seed", 0)
        versions = provenance.get("versions", {})
        lines.append(f"Seed {seed}; " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".")
        if self.report.origin.revision:
            lines.append(f"Dense model at commit `{self.report.origin.revision}`.")
        return lines

    def _method_line(self) -> str:
        settings = self.settings
        method = str(settings.get("method", ""))
        given = [f"`{name}={_said(settings[name])}`" for name in BUDGETS if name in settings]
        budget = f", budget {given[0]}" if given else ", its sizes as published"
        row = known_method(method)
        asked = ("allocation", "storage", *(["group"] if row is not None and row.takes == OF_TENSORS else []))
        details = [f"{name} `{settings[name]}`" for name in asked if name in settings]
        return f"Method `{method}`{budget}{''.join(f', {part}' for part in details)}; {self.report.matrices_in_words}."

    def command(self) -> tuple[str, str]:
        """Language and text of what made the model."""
        if "command" in self.report.provenance:
            return "bash", str(self.report.provenance["command"]).replace(_MODEL, self.report.origin.name)
        defaults = {"seed": 0}
        given = {name: value for name, value in self.settings.items() if defaults.get(name) != value}
        options = "".join(f", {name}={value!r}" for name, value in given.items())
        return "python", f'from hf_lowrank import compress\n\nsmall = compress("{self.report.origin.name}"{options})'

    def limits(self) -> list[str]:
        report = self.report
        lines = [
            "Where it was evaluated it is as good as the table says; elsewhere nobody knows. Evaluate it on your task."
        ]
        if (text := report.provenance.get("text")) and text.get("source") == "synthetic":
            lines.append("It was calibrated on synthetic data; some like yours would have been better.")
        if report.warning:
            lines.append(f"{report.warning.removeprefix('warning: ').capitalize()}.")
        if report.latency is not None and report.latency.compressed.speed_up <= 1:
            lines.append("It is smaller, not faster, on the machine above.")
        lines.append(
            "It needs `trust_remote_code=True`. Runtimes that know only stock classes (vLLM, llama.cpp) do not "
        )
        lines[-1] += "load it; `hf-lowrank decompress` turns it into a stock model of the dense size."
        lines.append("What the dense model does wrong, or should not be used for, holds for this one as well.")
        if report.origin.license is None:
            lines.append("The license of the dense model is not known here; its terms hold for this model too.")
        return lines


def shown_command(arguments: list[str], model: str) -> str:
    """A command line for the record: nothing of where files lie on this machine, and no token.

    Args:
        model: The argument that is the dense model; the card puts its name there.
    """
    shown = [_MODEL if part == model else Path(part).name if Path(part).is_absolute() else part for part in arguments]
    return shown_precision() + without_tokens(shlex.join(["hf-lowrank", *shown]))


def shown_precision() -> str:
    """What stands before a command where the environment sets the precision of trainings: Accelerate's variable."""
    kind = os.environ.get(_PRECISION)
    return f"{_PRECISION}={shlex.quote(kind)} " if kind else ""


def _quality_row(entry: QualityReport) -> Row:
    where = ":".join(part for part in (entry.dataset, entry.config, entry.split) if part)
    parts = (f"{entry.metric.replace('_', ' ')}, {entry.task} on {where}", examples_in_words(entry.scores))
    name = ", ".join(part for part in parts if part)
    now, before = entry.scores[entry.metric], entry.dense_scores.get(entry.metric)
    better = "higher" if entry.higher_is_better else "lower"
    if before is None:
        return name, "not measured", _score(now), f"{better} is better"
    change = change_in_words(entry.scores, entry.dense_scores, entry.metric, entry.higher_is_better)
    return name, _score(before), _score(now), f"{change}; {better} is better"


def _text_line(text: dict[str, Any]) -> str:
    kind = "tokens" if text["num_tokens"] else "ones"
    source = f"synthetic {kind}" if text["source"] == "synthetic" else f"`{text['source']}`"
    return f"Looked at {amount_in_words(text)} of {source} (sha256 `{text['sha256'][:16]}`)."


def _training_line(run: dict[str, Any]) -> str:
    what = "Pruned before compression and trained after it" if run.get("by") == "lpaf" else "Trained after compression"
    by = f" by `{run['by']}`" if "by" in run else ""
    return f"{what}{by}: {_pairs({name: value for name, value in run.items() if name != 'by'})}."


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_said(value)}" for name, value in values.items() if value is not None)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_pairs(value)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _score(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def _count(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,}"
