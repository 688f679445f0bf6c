"""What was asked of `compress`, with nothing left to a default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_lowrank.compression.settings import CompressOptions
from hf_lowrank.data.calibration import Text
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.targets import BLOCK_ROLES, Targets
from hf_lowrank.methods.problem import TABLES, Storage
from hf_lowrank.methods.tables.token_tables import TABLE_NEEDS
from hf_lowrank.options import settle
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.budgets import Budget

_REFINE_PASSES = 2
_FAST_SHARE = 4


@dataclass(frozen=True)
class Learning:
    """What is done after the first solution, towards the dense model.

    Args:
        anchors: Whether matrices are solved a second time; see `anchor_`.
        block_passes: Of training one block after the other; see `refine_blocks_`.
        passes: Of training all together; see `refine_`.
        rate: Peak of the learning rate of those.
    """

    anchors: bool
    block_passes: int
    passes: int
    rate: float

    def __bool__(self) -> bool:
        return self.anchors or self.block_passes > 0 or self.passes > 0


@dataclass(frozen=True)
class Settings:
    """What was asked for, with nothing left to a default.

    Args:
        options: As they were given.
        method: See `Method`.
        kinds: Of statistics that are wanted.
        runs_model: Whether the model has to be run: for statistics, to measure ranks, or to learn from it.
    """

    options: CompressOptions
    method: Any
    budget: Budget
    targets: Targets
    storage: Storage
    allocation: str
    learning: Learning
    text: Text
    kinds: frozenset[str]
    runs_model: bool


def settle_compression(given: Mapping[str, Any], *, has_text: bool, inplace: bool = False) -> Settings:
    """The settings of keyword arguments.

    Raises:
        InputError: If an option does not exist, does not go with another, or has a wrong value.
    """
    options = settle(CompressOptions, given, "compress")
    for name in ("anchored", "refine_block_passes", "refine_passes"):
        if inplace and getattr(options, name):  # None is no request
            raise InputError(f"{name} needs the dense model to learn from. Leave inplace out, or {name}.")
    method, budget = options.row.method, options.budget
    storage = _storage(options, looks_at_tables=method.needs >= TABLE_NEEDS)
    kinds = method.needs | (TABLE_NEEDS if storage.tables == "autoencoder" else frozenset())
    kinds |= {"input_moment"} if storage.bias_correction else frozenset()
    allocation = options.allocation or "energy"
    if options.allocation is None and kinds and options.takes("allocation"):
        allocation = "measured"
    has_time = has_text and not inplace and not options.fast
    learning = _learning(options, options.cuts and has_time and allocation == "measured")
    measures = options.cuts and budget.kind != "rank" and ALLOCATIONS[allocation].errors == "probes"
    num_samples = options.num_calibration_samples
    if options.fast:
        num_samples = max(2, num_samples // _FAST_SHARE)
    text = Text(num_samples, options.max_seq_length, options.batch_size, options.text_column, options.seed)
    runs_model = bool(kinds or learning or measures)
    parts = (budget, _targets(options), storage, allocation, learning, text, kinds, runs_model)
    return Settings(options, method, *parts)


def _storage(options: CompressOptions, looks_at_tables: bool) -> Storage:
    budget = options.budget
    has_room = budget.kind in ("keep_params", "keep_targets", "target_size")
    linear = options.storage or ("pivoted" if has_room else "low_rank")
    tables = options.embeddings if options.embeddings in TABLES else None if looks_at_tables else "low_rank"
    return Storage(linear, tables, options.embedding_objective, options.bias_correction)


def _targets(options: CompressOptions) -> Targets:
    is_whole_model = options.budget.is_whole_model and options.takes("embeddings")
    with_tables = is_whole_model if options.embeddings is None else options.embeddings != "dense"
    roles = BLOCK_ROLES | ({"embedding", "head"} if with_tables else frozenset())
    named = (options.target_modules, options.exclude_modules, options.rank_pattern or {})
    return Targets(roles, *named, options.group)


def _learning(options: CompressOptions, is_worth_it: bool) -> Learning:
    anchors = is_worth_it if options.anchored is None else options.anchored
    passes = options.refine_passes
    if passes is None:
        passes = _REFINE_PASSES if is_worth_it else 0
    return Learning(anchors, options.refine_block_passes, passes, options.refine_learning_rate)
