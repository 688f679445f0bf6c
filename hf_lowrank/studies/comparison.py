"""Methods side by side at equal bytes of the replaced matrices, on held-out text and on text of another kind."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from hf_lowrank.compression.compress import compress
from hf_lowrank.compression.settings import ComparisonOptions, CompressOptions
from hf_lowrank.compression.settled import Settings, settle_compression
from hf_lowrank.data.calibration import described_text, make_calibration
from hf_lowrank.data.rows import source_name
from hf_lowrank.errors import InputError
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.base import Step, Task, metric_of
from hf_lowrank.files.digests import digest_of, fingerprint, model_digest
from hf_lowrank.files.scratch import temporary_folder
from hf_lowrank.hosts.loading import find_tokenizer, load_dense
from hf_lowrank.hosts.multiply_adds import count_multiply_adds
from hf_lowrank.options import checked, split
from hf_lowrank.planning.sizes import parameter_bytes
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.records.report import make_report
from hf_lowrank.records.wording import amount_in_words, examples_in_words
from hf_lowrank.remote_code.lowrank_model import LowRankMixin
from hf_lowrank.studies.comparison_record import append_line, read_lines
from hf_lowrank.studies.comparison_report import Cell, Comparison, related
from hf_lowrank.version import __version__

# The standard of 2024, which the data-aware methods here are measured against.
STANDARD = "whitened_svd:uniform:low_rank"
DENSE = "dense"
HELD_OUT, OFF_CALIBRATION = "held-out", "off-calibration"
_RECORD = "comparison.jsonl"
_PARTS = ("method", "allocation", "storage", "refine_passes")

T = TypeVar("T")


@checked
def compare(
    model_or_id: PreTrainedModel | str | Path,
    dataset: Any,
    task: str | Task,
    *,
    off_calibration: Any = None,
    calibration: Any = None,
    tokenizer: Any = None,
    progress: Progress = no_progress,
    **options: Any,
) -> Comparison:
    """Compress by every method at every budget and score the results: `compare("bert", "test.txt", "masked-lm", ...)`.

    Args:
        dataset: What to score on, held out from the calibration; see `hf_lowrank.data.rows.load_rows`.
        task: A name out of `hf_lowrank.evaluation.TASKS`, or a task.
        off_calibration: A text of another kind than the calibration text, to score on as well.
        calibration: As for `compress`.
        tokenizer: Of the model.
        options: The fields of `ComparisonOptions` and, for all methods alike, of `CompressOptions`.

    Raises:
        InputError: If the model, the data, a method or an option cannot be used.
    """
    own, shared = split((ComparisonOptions, CompressOptions), options, "compare")
    settings = ComparisonOptions(**own)
    entries = _entries(settings, shared, calibration is not None)
    baseline = _baseline(settings.baseline, entries)
    task = task if isinstance(task, Task) else make_task(task)
    if settings.max_examples is not None:
        task = replace(task, max_examples=settings.max_examples)
    dense = load_dense(model_or_id)
    tokenizer = find_tokenizer(dense, tokenizer)
    data = {HELD_OUT: dataset} | ({} if off_calibration is None else {OFF_CALIBRATION: off_calibration})
    part, batch_size = task.prepare(dense), entries[0].settings.text.batch_size
    steps = {name: task.steps(tokenizer, source, batch_size, part) for name, source in data.items()}
    with temporary_folder() as scratch:
        bench = _Bench(dense, task, steps, Path(settings.work_dir or scratch), progress)
        bench.calibrate(calibration, tokenizer, entries)
        cells = [bench.dense_cell(), *(bench.cell(entry, tokenizer) for entry in entries)]
    metric = metric_of(task, next(iter(cells[-1].scores.values())))
    return Comparison(
        architecture=type(dense).__name__,
        task=task.name,
        metric=metric,
        higher_is_better=task.higher_is_better,
        texts=tuple(data),
        baseline=baseline,
        cells=tuple(related(cells, metric, baseline, task.higher_is_better)),
        about=_about(model_or_id, data, cells[0], bench.text, entries[0].settings.text.seed),
    )


def _about(model: Any, data: dict[str, Any], dense: Cell, text: dict[str, Any] | None, seed: int) -> dict[str, str]:
    """What a comparison was of, for its page."""
    name = model if isinstance(model, (str, Path)) else getattr(model, "name_or_path", "")
    about = {"model": Path(name).name if Path(name).is_dir() else str(name) or type(model).__name__}
    for place, source in data.items():
        about[f"{place} text"] = f"{source_name(source)}, {examples_in_words(dense.scores[place])}"
    if text is None:
        return about | {"calibration": "none: no method looks at text", "seed": str(seed)}
    return about | {"calibration": f"{text['source']}, {amount_in_words(text)}", "seed": str(seed)}


@dataclass(frozen=True)
class _Entry:
    """What is to be done for one cell."""

    method: str
    budget: float
    given: dict[str, Any]
    settings: Settings
    has_text: bool

    @property
    def resolved(self) -> list[Any]:
        """The method with nothing left to a default."""
        name, learning = self.settings.options.method, self.settings.learning
        how = (self.settings.allocation, self.settings.storage.linear)
        return [name, *how, learning.anchors, learning.passes]


def _entries(settings: ComparisonOptions, shared: dict[str, Any], has_text: bool) -> list[_Entry]:
    methods = [settings.methods] if isinstance(settings.methods, str) else settings.methods
    return [_entry(method, budget, shared, has_text) for budget in settings.budgets for method in methods]


def _entry(method: str, budget: float, shared: dict[str, Any], has_text: bool) -> _Entry:
    parts = method.split(":")
    if len(parts) > len(_PARTS) or not (len(parts) < len(_PARTS) or parts[-1].isdecimal()):
        raise InputError(f"A method is spelled NAME[:ALLOCATION[:STORAGE[:REFINE_PASSES]]], got {method!r}.")
    chosen: dict[str, Any] = {name: part for name, part in zip(_PARTS, parts, strict=False) if part}
    if "refine_passes" in chosen:
        chosen["refine_passes"] = int(chosen["refine_passes"])
    given = {**shared, **chosen, "keep_targets": budget}
    return _Entry(method, budget, given, settle_compression(given, has_text=has_text), has_text)


def _baseline(wanted: str | None, entries: Sequence[_Entry]) -> str | None:
    """The spelling, among the methods, of the baseline."""
    resolved = _entry(wanted or STANDARD, entries[0].budget, {}, entries[0].has_text).resolved
    found = [entry.method for entry in entries if entry.resolved == resolved]
    if not found and wanted is not None:
        raise InputError(f"baseline {wanted!r} is not among the methods. Add it there.")
    return found[0] if found else None


class _Bench:
    """Makes the cells and keeps a record of them, a line each as soon as it is done."""

    def __init__(
        self,
        dense: PreTrainedModel,
        task: Task,
        steps: dict[str, Sequence[Step]],
        work_dir: Path,
        progress: Progress,
    ) -> None:
        self._dense = dense
        self._task = task
        self._steps = steps
        self._work_dir = work_dir
        self._progress = progress
        self._calibration: list[Any] | None = None
        self._seen = ""  # fingerprint of the calibration
        self.text: dict[str, Any] | None = None  # the calibration, described
        work_dir.mkdir(parents=True, exist_ok=True)
        self._file = work_dir / _RECORD
        self._done = {line["fingerprint"]: line for line in read_lines(self._file)}
        about = [model_digest(dense), __version__, task.name, asdict(task)]
        self._about = {name: [*about, _fingerprint(of_text)] for name, of_text in steps.items()}

    def calibrate(self, source: Any, tokenizer: Any, entries: Sequence[_Entry]) -> None:
        """Read the calibration text, if any method looks at it: the same batches for all."""
        if any(entry.settings.runs_model for entry in entries):
            calibration = make_calibration(self._dense, source, tokenizer, entries[0].settings.text)
            batches = [*calibration.batches, *calibration.probes]
            self._calibration = None if source is None else batches
            self.text = described_text(source, batches)
            self._seen = self.text["sha256"]

    def dense_cell(self) -> Cell:
        """The model as it is."""
        return self._cell(DENSE, 1.0, [], lambda: self._dense)

    def cell(self, entry: _Entry, tokenizer: Any) -> Cell:
        """One method at one budget."""
        given = {**entry.given, "cache_dir": entry.given.get("cache_dir") or str(self._work_dir)}
        seen = self._seen if entry.settings.runs_model else ""
        about = [entry.settings.options.to_dict() | {"cache_dir": None}, entry.resolved, seen]
        progress = _Labelled(self._progress, f"{entry.method} {entry.budget:g}")
        make = partial(
            compress, self._dense, calibration=self._calibration, tokenizer=tokenizer, progress=progress, **given
        )
        return self._cell(entry.method, entry.budget, about, make)

    def _cell(self, method: str, budget: float, about: list[Any], make: Callable[[], Any]) -> Cell:
        keys = {text: digest_of([*self._about[text], *about]) for text in self._steps}
        missing = [text for text, key in keys.items() if key not in self._done]
        model = make() if missing else None
        for text in missing:
            line = {"method": method, "budget": budget, "text": text, "fingerprint": keys[text]}
            line |= {"sizes": _sizes(model), "scores": self._score(model, text, f"{method} {budget:g}")}
            append_line(self._file, line)
            self._done[keys[text]] = line
        lines = {text: self._done[key] for text, key in keys.items()}
        sizes = next(iter(lines.values()))["sizes"]
        scores = {text: line["scores"] for text, line in lines.items()}
        return Cell(method, budget, **sizes, scores=scores, g={}, relative_g={}, change={}, verdict={})

    def _score(self, model: Any, text: str, label: str) -> dict[str, float]:
        """The task's metrics; for another model than the dense one its agreement with that too."""
        models = {DENSE: self._dense} | ({} if model is self._dense else {"model": model})
        parts = {name: self._task.prepare(one) for name, one in models.items()}
        scores = self._task.compare(parts, self._steps[text], _Labelled(self._progress, f"{label}, {text}"))
        return scores[list(models)[-1]]


@dataclass(frozen=True)
class _Labelled:
    """Progress that says which cell it is of."""

    progress: Progress
    label: str

    def __call__(self, work: Sequence[T], description: str) -> Iterable[T]:
        return self.progress(work, f"{self.label}: {description}")


def _sizes(model: Any) -> dict[str, int | None]:
    is_compressed = isinstance(model, LowRankMixin)
    of_targets = sum(module.parameters for module in make_report(model).modules) if is_compressed else 0
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "size_bytes": parameter_bytes(model),
        "target_bytes": of_targets * model.dtype.itemsize if is_compressed else None,
        "multiply_adds": count_multiply_adds(model),
    }


def _fingerprint(steps: Sequence[Step]) -> str:
    targets = [step.targets.tolist() if isinstance(step.targets, torch.Tensor) else step.targets for step in steps]
    return digest_of([fingerprint([step.inputs for step in steps]), targets])
