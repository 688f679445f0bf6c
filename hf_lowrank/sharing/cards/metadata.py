"""What a card says to the Hub: its front matter, and the evaluation results in their own file."""

from collections.abc import Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml

from hf_lowrank.evaluation import TASKS
from hf_lowrank.records.report import CompressionReport, QualityReport
from hf_lowrank.records.wording import examples_in_words
from hf_lowrank.sharing.cards.usage import SENTENCES, pipeline_tag

RESULTS_FILE = ".eval_results/hf_lowrank.yaml"
_METRICS = {"spearman": "spearmanr", "pearson": "pearsonr", "matthews": "matthews_correlation"}


def card_data(report: CompressionReport, name: str) -> ModelCardData:
    """The front matter. What is unknown is left out: a license above all is never invented.

    Args:
        name: What the model is called in its `model-index`.
    """
    origin = report.origin
    results = [result for entry in report.quality for result in _results(entry)]
    more: dict[str, Any] = {"base_model_relation": _relation(report)} if origin.base_model else {}
    sentences = [SENTENCES] if origin.library_name == SENTENCES else []
    tags = ["hf_lowrank", "low-rank", "compression", report.method, "custom_code", *sentences, *report.tags]
    return ModelCardData(
        base_model=origin.base_model,
        license=origin.license,
        license_name=origin.license_name,
        license_link=origin.license_link,
        language=list(origin.language) or None,
        datasets=_datasets(report) or None,
        library_name="transformers",
        pipeline_tag=pipeline_tag(report),
        tags=[tag for tag in tags if tag],
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )


def results_file(quality: Sequence[QualityReport]) -> str | None:
    """The text of `RESULTS_FILE`: one entry for each data set of the Hub; None where there is none."""
    entries = [
        EvalResultEntry(
            dataset_id=entry.dataset,
            task_id=entry.config or "default",
            value=entry.scores[entry.metric],
            date=entry.date,
            notes=_notes(entry),
        )
        for entry in quality
        if entry.is_on_hub and _hub_task(entry)
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None


def _notes(entry: QualityReport) -> str:
    dense = entry.dense_scores.get(entry.metric)
    beside = "" if dense is None else f"; the dense model: {dense:.6g}"
    of = ", ".join(part for part in (entry.split or "the only split", examples_in_words(entry.scores)) if part)
    return f"{entry.metric} on {of}, measured by hf_lowrank{beside}"


def _hub_task(entry: QualityReport) -> str | None:
    return TASKS[entry.task].hub_task if entry.task in TASKS else None


def _relation(report: CompressionReport) -> str:
    """What the Hub calls it: it knows no compressed models, and files those without a word under finetunes."""
    return "quantized" if report.origin.is_base and not report.training else "finetune"


def _datasets(report: CompressionReport) -> list[str]:
    """Hub ids of what the model was calibrated and trained on."""
    text = report.provenance.get("text") or {}
    runs = [str(run.get("dataset", "")) for run in report.training]
    sources = [str(text.get("source", "")), *runs]
    # A file has no owner; a data set of the Hub is `owner/name`, and may be followed by its configuration and split.
    return list(dict.fromkeys(source.partition(":")[0] for source in sources if source.count("/") == 1))


def _results(entry: QualityReport) -> list[EvalResult]:
    hub_task = _hub_task(entry)
    if hub_task is None:
        return []
    dataset = f"{entry.dataset} ({entry.config})" if entry.config else entry.dataset
    return [
        EvalResult(
            task_type=hub_task,
            dataset_type=entry.dataset,
            dataset_name=dataset,
            dataset_config=entry.config,
            dataset_split=entry.split,
            metric_type=_METRICS.get(entry.metric, entry.metric),
            metric_name=entry.metric.replace("_", " "),
            metric_value=entry.scores[entry.metric],
        )
    ]
