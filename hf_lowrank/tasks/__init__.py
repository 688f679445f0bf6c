"""What a model is evaluated on: one file a task, one row of TASKS."""

from typing import Any

from hf_lowrank.errors import InputError
from hf_lowrank.extras import load_part
from hf_lowrank.options import settle
from hf_lowrank.remote_code.lowrank_plan import closest_name
from hf_lowrank.tasks.base import Task

# name -> module whose TASK it is; imported when asked for, since some need the optional dependencies
TASKS = {
    "masked-lm": "hf_lowrank.tasks.masked_lm",
    "causal-lm": "hf_lowrank.tasks.causal_lm",
    "text-classification": "hf_lowrank.tasks.text_classification",
    "text-regression": "hf_lowrank.tasks.text_regression",
    "question-answering": "hf_lowrank.tasks.question_answering",
    "similarity": "hf_lowrank.tasks.similarity",
    "agreement": "hf_lowrank.tasks.agreement",
}


def make_task(name: str, **options: Any) -> Task:
    """A task by name, with options of its own such as `block_length`.

    Raises:
        InputError: If there is no such task or option, or the task needs a package that is not installed.
    """
    if name not in TASKS:
        known = f"{', '.join(TASKS)}, got {name!r}. Closest: {closest_name(name, TASKS)!r}"
        raise InputError(f"task must be one of {known}.")
    task: Task = settle(load_part(TASKS[name], "train").TASK, options, f"task {name}")
    return task
