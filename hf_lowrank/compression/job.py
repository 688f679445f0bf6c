"""A compression made ready: the model, and the evidence that it works on."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.compression.disk.costs import announce
from hf_lowrank.compression.disk.tier import opened
from hf_lowrank.compression.mixing import mixed_plan
from hf_lowrank.compression.settled import Settings
from hf_lowrank.errors import InputError
from hf_lowrank.files.digests import digest_of
from hf_lowrank.files.processes import my_share, wait_for_all
from hf_lowrank.files.redaction import without_tokens_inside
from hf_lowrank.hosts.disk.offloaded import offloaded
from hf_lowrank.hosts.loading import find_tokenizer
from hf_lowrank.hosts.matrices import DenseMatrix, Matrix
from hf_lowrank.hosts.rehearsal import Rehearsal, rehearse
from hf_lowrank.hosts.targets import candidate_matrices, find_matrices
from hf_lowrank.hosts.untouched import Untouched, find_untouched
from hf_lowrank.methods.problem import Problem
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.plans import as_plan
from hf_lowrank.planning.sizes import parameter_bytes
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.records.machine import usable_device, versions
from hf_lowrank.records.origin import find_origin
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.statistics.evidence import Evidence
from hf_lowrank.statistics.staged import StagedEvidence
from hf_lowrank.version import __version__

_NARROW = (torch.float16, torch.bfloat16)


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

    def _decompose(self, evidence: StagedEvidence) -> None:
        """Gather statistics stage by stage, and decompose the matrices of each as soon as they are known."""
        announce(evidence)
        method, problem = self.settings.method, self.problem
        found, errors = method.decompositions(problem), method.errors(problem)
        compares = problem.budget.kind != "rank" and ALLOCATIONS[problem.allocation].errors != "none"

        def finish(matrices: Sequence[DenseMatrix]) -> None:
            found.store(my_share([*matrices, *(errors.joint(matrices) if compares else [])]))

        if evidence.kinds:
            evidence.collect(finish, forgets=not method.solver.fits_each_rank)
        elif compares:
            finish(problem.matrices)
        wait_for_all()

    def _uncut(self) -> Plan:
        """The plan that replaces nothing."""
        return as_plan({}, {}, {m.name: [list(m.shape), m.role, "rounded"] for m in self.problem.matrices})

    def plan(self) -> tuple[Plan, Sequence[Matrix]]:
        """The plan with what is known before any number is, and the matrices it replaces.

        Raises:
            InputError: If a weight is not in memory, or the budget is out of reach.
        """
        evidence, cuts = self.problem.evidence, self.settings.options.cuts
        if isinstance(evidence, StagedEvidence):
            self._decompose(evidence)
        if cuts:
            plan, matrices = self.settings.method.plan(self.problem)
        else:
            is_free = self.problem.budget.kind == "target_size"
            plan, matrices = mixed_plan(self.problem) if is_free else (self._uncut(), [])
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
        if any(matrix.role == "embedding" for matrix in matrices) and self.settings.runs_model:
            said["vocabulary_seen"] = self.problem.evidence.vocabulary_seen
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
    dense, settings = opened(model, settings)
    tokenizer = find_tokenizer(dense, tokenizer)
    away = offloaded(dense)
    stored = dense.dtype if away is None else away.dtype
    dtype = stored if options.dtype is None else getattr(torch, options.dtype)
    dense_bytes = parameter_bytes(dense) * stored.itemsize // dense.dtype.itemsize
    is_ours = isinstance(model, (str, Path)) or away is not None
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
    kept: Any = (settings.kinds, watched, options.cache_dir, progress)
    make = (
        Evidence if away is None else partial(StagedEvidence, solver=f"{options.method}{digest_of(options.own)[:8]}")
    )
    evidence: Evidence = make(dense, matrices, settings.text, calibration, tokenizer, *kept)
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
