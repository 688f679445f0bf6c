"""What a model is trained on and towards, and one training of it; every verb that trains goes through here."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from hf_lowrank.data.target_texts import reads_targets
from hf_lowrank.errors import InputError
from hf_lowrank.files.digests import digest_of, fingerprint
from hf_lowrank.files.scratch import temporary_folder, write_text
from hf_lowrank.hosts.gradients import leave_inference_mode_
from hf_lowrank.hosts.loading import require_runs
from hf_lowrank.progress import tell
from hf_lowrank.training.arguments import make_arguments
from hf_lowrank.training.distillation import DistillationTrainer, default_losses
from hf_lowrank.training.features import Features, PaddingCollator, hold_out, make_features, with_target_rows
from hf_lowrank.training.options import TrainingOptions
from hf_lowrank.training.preparation import prepared

_IDENTITY = "run.sha256"


@dataclass(frozen=True)
class Lesson:
    """What a model is trained on and towards.

    Args:
        losses: Weight of each term.
        features: What is trained on.
        held_out: What is chosen by.
        padding: The token that fills up rows.
        temperature: Of the logits.
        dropout: Whether the model's own stays.
    """

    teacher: PreTrainedModel
    losses: Mapping[str, float]
    features: Features
    held_out: Features
    padding: int
    temperature: float = 1.0
    dropout: bool = False


class _StepsTold(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        tell(f"training, {state.global_step} of {state.max_steps} steps done")


def make_lesson(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: Any,
    dataset: Any,
    eval_dataset: Any,
    options: TrainingOptions,
) -> Lesson:
    """The lesson of a model and its data; a tenth of them is set aside to choose by where nothing else is given.

    Raises:
        InputError: If the data cannot be used.
    """
    for one in (model, teacher):
        leave_inference_mode_(one)
    padding = getattr(tokenizer, "pad_token_id", None) or 0
    sets = [
        make_features(model, tokenizer, one, **options.of_data) for one in (dataset, eval_dataset) if one is not None
    ]
    if reads_targets(model):
        sets = [with_target_rows(features, teacher, padding) for features in sets]
    features, held_out = sets if len(sets) > 1 else hold_out(sets[0], options.seed)
    require_runs(model, PaddingCollator()(features[:1]))
    losses = dict(options.losses or default_losses(model, features))
    return Lesson(teacher, losses, features, held_out, padding, options.temperature)


def train(
    model: Any,
    lesson: Lesson,
    args: TrainingArguments,
    callbacks: Sequence[TrainerCallback],
    resume_from_checkpoint: str | bool | None = None,
) -> int:
    """Train a model in place, and return the number of steps; it has its own mode and precision afterwards."""
    with prepared(model):
        trainer = DistillationTrainer(
            model=model,
            args=args,
            train_dataset=lesson.features,
            eval_dataset=lesson.held_out,
            data_collator=PaddingCollator(lesson.padding),
            callbacks=[*callbacks, _StepsTold()],
            teacher=lesson.teacher,
            losses=lesson.losses,
            temperature=lesson.temperature,
            dropout=lesson.dropout,
        )
        trainer.remove_callback(PrinterCallback)  # standard output is the caller's
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        return int(trainer.state.global_step)


@contextmanager
def work_folder(work_dir: str | Path | None) -> Iterator[str]:
    """The folder for checkpoints, or a temporary one."""
    if work_dir is not None:
        yield str(work_dir)
        return
    with temporary_folder() as folder:
        yield str(folder)


def train_in(
    folder: str,
    model: Any,
    lesson: Lesson,
    options: TrainingOptions,
    callbacks: Sequence[TrainerCallback],
    **arguments: Any,
) -> int:
    """`train` with arguments of our own, in a folder with whose last checkpoint, if there is one, it goes on.

    Args:
        arguments: Of `make_arguments`.
    """
    keeps = "no" if options.work_dir is None else "epoch"
    if "input_ids" not in lesson.features[0]:  # images and sounds have no lengths to sort by
        arguments["train_sampling_strategy"] = "random"
    args = make_arguments(folder, batch_size=options.batch_size, seed=options.seed, save_strategy=keeps, **arguments)
    return train(model, lesson, args, callbacks, get_last_checkpoint(folder) if Path(folder).is_dir() else None)


def claim_(work_dir: str | Path, model: PreTrainedModel, lesson: Lesson, options: Mapping[str, Any]) -> None:
    """Make a work folder this run's.

    Raises:
        InputError: If it is another's, whose checkpoints would be taken for this one's.
    """
    tensors = [dict(one.state_dict()) for one in (model, lesson.teacher)]
    told = {name: value for name, value in options.items() if name not in ("work_dir", "cache_dir", "callbacks")}
    about = [fingerprint([*tensors, *lesson.features, *lesson.held_out]), model.config.to_dict(), told]
    identity = digest_of(about)
    file = Path(work_dir) / _IDENTITY
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_file() and file.read_text() != identity:
        raise InputError(
            f"work_dir {work_dir} holds a run of another model, other data or other options. Give an empty folder."
        )
    write_text(file, identity)
