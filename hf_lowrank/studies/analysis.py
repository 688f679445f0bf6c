"""What compressing a model would do to each of its matrices and to the whole, before anything is changed."""

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_lowrank.compression.job import Job, prepare
from hf_lowrank.compression.settings import ANALYZED
from hf_lowrank.compression.settled import settle_compression
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.gradients import with_gradients
from hf_lowrank.hosts.matrices import DenseMatrix, JointMatrix, Matrix
from hf_lowrank.hosts.multiply_adds import count_multiply_adds
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.matrix.method import MatrixMethod, as_planned
from hf_lowrank.methods.matrix.svd import SVD, Truncations, TruncationsOfSeveral
from hf_lowrank.options import checked
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.timing import LayerTimes
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.records.module_reports import ModuleReport
from hf_lowrank.records.report import CompressionReport, make_report
from hf_lowrank.remote_code.configuration_lowrank import compressed_config_class
from hf_lowrank.remote_code.lowrank_plan import Plan, specs_of
from hf_lowrank.remote_code.modeling_lowrank import compressed_model_class
from hf_lowrank.studies.analysis_report import (
    DAMAGE,
    ENERGY,
    Analysis,
    MatrixAnalysis,
    PlannedMatrix,
    PlannedModel,
    spectrum_of,
)

JOINT = "joint_low_rank"
_KINDS = ("keep_targets", "keep_params")


