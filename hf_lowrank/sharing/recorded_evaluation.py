"""Evaluations that are kept: appended to the record of the model they were made with, and so to its card."""

import hashlib
import json
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_lowrank.evaluation.evaluation import Evaluation
from hf_lowrank.options import checked
from hf_lowrank.records.latency import LatencyReport
from hf_lowrank.records.report import CompressionReport, QualityReport
from hf_lowrank.sharing.inspection import saved_report
from hf_lowrank.sharing.record import write_record


@checked
def record_evaluation(folder: str | Path, evaluation: Evaluation, dataset: str) -> CompressionReport:
    """Append an evaluation to the report and the card of a saved model, and its speed if none is recorded there.

    Args:
        folder: Of the model that was evaluated.
        dataset: The file or `NAME:CONFIG:SPLIT` it was evaluated on.

    Returns:
        The report, which is written.

    Raises:
        InputError: If the folder holds no compressed model, or its record is damaged.
    """
    report = with_quality(saved_report(folder), quality_report(evaluation, dataset))
    report = replace(report, latency=report.latency or _latency_report(evaluation))
    write_record(Path(folder), report)
    return report


def _latency_report(evaluation: Evaluation) -> LatencyReport | None:
    dense, model = evaluation.dense, evaluation.model
    if dense is None or dense.latency is None or model.latency is None:
        return None
    shape = evaluation.batch_size, evaluation.sequence_length
    return LatencyReport(*shape, evaluation.machine, dense.latency, model.latency)


def quality_report(evaluation: Evaluation, dataset: str) -> QualityReport:
    """An evaluation for the record.

    Args:
        dataset: The file, folder or `NAME:CONFIG:SPLIT` it was made on.
    """
    file = Path(dataset)
    is_here = file.exists()
    name, config, split = [*dataset.split(":"), "", ""][:3]
    return QualityReport(
        task=evaluation.task,
        # The folder's name tells which `test.tsv` it was, and nothing of where it lies.
        dataset="/".join(file.absolute().parts[-2:]) if is_here else name,
        config=None if is_here else config or None,
        split=None if is_here else split or None,
        is_on_hub=not is_here,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None,
        metric=evaluation.metric,
        higher_is_better=evaluation.higher_is_better,
        options=evaluation.options,
        scores=evaluation.model.scores,
        dense_scores=evaluation.dense.scores if evaluation.dense is not None else {},
        date=datetime.now(timezone.utc).date().isoformat(),
    )


def with_quality(report: CompressionReport, entry: QualityReport) -> CompressionReport:
    """The report with one more evaluation, in the place of an earlier one of the same task, data and options."""
    others = tuple(one for one in report.quality if _subject(one) != _subject(entry))
    return replace(report, quality=(*others, entry))


def _subject(entry: QualityReport) -> tuple[Any, ...]:
    return (
        entry.task,
        entry.dataset,
        entry.config,
        entry.split,
        entry.sha256,
        json.dumps(entry.options, sort_keys=True),
    )
