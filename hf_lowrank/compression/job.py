"""A compression made ready: what was asked for, settled into parts, and the model and the evidence it works on."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.compression.settings import CompressOptions
from hf_lowrank.data.calibration import Text
from hf_lowrank.errors import InputError
from hf_lowrank.files.redaction import without_tokens_inside
from hf_lowrank.hosts.loading import find_tokenizer, load_dense
from hf_lowrank.hosts.matrices import Matrix
from hf_lowrank.hosts.rehearsal import Rehearsal, rehearse
from hf_lowrank.hosts.targets import BLOCK_ROLES, Targets, candidate_matrices, find_matrices
from hf_lowrank.hosts.untouched import Untouched, find_untouched
from hf_lowrank.methods.problem import Problem, Storage
from hf_lowrank.methods.tables.token_tables import TABLE_NEEDS
from hf_lowrank.options import settle
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.budgets import Budget
from hf_lowrank.planning.plans import as_plan
from hf_lowrank.planning.sizes import parameter_bytes
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.records.machine import usable_device, versions
from hf_lowrank.records.origin import find_origin
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.statistics.evidence import Evidence
from hf_lowrank.version import __version__

# Up to here, pivoted rows are as fast as two factors of the same size (examples/benchmark_speed.py).
_LARGEST_PIVOTED_FRACTION = 0.65
_REFINE_PASSES = 2
_FAST_SHARE = 4
_NARROW = (torch.float16, torch.bfloat16)


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
    method, budget, storage = options.row.method, options.budget, _storage(options)
    kinds = method.needs | (TABLE_NEEDS if storage.tables == "autoencoder" else frozenset())
    kinds |= {"input_moment"} if storage.bias_correction else frozenset()
    allocation = options.allocation or "energy"
    if options.allocation is None and kinds and options.takes("allocation"):
        allocation = "first_order" if options.fast else "measured"
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


def _storage(options: CompressOptions) -> Storage:
    budget = options.budget
    is_small = budget.kind in ("keep_params", "keep_targets") and budget.value <= _LARGEST_PIVOTED_FRACTION
    linear = options.storage or ("pivoted" if is_small or budget.kind == "target_size" else "low_rank")
    tables = "autoencoder" if options.embeddings == "autoencoder" else "low_rank"
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


@dataclass(frozen=True)
class Job:
    """A dense model, and all that its compression needs.

    Args:
        tokenizer: For the text; None where there is none.
        dense_bytes: Of the model's parameters, in the type they came in.
        is_ours: Whether nobody else holds the model.
        untouched: What of the blocks is no candidate.
    """

    settings: Settings
    problem: Problem
    tokenizer: Any
    dense_bytes: int
    is_ours: bool
    rehearsal: Rehearsal
    untouched: Sequence[Untouched]

    @property
    def model(self) -> PreTrainedModel:
        """The dense model, in the type that it is looked at in."""
        return self.problem.model

    def of_budget(self, settings: Settings) -> "Job":
        """The same job at other settings that differ in nothing but the size."""
        problem = replace(self.problem, budget=settings.budget, storage=settings.storage)
        return replace(self, settings=settings, problem=problem)

    def _uncut(self) -> Plan:
        """The plan that replaces nothing."""
        return as_plan({}, {}, {m.name: [list(m.shape), m.role, "rounded"] for m in self.problem.matrices})

    def plan(self) -> tuple[Plan, Sequence[Matrix]]:
        """The plan with what is known before any number is, and the matrices it replaces.

        Raises:
            InputError: If a weight is not in memory, or the budget is out of reach.
        """
        cuts = self.settings.options.cuts
        plan, matrices = self.settings.method.plan(self.problem) if cuts else (self._uncut(), [])
        config: Any = self.model.config
        origin = find_origin(getattr(config, "_name_or_path", ""), getattr(config, "_commit_hash", None))
        said = {
            "settings": self.settings.options.to_dict(),
            "hf_lowrank": __version__,
            "text": self.problem.evidence.described_text() if self.settings.runs_model else None,
            "versions": versions(),
            "origin": origin.to_dict(),
            "dense_size_bytes": self.dense_bytes,
            "untouched": {one.name: [list(one.shape), one.reason] for one in self.untouched},
        }
        if few := self.problem.evidence.experts_with_few_tokens:
            said["experts_with_few_tokens"] = few
        plan["provenance"] |= without_tokens_inside(said)
        plan["provenance"]["kept_dense"] |= {
            matrix.name: [list(matrix.shape), matrix.role, "nothing that was looked at reaches it"]
            for matrix in self.problem.evidence.unreached
        }
        return plan, matrices


def prepare(
    model: PreTrainedModel | str | Path,
    settings: Settings,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    inplace: bool = False,
    progress: Progress = no_progress,
) -> Job:
    """The job of compressing a model, which is not changed; 16 bits are watched in 32.

    Raises:
        InputError: If the model cannot be used, or no matrix is left to replace.
    """
    options = settings.options
    device = None if options.device is None else usable_device(options.device)
    dense = load_dense(model)
    tokenizer = find_tokenizer(dense, tokenizer)
    dtype = dense.dtype if options.dtype is None else getattr(torch, options.dtype)
    dense_bytes, is_ours = parameter_bytes(dense), isinstance(model, (str, Path))
    if settings.runs_model and dense.dtype in _NARROW and not inplace:
        dense, is_ours = copy.deepcopy(dense).float(), True  # gradients leave the range of 16 bits
    elif any(parameter.is_inference() for parameter in dense.parameters()) and not inplace:
        dense, is_ours = copy.deepcopy(dense), True  # made in inference mode, and never to be learned from
    every, storage = find_matrices(dense), settings.storage
    rehearsal = rehearse(dense, every)
    matrices = candidate_matrices(every, settings.targets, rehearsal.read)
    _require_tables(dense, matrices, options.embeddings)
    looks_at_all = bool(settings.method.needs) or storage.bias_correction
    watched = matrices if looks_at_all else [matrix for matrix in matrices if storage.autoencodes(matrix)]
    kept = (settings.kinds, watched, options.cache_dir, progress)
    evidence = Evidence(dense, matrices, settings.text, calibration, tokenizer, *kept)
    if settings.runs_model:
        evidence.leave_out_unreached()
    what = (settings.budget, settings.targets, storage, settings.allocation)
    bits = options.bits if options.rounds else None
    problem = Problem(dense, evidence.matrices, evidence, options.method, *what, dtype, device, options.own, bits)
    untouched = find_untouched(dense, every, matrices, rehearsal.read)
    return Job(settings, problem, tokenizer, dense_bytes, is_ours, rehearsal, untouched)


def _require_tables(model: PreTrainedModel, matrices: Sequence[Matrix], embeddings: str | None) -> None:
    """Refuse to leave dense what was asked for by name."""
    if embeddings not in (None, "dense") and all(matrix.role == "block" for matrix in matrices):
        raise InputError(
            f"embeddings={embeddings!r} finds no table to replace: {type(model).__name__} has none, shares it among "
            "more than an embedding and its head, or the modules named leave it out. Leave embeddings out."
        )
