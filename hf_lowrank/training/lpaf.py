"""`lpaf`: prune a model on its task, factorize what is left, and train the factors with mixed ranks."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_lowrank.compression import compress
from hf_lowrank.conversion import as_two_factors
from hf_lowrank.errors import InputError
from hf_lowrank.job import settle_compression
from hf_lowrank.loading import find_tokenizer, load_dense
from hf_lowrank.options import settle
from hf_lowrank.scratch import temporary_folder
from hf_lowrank.settings import CompressOptions
from hf_lowrank.training.arguments import make_arguments
from hf_lowrank.training.best import BestStateCallback
from hf_lowrank.training.distillation import DistillationTrainer, default_losses
from hf_lowrank.training.features import (
    Features,
    PaddingCollator,
    has_labels,
    hold_out,
    make_features,
    options_of_data,
)
from hf_lowrank.training.mixed_rank import MixedRankCallback
from hf_lowrank.training.preparation import prepared
from hf_lowrank.training.pruning import FirstOrderPruningCallback
from hf_lowrank.training.recovery import default_learning_rate

# Less pruning left less loss on examples set aside, at a quarter of a classifier's parameters: docs/results.md.
_KEEP = 0.5
# The labels alone, as published: no teacher is run.
_LABELS = {"task": 1.0}
# What goes with a batch that is run twice.
_WITH_CONSISTENCY = {"task": 1.0, "logits": 1.0}


@dataclass(frozen=True, kw_only=True)
class LPAFOptions:
    """How `lpaf` prunes and trains.

    Args:
        prune_keep: Fraction of the entries pruning keeps. Default: 0.5, or `keep_targets` where that is more.
        importance: `sensitivity`, `movement`, `magnitude` or `random`; see `FirstOrderPruningCallback`.
        score_learning_rate: Of movement scores.
        prune_epochs: Passes over the data while pruning; 0 takes the model as it is, pruned before.
        prune_learning_rate: Peak of the weights' rate while pruning.
        probability: Of a factorized layer to take its sparse weight at first, 0.5 in the paper; 0 trains the factors
            alone, which measured no worse.
        consistency: Weight of the consistency loss, with `probability`; see `MixedRank`.
        losses: Weight of each term of the loss of both trainings; see `DistillationTrainer`. Default: as in `recover`,
            the model as it was being the teacher. `{"task": 1}` is the labels alone, as published.
        temperature: Of the logits.
        tune_epochs: Passes over the data with the factors.
        tune_learning_rate: Peak of the factors' rate. Default: as in `recover`, by the kind of model.
        batch_size: Examples a step.
        max_seq_length: Tokens of an example at most.
        max_examples: Examples at most, drawn by `seed`.
        text_column: Column of the text.
        label_column: Column of the class.
        seed: Of every draw.
        work_dir: Folder for checkpoints after every epoch, from which a killed run goes on; None keeps none.
    """

    prune_keep: float = _KEEP
    importance: str = "sensitivity"
    score_learning_rate: float = 1e-2
    prune_epochs: float = 3
    prune_learning_rate: float = 1e-4
    probability: float = 0.0
    consistency: float = 0.0
    losses: Mapping[str, float] | None = None
    temperature: float = 1.0
    tune_epochs: float = 3
    tune_learning_rate: float | None = None
    batch_size: int = 16
    max_seq_length: int = 128
    max_examples: int | None = None
    text_column: str | None = None
    label_column: str = "label"
    seed: int = 0
    work_dir: str | None = None

    def __post_init__(self) -> None:
        if self.prune_epochs < 0:
            raise InputError(f"prune_epochs must not be negative, got {self.prune_epochs:g}.")
        for name in ("tune_epochs", "batch_size", "max_seq_length"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")
        if not 0 <= self.probability <= 1:
            raise InputError(f"probability must be between 0 and 1, got {self.probability:g}.")
        if self.consistency and not self.probability:
            raise InputError("consistency is between two draws of mixed ranks, and there are none. Give probability.")
        if (
            self.consistency
            and self.losses
            and ("task" not in self.losses or set(self.losses) - set(_WITH_CONSISTENCY))
        ):
            raise InputError(
                "consistency is added to the loss on the labels and runs each batch twice: losses can be task and "
                f"logits, got {', '.join(self.losses)}."
            )


def lpaf(
    model: PreTrainedModel | str | Path,
    *,
    dataset: Any,
    eval_dataset: Any = None,
    tokenizer: Any = None,
    teacher: PreTrainedModel | str | Path | None = None,
    **options: Any,
) -> Any:
    """Low-rank prune and factorize: `lpaf("my-bert-on-sst2", dataset="train.tsv", keep_targets=0.25)`.

    1. A copy is trained on the task, and towards the model as it was, while first-order pruning thins out matrices,
       which lowers their rank.
    2. The sparse matrices are factorized to the budget into two factors, which `convert_storage_` can store smaller
       afterwards. Published are rows weighted by what pruning left (`sparsity_aware_svd`, `importance_aware_svd`); the
       default method, `two_sided_svd`, asks what rows and columns do to the loss, and measured better.
    3. The factors are trained in the same way; with `probability` a layer now and then still takes its sparse weight,
       ever less often. The state with the least loss on held-out examples is kept.

    Dense embedding tables are left as they are.

    Args:
        model: A model fine-tuned on the task, or its folder or Hub id; it is not changed.
        dataset: Examples with labels; see `make_features`.
        eval_dataset: Examples to choose by; None sets a tenth of `dataset` aside. Not those a result is reported on.
        tokenizer: None takes the one saved with the model.
        teacher: What to train towards; None is the model itself.
        options: Fields of `LPAFOptions` and of `CompressOptions`, a budget among them.

    Returns:
        A plain compressed model, with what was done in its plan's provenance under `lpaf`.

    Raises:
        InputError: If the model or an option cannot be used, or the data have no labels.

    Reference: Ren and Zhu, Low-Rank Prune-And-Factorize for Language Model Compression, LREC-COLING 2024. Its row
    weights, consistency loss and hyper-parameters are not all published; see the docstrings of the parts.
    """
    training, settings = _split(options)
    dense = load_dense(model)
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(dense)
    features = make_features(dense, tokenizer, dataset, **options_of_data(training))
    if not has_labels(features):
        raise InputError("lpaf trains a model on its task, and the data have no labels for it. Give label_column.")
    if eval_dataset is None:
        features, held_out = hold_out(features, training.seed)
    else:
        held_out = make_features(dense, tokenizer, eval_dataset, **options_of_data(training))
    losses = _losses(training, features)
    lesson = Lesson(
        load_dense(teacher or dense), losses, features, held_out, getattr(tokenizer, "pad_token_id", None) or 0
    )
    with _folder(training.work_dir) as folder:
        pruned: PreTrainedModel = dense
        ranks: dict[str, Any] = {}
        if training.prune_epochs:
            pruned, ranks = _prune(copy.deepcopy(dense), lesson, training, settings, folder)
        small = _compressed(pruned, features, settings)
        if training.tune_learning_rate is None:
            training = replace(training, tune_learning_rate=default_learning_rate(small))
        with as_two_factors(small):
            chosen = _tune(small, pruned, lesson, training, folder)
    small.config.compression["provenance"]["lpaf"] = {
        **{name: value for name, value in asdict(training).items() if name != "work_dir"},
        "losses": dict(losses),
        "ranks_after_pruning": {name: asdict(found) for name, found in ranks.items()},
        "held_out_loss": {"before": chosen.before, "after": chosen.after, "step": chosen.step},
    }
    return small.eval()


@dataclass(frozen=True)
class Lesson:
    """What a model is trained on and towards.

    Args:
        losses: Weight of each term.
        features: What is trained on.
        held_out: What is chosen by.
        padding: The token that fills up rows.
    """

    teacher: PreTrainedModel
    losses: Mapping[str, float]
    features: Features
    held_out: Features
    padding: int


def _losses(training: LPAFOptions, features: Features) -> Mapping[str, float]:
    return training.losses or (_WITH_CONSISTENCY if training.consistency else default_losses(features))


def default_prune_keep(keep_targets: float | None) -> float:
    """What pruning keeps for a budget where nothing is said: a half, or `keep_targets` where that is more."""
    return max(_KEEP, keep_targets or 0.0)


def _compressed(pruned: PreTrainedModel, features: Features, settings: CompressOptions) -> Any:
    looks = settle_compression(vars(settings), has_text=False).runs_model
    return compress(pruned, calibration=features if looks else None, **vars(settings))


def _split(options: dict[str, Any]) -> tuple[LPAFOptions, CompressOptions]:
    """Each option to whom it belongs; what both know, such as the seed, to both."""
    ours = {field.name for field in fields(LPAFOptions)}
    theirs = {field.name for field in fields(CompressOptions)}
    defaults = {"method": "two_sided_svd", "storage": "low_rank", "refine_passes": 0}
    settings = settle(
        CompressOptions, {**defaults, **{k: v for k, v in options.items() if k in theirs or k not in ours}}, "lpaf"
    )
    given = {name: value for name, value in options.items() if name in ours}
    if given.get("prune_keep") is None:
        given["prune_keep"] = default_prune_keep(settings.keep_targets)
    return LPAFOptions(**given), settings


def _prune(
    model: PreTrainedModel,
    lesson: Lesson,
    training: LPAFOptions,
    settings: CompressOptions,
    folder: str,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    pruning = FirstOrderPruningCallback(
        training.prune_keep,
        importance=training.importance,
        score_learning_rate=training.score_learning_rate,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
    )
    rates = {"epochs": training.prune_epochs, "learning_rate": training.prune_learning_rate}
    train(model, lesson, [pruning], training, f"{folder}/pruning", eval_on_start=False, eval_strategy="no", **rates)
    return model.eval(), pruning.ranks


def _tune(
    small: Any, pruned: PreTrainedModel, lesson: Lesson, training: LPAFOptions, folder: str
) -> BestStateCallback:
    best = BestStateCallback()
    callbacks: list[TrainerCallback] = [best]
    if training.probability:
        mixed = MixedRankCallback(pruned, probability=training.probability, consistency=training.consistency)
        callbacks = [mixed, best]
    rates = {"epochs": training.tune_epochs, "learning_rate": training.tune_learning_rate}
    train(small, lesson, callbacks, training, f"{folder}/tuning", **rates)
    return best


def train(
    model: Any,
    lesson: Lesson,
    callbacks: list[TrainerCallback],
    training: LPAFOptions,
    folder: str,
    **options: Any,
) -> None:
    """One of the two trainings, from the last checkpoint in its folder if there is one.

    Args:
        options: Of `make_arguments`.
    """
    if training.work_dir is not None:
        options["save_strategy"] = "epoch"
    taught: dict[str, Any] = {"teacher": lesson.teacher, "losses": lesson.losses, "temperature": training.temperature}
    make = Trainer if set(lesson.losses) == set(_LABELS) else partial(DistillationTrainer, **taught)
    with prepared(model):
        trainer = make(
            model=model,
            args=make_arguments(folder, batch_size=training.batch_size, seed=training.seed, **options),
            train_dataset=lesson.features,
            eval_dataset=lesson.held_out,
            data_collator=PaddingCollator(lesson.padding),
            callbacks=callbacks,
        )
        trainer.model_accepts_loss_kwargs = False  # or a classifier's loss would count once for every process
        trainer.remove_callback(PrinterCallback)  # standard output is the caller's
        trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if Path(folder).is_dir() else None)


@contextmanager
def _folder(work_dir: str | None) -> Iterator[str]:
    if work_dir is not None:
        yield work_dir
        return
    with temporary_folder() as folder:
        yield str(folder)
