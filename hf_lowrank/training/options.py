"""What `recover` and `lpaf` can be told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lowrank.errors import InputError
from hf_lowrank.options import LARGEST_SEED, MOST_PASSES, Options, option

LOSS_TERMS = ("task", "logits", "hidden", "attention")
IMPORTANCES = ("sensitivity", "movement", "magnitude", "random")
# Far above what a machine can hold.
_MOST = 10_000_000
# What goes with a batch that is run twice.
WITH_CONSISTENCY = {"task": 1.0, "logits": 1.0}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """What every training of ours can be told.

    Args:
        losses: Weight of each term: `task`, `logits`, `hidden`, `attention`. See `DistillationTrainer`.
            Default: `logits` and `hidden` 1 each, `task` 1 where the data have labels of classes or answers, and
            `logits` 10 for a model without a head.
        temperature: Of the logits.
        batch_size: Examples a step.
        max_seq_length: Tokens of an example at most; longer ones are cut.
        max_examples: Examples at most, drawn by `seed`.
        text_column: Column of the text.
        label_column: Column of the class.
        seed: Of the examples drawn, masks, order and dropout.
        work_dir: Folder for checkpoints after every epoch, from which a killed run goes on. None keeps none.
    """

    losses: Mapping[str, float] | None = option(None, at_least=0, choices=LOSS_TERMS)
    temperature: float = option(1.0, above=0, at_most=1000)
    batch_size: int = option(16, at_least=1, at_most=_MOST)
    max_seq_length: int = option(128, at_least=2, at_most=_MOST)
    max_examples: int | None = option(None, at_least=2)
    text_column: str | None = option(None, metavar="NAME")
    label_column: str = option("label", metavar="NAME")
    seed: int = option(0, at_least=0, at_most=LARGEST_SEED)
    work_dir: str | Path | None = option(None, metavar="DIR")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.losses is not None and not any(self.losses.values()):
            raise InputError(f"losses must give a weight to one term at least, got {dict(self.losses)}.")

    @property
    def of_data(self) -> dict[str, Any]:
        """Those that `make_features` takes."""
        names = ("max_seq_length", "max_examples", "seed", "text_column", "label_column")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class RecoveryOptions(TrainingOptions):
    """What `recover` can be told beside its data; see `TrainingOptions` for the rest.

    Args:
        epochs: Passes over the data. Not with `args`; nor `learning_rate`, `batch_size` and `work_dir`.
        learning_rate: Its peak. Default: what suits the method. See `default_learning_rate`.
        callbacks: More of them for the Trainer.
    """

    epochs: float = option(3.0, above=0, at_most=MOST_PASSES)
    learning_rate: float | None = option(None, at_least=0)
    callbacks: Sequence[Any] = option(())


@dataclass(frozen=True, kw_only=True)
class LPAFOptions(TrainingOptions):
    """How `lpaf` prunes and trains; see `TrainingOptions` for the rest, beside what `compress` can be told.

    Args:
        prune_keep: Fraction of the entries pruning keeps. Default: 0.5, or `keep_targets` where that is more.
        importance: `sensitivity`, `movement`, `magnitude` or `random`. See `FirstOrderPruningCallback`.
        score_learning_rate: Of movement scores.
        prune_epochs: Passes over the data while pruning; 0 takes the model as it is, pruned before.
        prune_learning_rate: Peak of the weights' rate while pruning.
        probability: Of a factorized layer to take its sparse weight at first, 0.5 in the paper; 0 trains the factors
            alone, which measured no worse.
        consistency: Weight of the consistency loss, with `probability`; see `MixedRank`.
        tune_epochs: Passes over the data with the factors.
        tune_learning_rate: Peak of the factors' rate. Default: as in `recover`, by the kind of model.
    """

    prune_keep: float | None = option(None, above=0, at_most=1)
    importance: str = option("sensitivity", choices=IMPORTANCES)
    score_learning_rate: float = option(1e-2, at_least=0)
    prune_epochs: float = option(3.0, at_least=0, at_most=MOST_PASSES)
    prune_learning_rate: float = option(1e-4, above=0)
    probability: float = option(0.0, at_least=0, at_most=1)
    consistency: float = option(0.0, at_least=0)
    tune_epochs: float = option(3.0, above=0, at_most=MOST_PASSES)
    tune_learning_rate: float | None = option(None, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.consistency:
            return
        if not self.probability:
            raise InputError("consistency is between two draws of mixed ranks, and there are none. Give probability.")
        if self.losses and ("task" not in self.losses or set(self.losses) - set(WITH_CONSISTENCY)):
            raise InputError(
                "consistency is added to the loss on the labels and runs each batch twice: losses can be task and "
                f"logits, got {', '.join(self.losses)}."
            )
