"""`recover`: train a compressed model back towards the dense one, and never make it worse."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from hf_lowrank.compression.conversion import as_two_factors
from hf_lowrank.compression.trained_rounding import as_numbers
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.gradients import with_gradients
from hf_lowrank.hosts.heads import says_vectors
from hf_lowrank.hosts.loading import find_tokenizer, held_compressed_model, load_dense
from hf_lowrank.methods.table import known_method
from hf_lowrank.options import checked, settle
from hf_lowrank.sharing.saving import load_compressed
from hf_lowrank.training.callbacks.best import BestStateCallback
from hf_lowrank.training.callbacks.rounded import StraightThroughCallback
from hf_lowrank.training.distillation import check_teacher
from hf_lowrank.training.lessons import Lesson, claim_, make_lesson, train, train_in, work_folder
from hf_lowrank.training.options import RecoveryOptions
from hf_lowrank.training.processes import check_launch

# Peak of AdamW's learning rate, found by the loss on examples set aside. On classifiers pairs come as far at twice the
# first in hundreds of steps, and less far in a hundred or where little was lost. A language model has a target at
# every token, a model without a head a whole vector, and far less noise in their steps; the number behind a rounded
# one has half a step of its grid to go before anything changes. What else a method has, its row says.
_RATE, _FAST_RATE = 5e-5, 5e-4
_STEP_DOWN = 4


@dataclass(frozen=True)
class Recovery:
    """What a recovery did.

    Args:
        before: Loss on examples that were not trained on, before.
        after: The same of the state that was kept.
        step: The one after which that was; 0 if none helped.
        steps: All that were made.
        learning_rate: Its peak.
        losses: Weight of each term.
    """

    before: float
    after: float
    step: int
    steps: int
    learning_rate: float
    losses: dict[str, float]


@checked
@with_gradients
def recover(
    model: PreTrainedModel | str | Path,
    *,
    teacher: PreTrainedModel | str | Path,
    dataset: Any,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    args: TrainingArguments | None = None,
    resume_from_checkpoint: str | bool | None = None,
    **options: Any,
) -> Any:
    """Heal a compressed model: `recover(small, teacher="my-bert", dataset="train.tsv")`.

    Every parameter but dense embedding tables is trained to say what the teacher says (`logits`), to do in every block
    what the teacher does (`hidden`) and, where the data have labels, to be right (`task`). Pivoted layers are trained
    as two factors of the same rank, rounded weights as they are rounded: see `StraightThroughCallback`. The state with
    the least loss on held-out examples is kept; the one before the training competes.

    Args:
        model: A compressed model, which is trained in place, or its folder or Hub id.
        teacher: The dense model it came from, or its folder or Hub id.
        dataset: Text, with labels or without; see `make_features` for what each head makes of it.
        eval_dataset: Examples to choose by; None sets a tenth of `dataset` aside. Not those a result is reported on.
        tokenizer: For the text; None takes the one saved with the model or the teacher.
        args: How to train. Default: 3 epochs of batches of 16, AdamW without decay at `default_learning_rate`,
            warmed up over a tenth, then falling as a cosine; where no step helps, once more at a quarter of the rate,
            for a model that has lost little is hurt by a rate that heals another. Given ones are obeyed; evaluations
            are switched on.
        resume_from_checkpoint: As in `Trainer.train`, with `args`; without them see `work_dir`.
        options: Fields of `RecoveryOptions`.

    Returns:
        The model, with what was done in its plan's provenance under `recovery`.

    Raises:
        InputError: If the model is not compressed, the teacher does not fit, or the data cannot be used.
    """
    settings = settle(RecoveryOptions, options, "recover")
    if args is not None and (both := {"epochs", "learning_rate", "batch_size", "work_dir"} & set(options)):
        raise InputError(f"{min(both)} does not go with args, which have their own. Give one of the two.")
    small = _compressed(model)
    dense = load_dense(teacher)
    own_tokenizer, teachers = find_tokenizer(small, tokenizer), find_tokenizer(dense)
    _check_tokenizers(own_tokenizer, teachers)
    check_teacher(small, dense)
    lesson = make_lesson(small, dense, own_tokenizer or teachers, dataset, eval_dataset, settings)
    if settings.work_dir is not None:
        claim_(settings.work_dir, small, lesson, vars(settings))
    if args is None:
        found = heal_(small, lesson, settings, (1, _STEP_DOWN))
    else:
        best = BestStateCallback()
        with _in_training(small) as own:
            steps = train(small, lesson, _obeyed(args), [*settings.callbacks, *own, best], resume_from_checkpoint)
        found = _found(best, steps, args.learning_rate, lesson)
    small.config.compression["provenance"]["recovery"] = asdict(found)
    return small


def heal_(small: Any, lesson: Lesson, settings: RecoveryOptions, step_downs: Sequence[int] = (1,)) -> Recovery:
    """Train a compressed model in place, at shares of the learning rate until one helps, and keep the best state."""
    rate = default_learning_rate(small) if settings.learning_rate is None else settings.learning_rate
    with work_folder(settings.work_dir) as folder, _in_training(small) as own_callbacks:
        for place, step_down in enumerate(step_downs):
            best, own = BestStateCallback(), f"{folder}/slower" if place else folder
            rates = {"epochs": settings.epochs, "learning_rate": rate / step_down}
            steps = train_in(own, small, lesson, settings, [*settings.callbacks, *own_callbacks, best], **rates)
            found = _found(best, steps, rate / step_down, lesson)
            if found.step:
                break
    return found


@contextmanager
def _in_training(small: Any) -> Iterator[list[TrainerCallback]]:
    """Within, a model is in the form that it learns in, with the callbacks that takes; afterwards in its own.

    Rounded weights stay the numbers they are of: the same in two factors would be on no grid.
    """
    with as_numbers(small) as rounded:
        if rounded:
            yield [StraightThroughCallback(rounded)]
            return
        with as_two_factors(small):
            yield []


def _found(best: BestStateCallback, steps: int, rate: float, lesson: Lesson) -> Recovery:
    return Recovery(best.before or 0.0, best.after or 0.0, best.step, steps, rate, dict(lesson.losses))


def default_learning_rate(model: PreTrainedModel) -> float:
    """5e-5; 5e-4 for Tucker's factors, rounded weights, and models that write text or have no head."""
    if model.can_generate() or says_vectors(model) or model.config.plan.get("packed"):
        return _FAST_RATE
    method = model.config.plan.get("provenance", {}).get("settings", {}).get("method", "")
    row = known_method(method)
    return _RATE if row is None or row.learning_rate is None else row.learning_rate


def _compressed(model: Any) -> Any:
    return held_compressed_model(load_compressed(model) if isinstance(model, (str, Path)) else model, "recover")


def _check_tokenizers(ours: Any, theirs: Any) -> None:
    words = [one.get_vocab() for one in (ours, theirs) if hasattr(one, "get_vocab")]
    if len(words) > 1 and words[0] != words[1]:
        raise InputError("The teacher has another vocabulary: its tokenizer's words differ. Give the model's own.")


def _obeyed(args: TrainingArguments) -> TrainingArguments:
    """Given arguments, with the evaluations that the best state is chosen by."""
    check_launch(args)
    args = copy.copy(args)
    args.eval_on_start = True
    if args.eval_strategy == "no":
        args.eval_strategy = type(args.eval_strategy)("epoch")
    return args
