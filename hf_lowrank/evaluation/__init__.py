"""What a model is evaluated on: one file a task, one row of TASKS."""

from dataclasses import dataclass
from typing import Any

from hf_lowrank.errors import InputError
from hf_lowrank.extras import load_part
from hf_lowrank.options import settle
from hf_lowrank.remote_code.lowrank_plan import closest_name


@dataclass(frozen=True)
class TaskRow:
    """What there is to say of a task before it is imported.

    Args:
        home: Module whose `TASK` it is; some need the optional dependencies.
        data: What is read, in words.
        hub_task: What the Hub calls it; None where its results are no benchmark.
    """

    home: str
    data: str
    hub_task: str | None = None


_TEXT, _LABELLED = "a column of text", "text and a label"

TASKS: dict[str, TaskRow] = {
    "masked-lm": TaskRow("hf_lowrank.evaluation.masked_lm", _TEXT, "fill-mask"),
    "causal-lm": TaskRow("hf_lowrank.evaluation.causal_lm", _TEXT, "text-generation"),
    "text-classification": TaskRow("hf_lowrank.evaluation.text_classification", _LABELLED, "text-classification"),
    # The Hub knows no regression.
    "text-regression": TaskRow("hf_lowrank.evaluation.text_regression", _LABELLED, "text-classification"),
    "question-answering": TaskRow(
        "hf_lowrank.evaluation.question_answering", "rows or a file as in SQuAD", "question-answering"
    ),
    "seq2seq-lm": TaskRow("hf_lowrank.evaluation.seq2seq_lm", "a text to read and one to write"),
    "image-classification": TaskRow(
        "hf_lowrank.evaluation.image_classification", "an image and a label, or a folder", "image-classification"
    ),
    "similarity": TaskRow("hf_lowrank.evaluation.similarity", "two sentences and a score", "sentence-similarity"),
    "agreement": TaskRow("hf_lowrank.evaluation.agreement", _TEXT),
}


def make_task(name: str, **options: Any) -> Any:
    """A `Task` by name, with options of its own such as `block_length`.

    Raises:
        InputError: If there is no such task or option, or the task needs a package that is not installed.
    """
    if not isinstance(name, str) or name not in TASKS:
        known = f"{', '.join(TASKS)}, got {name!r}. Closest: {closest_name(str(name), TASKS)!r}"
        raise InputError(f"task must be one of {known}.")
    return settle(load_part(TASKS[name].home, "train").TASK, options, f"task {name}")
