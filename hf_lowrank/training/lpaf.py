"""`lpaf`: prune a model on its task, compress what is left, and recover it."""

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.compression.compress import compress
from hf_lowrank.compression.settings import CompressOptions
from hf_lowrank.compression.settled import settle_compression
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.gradients import with_gradients
from hf_lowrank.hosts.loading import find_tokenizer, load_dense
from hf_lowrank.options import checked, settle_parts
from hf_lowrank.training.callbacks.mixed_rank import MixedRankCallback
from hf_lowrank.training.callbacks.pruning import FirstOrderPruningCallback
from hf_lowrank.training.features import has_labels
from hf_lowrank.training.lessons import Lesson, claim_, make_lesson, train_in, work_folder
from hf_lowrank.training.options import WITH_CONSISTENCY, LPAFOptions, RecoveryOptions
from hf_lowrank.training.recovery import default_learning_rate, heal_

# Less pruning left less loss on examples set aside, at a quarter of a classifier's parameters: docs/results.md.
_KEEP = 0.5
_DEFAULTS = {"method": "two_sided_svd", "storage": "low_rank", "refine_passes": 0}


@checked
@with_gradients
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
    training, settings = settle_parts((LPAFOptions, CompressOptions), {**_DEFAULTS, **options}, "lpaf")
    if training.prune_keep is None:
        training = replace(training, prune_keep=default_prune_keep(settings.keep_targets))
    dense = load_dense(model)
    tokenizer = find_tokenizer(dense, tokenizer)
    lesson = make_lesson(dense, load_dense(teacher or dense), tokenizer, dataset, eval_dataset, training)
    if not has_labels(lesson.features):
        raise InputError("lpaf trains a model on its task, and the data have no labels for it. Give label_column.")
    if training.consistency and not training.losses:
        lesson = replace(lesson, losses=WITH_CONSISTENCY)
    lesson = replace(lesson, dropout=set(lesson.losses) == {"task"})  # the labels alone are learned as published
    if training.work_dir is not None:
        claim_(training.work_dir, dense, lesson, {**vars(training), **settings.to_dict()})
    pruned, ranks = _pruned(dense, lesson, training, settings) if training.prune_epochs else (dense, {})
    looks = settle_compression(vars(settings), has_text=False).runs_model
    small = compress(pruned, calibration=lesson.features if looks else None, **vars(settings))
    if training.tune_learning_rate is None:
        training = replace(training, tune_learning_rate=default_learning_rate(small))
    healed = heal_(small, lesson, _tuning(training, pruned))
    small.config.compression["provenance"]["lpaf"] = {
        **{name: value for name, value in asdict(training).items() if name != "work_dir"},
        "losses": dict(lesson.losses),
        "ranks_after_pruning": {name: asdict(found) for name, found in ranks.items()},
        "held_out_loss": {"before": healed.before, "after": healed.after, "step": healed.step},
    }
    return small.eval()


def default_prune_keep(keep_targets: float | None) -> float:
    """What pruning keeps for a budget where nothing is said: a half, or `keep_targets` where that is more."""
    return max(_KEEP, keep_targets or 0.0)


def _pruned(
    dense: PreTrainedModel, lesson: Lesson, training: LPAFOptions, settings: CompressOptions
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A pruned copy, and the ranks of its matrices."""
    model = copy.deepcopy(dense)
    pruning = FirstOrderPruningCallback(
        training.prune_keep or _KEEP,
        importance=training.importance,
        score_learning_rate=training.score_learning_rate,
        target_modules=settings.target_modules,
        exclude_modules=settings.exclude_modules,
    )
    rates = {"epochs": training.prune_epochs, "learning_rate": training.prune_learning_rate}
    without_evaluations = {"eval_on_start": False, "eval_strategy": "no"}
    with work_folder(training.work_dir) as folder:
        train_in(f"{folder}/pruning", model, lesson, training, [pruning], **without_evaluations, **rates)
    return model.eval(), pruning.ranks


def _tuning(training: LPAFOptions, pruned: PreTrainedModel) -> RecoveryOptions:
    """How the factors are recovered."""
    mixed = {"probability": training.probability, "consistency": training.consistency}
    return RecoveryOptions(
        epochs=training.tune_epochs,
        learning_rate=training.tune_learning_rate,
        batch_size=training.batch_size,
        seed=training.seed,
        work_dir=None if training.work_dir is None else f"{training.work_dir}/tuning",
        callbacks=[MixedRankCallback(pruned, **mixed)] if training.probability else [],
    )
