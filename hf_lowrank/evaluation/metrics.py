"""Metrics as `evaluate.Metric`, over scikit-learn and scipy, so that nothing is downloaded; values are fractions."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
from scipy.stats import pearsonr, rankdata, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ClassificationMetric(evaluate.Metric):  # type: ignore[misc]
    """Accuracy, F1 (of class 1 where there are two, else the mean over classes) and Matthews correlation."""

    def _info(self) -> evaluate.MetricInfo:
        return _information("classification", self.__doc__, datasets.Value("int64"))

    def _compute(self, predictions: Sequence[int], references: Sequence[int], average: str) -> dict[str, float]:
        return {
            "accuracy": float(accuracy_score(references, predictions)),
            "f1": float(f1_score(references, predictions, average=average, zero_division=0)),
            "matthews": float(matthews_corrcoef(references, predictions)),
        }


class CorrelationMetric(evaluate.Metric):  # type: ignore[misc]
    """Spearman's rank correlation, ties sharing their mean rank, and Pearson's correlation."""

    def _info(self) -> evaluate.MetricInfo:
        return _information("correlation", self.__doc__, datasets.Value("float64"))

    def _compute(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        if len(set(predictions)) < 2 or len(set(references)) < 2:
            return {"spearman": 0.0, "pearson": 0.0}  # what never varies follows nothing
        return {
            "spearman": float(spearmanr(references, predictions).statistic),
            "pearson": float(pearsonr(references, predictions).statistic),
        }


class AnswerMetric(evaluate.Metric):  # type: ignore[misc]
    """SQuAD's exact match and F1 of the words of an answer, the best over the gold answers of a question.

    Both are compared in lower case, without punctuation, articles and superfluous spaces.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _information("answers", self.__doc__, datasets.Value("string"), datasets.List(datasets.Value("string")))

    def _compute(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        exact = [max(_normal(given) == _normal(gold) for gold in golds) for given, golds in pairs]
        return {"f1": sum(word_overlaps(predictions, references)) / len(pairs), "exact_match": sum(exact) / len(pairs)}


def compute(
    metric_class: Any, predictions: Sequence[Any], references: Sequence[Any], **options: Any
) -> dict[str, float]:
    """The values of a metric; nothing is written to disk."""
    metric = metric_class(keep_in_memory=True)
    values: dict[str, float] = metric.compute(predictions=predictions, references=references, **options)
    return values


def word_overlaps(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """F1 of the words of every answer, the best over its gold answers."""
    pairs = zip(predictions, references, strict=True)
    return [max(_word_f1(given, gold) for gold in golds) for given, golds in pairs]


def rank_correlation(examples: Any) -> float:
    """Spearman's correlation of the two columns of an array; 0 where one never varies."""
    ranks = rankdata(examples, axis=0)
    ranks -= ranks.mean(axis=0)
    (first, both), (_, second) = ranks.T @ ranks
    return float(both / math.sqrt(first * second)) if first * second else 0.0


def _information(name: str, description: str | None, value: Any, reference: Any = None) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation="",
        module_name=name,
        features=datasets.Features({"predictions": value, "references": value if reference is None else reference}),
    )


def _normal(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _word_f1(given: str, gold: str) -> float:
    ours, theirs = _normal(given), _normal(gold)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))