@checked
@with_gradients
def analyze(
    model_or_id: PreTrainedModel | str | Path,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    latency: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> Analysis:
    """What `compress` would do at several budgets: `analyze("my-bert", method="svd", keep_targets=[0.8, 0.5])`.

    Nothing is changed. The plans are those `compress` makes with the same options, the errors those before refinement.

    Args:
        model_or_id: A dense transformers model, a Hub id or a folder.
        calibration: As for `compress`.
        tokenizer: As for `compress`.
        latency: Time a dense layer and a factored one of each shape, and predict from that.
        options: Those of `compress`, with fractions as `keep_targets` or `keep_params`; default: `ANALYZED` of
            the target matrices.

    Raises:
        InputError: If the model or an option cannot be used, or a budget is out of reach.
    """
    kind = next((kind for kind in _KINDS if kind in options), _KINDS[0])
    given = options.get(kind, ANALYZED)
    budgets = [given] if isinstance(given, (int, float)) else list(given)
    if not budgets:
        raise InputError(f"{kind} names no budget. Give at least one fraction.")
    has_text = calibration is not None
    settings = [settle_compression({**options, kind: budget}, has_text=has_text) for budget in budgets]
    if not isinstance(settings[0].method, MatrixMethod):
        method = settings[0].options.method
        raise InputError(
            f"analyze looks at ranks of single matrices, and method={method} has none. Use compare for it."
        )
    first = prepare(model_or_id, settings[0], calibration=calibration, tokenizer=tokenizer, progress=progress)
    study = _Study([first.of_budget(one) for one in settings], settings[0].method)
    return study.analysis(latency)


def planned_report(dense: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> CompressionReport:
    """The report of the model that a plan makes of `dense`, from a skeleton without numbers."""
    config = copy.deepcopy(dense.config)
    config.__class__ = compressed_config_class(type(dense.config))
    config.compression = plan
    with torch.device("meta"):
        skeleton = compressed_model_class(type(dense))(config)
    return make_report(skeleton.to(dtype))


class _Study:
    """One analysis under way.

    Args:
        jobs: One a budget, alike in all else.
    """

    def __init__(self, jobs: Sequence[Job], method: MatrixMethod) -> None:
        self._jobs = jobs
        self._first = jobs[0].problem
        self._model = self._first.model
        self._targets = self._first.matrices
        self._decompositions = method.decompositions(self._first)
        plans = [job.plan()[0] for job in jobs]
        self._specs = [specs_of(plan) for plan in plans]
        self._errors = [method.errors(as_planned(job.problem, plan)) for job, plan in zip(jobs, plans, strict=True)]
        self._reports = [planned_report(self._model, plan, self._first.dtype) for plan in plans]
        self._looks = bool(method.needs)
        self._runs_model = ALLOCATIONS[self._first.allocation].errors == "probes"

    def analysis(self, with_latency: bool) -> Analysis:
        first, storages = self._first, sorted({job.problem.storage.linear for job in self._jobs})
        times = LayerTimes(self._targets, storages, progress=first.progress) if with_latency else None
        matrices = first.progress(find_matrices(self._model), "analyzing")
        analyzed = tuple(self._matrix(matrix, times) for matrix in matrices)
        num_parameters = sum(p.numel() for p in self._model.parameters())
        multiply_adds = count_multiply_adds(self._model)
        seconds = sum(times.of_dense(matrix) for matrix in self._targets) if times is not None else None
        damage = 0.0 if self._runs_model else None
        dense = PlannedModel(1.0, num_parameters, self._jobs[0].dense_bytes, multiply_adds, 0.0, damage, seconds)
        return Analysis(
            architecture=type(self._model).__name__,
            method=first.method,
            allocation=first.allocation,
            storage=" or ".join(storages),
            budget_kind=first.budget.kind,
            loss_name=DAMAGE if self._runs_model else ENERGY,
            dense=dense,
            budgets=tuple(self._whole(index, report, analyzed) for index, report in enumerate(self._reports)),
            matrices=analyzed,
        )

    def _whole(self, index: int, report: CompressionReport, matrices: Sequence[MatrixAnalysis]) -> PlannedModel:
        # Members of a group are what the part they share makes of them, which is in the plan too.
        specs = {name: spec for name, spec in self._specs[index].items() if spec["structure"] != JOINT}
        planned = [matrix.planned[index] for matrix in matrices if matrix.planned]
        damage = None
        if self._runs_model:
            damage = self._errors[index].damage([*self._targets, *self._groups], specs)
        return PlannedModel(
            budget=self._jobs[index].problem.budget.value,
            parameters=report.parameters,
            size_bytes=report.size_bytes,
            multiply_adds=report.multiply_adds,
            predicted_loss=sum(one.predicted_loss for one in planned),
            measured_damage=damage,
            seconds=sum(one.seconds or 0.0 for one in planned) or None,
        )

    def _matrix(self, matrix: DenseMatrix, times: LayerTimes | None) -> MatrixAnalysis:
        plain = TruncationsOfSeveral([SVD().decompose(self._first.weight(part)) for part in matrix.parts])
        found: Truncations = plain
        is_target = matrix in self._targets
        if looks_closer := is_target and self._looks:
            found = self._decompositions(matrix)
        modules = [
            (index, module)
            for index, report in enumerate(self._reports)
            for module in report.modules
            if module.name == matrix.name
        ]
        timed = times if is_target and matrix.kind == "linear" else None
        rows, columns = matrix.shape
        return MatrixAnalysis(
            name=matrix.name,
            role=matrix.role,
            shape=matrix.dimensions,
            parameters=matrix.num_weights,
            break_even_rank=rows * columns // (rows + columns),
            spectrum=spectrum_of(plain.singular_values),
            metric_spectrum=spectrum_of(found.singular_values) if looks_closer else None,
            norm=float(found.singular_values.square().sum().sqrt()),
            planned=tuple(self._planned(index, module, matrix, timed) for index, module in modules),
        )

    @cached_property
    def _groups(self) -> list[JointMatrix]:
        return self._errors[0].joint(self._targets) if self._first.budget.kind != "rank" else []

    def _planned(
        self,
        index: int,
        module: ModuleReport,
        matrix: DenseMatrix,
        times: LayerTimes | None,
    ) -> PlannedMatrix:
        common = (module.structure, module.rank, module.parameters, module.multiply_adds)
        if matrix.name not in self._specs[index]:
            return PlannedMatrix(*common, 0.0, 0.0, 0.0, None if times is None else times.of_dense(matrix))
        unit: Matrix = matrix
        if module.structure == JOINT:
            unit = next(group for group in self._groups if matrix in group.members)
        spec, errors = self._specs[index][unit.name], self._errors[index]
        product, rank = self._decompositions.changes(unit, spec)[matrix](), errors.rank(unit, spec)
        weight = matrix.weight.to(product)
        norm = float(torch.linalg.norm(weight))
        difference = float(torch.linalg.norm(product - weight))
        seconds = None
        if times is not None:
            seconds = float(times.of_ranks(unit, module.structure, np.array([rank]))[0]) / len(unit.members)
        metric_norm = float(self._decompositions(unit).singular_values.square().sum())
        lost = float(errors.predicted([unit])[unit.name][rank - 1])
        return PlannedMatrix(
            *common,
            relative_error=difference / norm if norm > 0 else 0.0,
            metric_error=(lost / metric_norm) ** 0.5 if metric_norm > 0 else 0.0,
            predicted_loss=float(errors.errors([unit])[unit.name][rank - 1]) / len(unit.members),
            seconds=seconds,
        )
