"""`recover`: train a compressed model back towards the dense one, and never make it worse."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from hf_lowrank.calibration import is_causal
from hf_lowrank.conversion import as_two_factors
from hf_lowrank.errors import InputError
from hf_lowrank.loading import find_tokenizer, held_model, load_dense
from hf_lowrank.methods.table import known_method
from hf_lowrank.remote_code.lowrank_model import LowRankMixin
from hf_lowrank.saving import load_compressed
from hf_lowrank.scratch import temporary_folder
from hf_lowrank.training.arguments import make_arguments
from hf_lowrank.training.best import BestStateCallback
from hf_lowrank.training.distillation import DistillationTrainer, check_teacher, default_losses
from hf_lowrank.training.features import Features, PaddingCollator, hold_out, make_features, options_of_data
from hf_lowrank.training.preparation import prepared
from hf_lowrank.training.processes import check_launch

# Peak of AdamW's learning rate, found by the loss on examples set aside. On classifiers pairs come as far at twice the
# first in hundreds of steps, and less far in a hundred or where little was lost. A language model has a target at
# every token, and far less noise in its steps. What else a method has, its row says.
_RATE, _RATE_OF_LANGUAGE = 5e-5, 5e-4
_BATCH_SIZE = 16
_EPOCHS = 3
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
    as two factors of the same rank. The state with the least loss on held-out examples is kept; the one before the
    training competes.

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
        resume_from_checkpoint: As in `Trainer.train`.
        options: Fields of `RecoveryOptions`.

    Returns:
        The model, with what was done in its plan's provenance under `recovery`.

    Raises:
        InputError: If the model is not compressed, the teacher does not fit, or the data cannot be used.
    """
    settings = _make_options(options)
    small = _compressed(model)
    dense = load_dense(teacher)
    own_tokenizer = tokenizer if tokenizer is not None else find_tokenizer(small)
    _check_tokenizers(own_tokenizer, find_tokenizer(dense))
    check_teacher(small, dense)
    tokenizer = own_tokenizer or find_tokenizer(dense)
    features = make_features(small, tokenizer, dataset, **options_of_data(settings))
    if eval_dataset is None:
        features, held_out = hold_out(features, settings.seed)
    else:
        held_out = make_features(small, tokenizer, eval_dataset, **options_of_data(settings))
    losses = dict(settings.losses or default_losses(features))
    data = (features, held_out, getattr(tokenizer, "pad_token_id", None) or 0)
    with temporary_folder() as folder, as_two_factors(small):
        for own in [_obeyed(args)] if args is not None else _own_arguments(small, settings, str(folder)):
            found = _train(small, dense, own, data, losses, settings, resume_from_checkpoint)
            if found.step:
                break
    small.config.compression["provenance"]["recovery"] = asdict(found)
    return small


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions:
    """What `recover` can be told beside its data.

    Args:
        losses: Weight of each term of the loss; see `DistillationTrainer`. Default: `logits` and `hidden` 1 each, and
            `task` 1 where the data have labels of classes or answers.
        temperature: Of the logits.
        learning_rate: Peak; None is `default_learning_rate`. Not with `args`, which have their own.
        epochs: Passes over the data. Not with `args`.
        batch_size: Examples a step. Not with `args`.
        max_seq_length: Tokens an example may have; longer ones are cut.
        max_examples: Examples at most, drawn by `seed`.
        text_column: Column of the text.
        label_column: Column of the class.
        seed: Of the examples drawn, masks, order and dropout.
        callbacks: More of them for the Trainer.
    """

    losses: Mapping[str, float] | None = None
    temperature: float = 1.0
    learning_rate: float | None = None
    epochs: float = _EPOCHS
    batch_size: int = _BATCH_SIZE
    max_seq_length: int = 128
    max_examples: int | None = None
    text_column: str | None = None
    label_column: str = "label"
    seed: int = 0
    callbacks: tuple[TrainerCallback, ...] = ()

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_seq_length", "temperature"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")


def default_learning_rate(model: PreTrainedModel) -> float:
    """5e-5; 5e-4 for Tucker's factors, and for causal language models."""
    if is_causal(model):
        return _RATE_OF_LANGUAGE
    method = model.config.plan.get("provenance", {}).get("settings", {}).get("method", "")
    row = known_method(method)
    return _RATE if row is None or row.learning_rate is None else row.learning_rate


def _compressed(model: Any) -> Any:
    small = load_compressed(model) if isinstance(model, (str, Path)) else held_model(model)
    if not isinstance(small, LowRankMixin):
        raise InputError(f"{type(small).__name__} is not a compressed model; there is nothing to recover.")
    return small


def _make_options(options: dict[str, Any]) -> RecoveryOptions:
    try:
        return RecoveryOptions(**options)
    except TypeError as error:
        known = ", ".join(RecoveryOptions.__dataclass_fields__)
        raise InputError(f"recover has no such option: {error}. There are: {known}.") from error


def _check_tokenizers(ours: Any, theirs: Any) -> None:
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise InputError("The teacher has another vocabulary: its tokenizer's words differ. Give the model's own.")


def _obeyed(args: TrainingArguments) -> TrainingArguments:
    """Given arguments, with the evaluations that the best state is chosen by."""
    check_launch(args)
    args = copy.copy(args)
    args.eval_on_start = True
    if args.eval_strategy == "no":
        args.eval_strategy = type(args.eval_strategy)("epoch")
    return args


def _own_arguments(small: PreTrainedModel, settings: RecoveryOptions, folder: str) -> Iterator[TrainingArguments]:
    """What is tried where none are given, one after the other."""
    rate = settings.learning_rate or default_learning_rate(small)
    for step_down in (1, _STEP_DOWN):
        yield make_arguments(
            folder,
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            learning_rate=rate / step_down,
            seed=settings.seed,
        )


def _train(
    small: Any,
    dense: Any,
    args: TrainingArguments,
    data: tuple[Features, Features, int],
    losses: dict[str, float],
    settings: RecoveryOptions,
    resume_from_checkpoint: str | bool | None,
) -> Recovery:
    best = BestStateCallback()
    features, held_out, padding = data
    with prepared(small):
        trainer = DistillationTrainer(
            model=small,
            args=args,
            train_dataset=features,
            eval_dataset=held_out,
            data_collator=PaddingCollator(padding),
            callbacks=[*settings.callbacks, best],
            teacher=dense,
            losses=losses,
            temperature=settings.temperature,
        )
        trainer.remove_callback(PrinterCallback)  # standard output is the caller's
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    before, after = best.before or 0.0, best.after or 0.0
    return Recovery(before, after, best.step, trainer.state.global_step, args.learning_rate, losses)
