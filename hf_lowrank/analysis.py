"""What compressing a model would do to each of its matrices and to the whole, before anything is changed."""

import copy
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hf_lowrank.analysis_report import (
    Analysis,
    MatrixAnalysis,
    PlannedMatrix,
    PlannedModel,
    spectrum_of,
)
from hf_lowrank.decomposing import Decomposer
from hf_lowrank.errors import InputError
from hf_lowrank.loading import find_tokenizer, load_dense
from hf_lowrank.multiply_adds import count_multiply_adds
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.plans import candidate_matrices, make_plan
from hf_lowrank.planning.sizes import parameter_bytes
from hf_lowrank.planning.timing import LayerTimes
from hf_lowrank.progress import Progress, no_progress
from hf_lowrank.remote_code.configuration_lowrank import compressed_config_class
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.remote_code.modeling_lowrank import compressed_model_class
from hf_lowrank.report import CompressionReport, ModuleReport, make_report
from hf_lowrank.settings import CompressionSettings, make_settings
from hf_lowrank.solvers import SOLVERS
from hf_lowrank.solvers.svd import Truncations
from hf_lowrank.targets import DenseMatrix, JointMatrix, Matrix, dense_weight, find_matrices

DEFAULT_BUDGETS = (0.8, 0.6, 0.4, 0.25)
JOINT = "joint_low_rank"
_KINDS = ("keep_targets", "keep_params")


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
        options: Those of `compress`, with fractions as `keep_targets` or `keep_params`; default: `DEFAULT_BUDGETS` of
            the target matrices.

    Raises:
        InputError: If the model or an option cannot be used, or a budget is out of reach.
    """
    kind = next((kind for kind in _KINDS if kind in options), _KINDS[0])
    given = options.get(kind, DEFAULT_BUDGETS)
    budgets = [given] if isinstance(given, (int, float)) else list(given)
    if not budgets:
        raise InputError(f"{kind} names no budget. Give at least one fraction.")
    settings = [make_settings({**options, kind: budget}) for budget in budgets]
    if settings[0].tensor_method is not None:
        raise InputError(
            f"analyze looks at ranks of single matrices, and method={settings[0].method} has none. Use compare for it."
        )
    model = load_dense(model_or_id)
    tokenizer = tokenizer if tokenizer is not None else find_tokenizer(model)
    study = _Study(model, settings, calibration, tokenizer, progress)
    return study.analysis(LayerTimes(study.targets, _storages(settings), progress=progress) if latency else None)


def _storages(settings: Sequence[CompressionSettings]) -> list[str]:
    return sorted({one.chosen_storage for one in settings})


def planned_report(dense: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> CompressionReport:
    """The report of the model that a plan makes of `dense`, from a skeleton without numbers."""
    config = copy.deepcopy(dense.config)
    config.__class__ = compressed_config_class(type(dense.config))
    config.compression = plan
    with torch.device("meta"):
        skeleton = compressed_model_class(type(dense))(config)
    return make_report(skeleton.to(dtype))


class _KnownErrors:
    """Asks the decomposer for what all budgets need, and remembers what whole plans did."""

    def __init__(self, decomposer: Decomposer) -> None:
        self._damages: dict[tuple[tuple[str, int], ...], float] = {}
        self._decomposer = decomposer
        self.progress = decomposer.progress
        self.joint = decomposer.joint
        self.predicted = decomposer.predicted
        self.errors = decomposer.errors
        self.sizes = decomposer.sizes

    def damage(self, matrices: Sequence[Matrix], ranks: dict[str, int]) -> float:
        """See `ErrorSource`."""
        key = tuple(sorted(ranks.items()))
        if key not in self._damages:
            self._damages[key] = self._decomposer.damage(matrices, ranks)
        return self._damages[key]


class _Study:
    """One analysis under way.

    Args:
        settings: One a budget, alike in all else.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Sequence[CompressionSettings],
        calibration: Any,
        tokenizer: Any,
        progress: Progress,
    ) -> None:
        self._dtype = settings[0].torch_dtype or model.dtype
        self._dense_bytes = parameter_bytes(model)
        if settings[0].looks_at_text and model.dtype.itemsize < torch.float32.itemsize:
            model = copy.deepcopy(model).float()  # as `compress` does: gradients leave the range of 16 bits
        self._model = model
        self._settings = settings
        self._progress = progress
        self.targets = candidate_matrices(model, settings[0])
        self._decomposer = Decomposer(model, settings[0], calibration, tokenizer, progress)
        self._known = _KnownErrors(self._decomposer)

    def analysis(self, times: LayerTimes | None) -> Analysis:
        plans = [make_plan(self._model, settings, self._known)[0] for settings in self._settings]
        reports = [planned_report(self._model, plan, self._dtype) for plan in plans]
        matrices = self._progress(find_matrices(self._model), "analyzing")
        analyzed = tuple(self._matrix(matrix, reports, times) for matrix in matrices)
        first = self._settings[0]
        num_parameters = sum(p.numel() for p in self._model.parameters())
        multiply_adds = count_multiply_adds(self._model)
        seconds = sum(times.of_dense(matrix) for matrix in self.targets) if times is not None else None
        damage = 0.0 if self._runs_model else None
        dense = PlannedModel(1.0, num_parameters, self._dense_bytes, multiply_adds, 0.0, damage, seconds)
        return Analysis(
            architecture=type(self._model).__name__,
            method=first.method,
            allocation=first.chosen_allocation,
            storage=" or ".join(_storages(self._settings)),
            budget_kind=first.budget.kind,
            loss_name="predicted damage" if self._runs_model else "energy lost",
            dense=dense,
            budgets=tuple(self._whole(index, report, analyzed) for index, report in enumerate(reports)),
            matrices=analyzed,
        )

    @property
    def _runs_model(self) -> bool:
        return ALLOCATIONS[self._settings[0].chosen_allocation].errors == "probes"

    def _whole(self, index: int, report: CompressionReport, matrices: Sequence[MatrixAnalysis]) -> PlannedModel:
        # Members of a group have the rank of the part they share, which is in the report too.
        ranks = {m.name: m.rank for m in report.modules if m.rank is not None and m.structure != JOINT}
        planned = [matrix.planned[index] for matrix in matrices if matrix.planned]
        return PlannedModel(
            budget=self._settings[index].budget.value,
            parameters=report.parameters,
            size_bytes=report.size_bytes,
            multiply_adds=report.multiply_adds,
            predicted_loss=sum(one.predicted_loss for one in planned),
            measured_damage=self._known.damage([*self.targets, *self._groups], ranks) if self._runs_model else None,
            seconds=sum(one.seconds or 0.0 for one in planned) or None,
        )

    def _matrix(
        self, matrix: DenseMatrix, reports: Sequence[CompressionReport], times: LayerTimes | None
    ) -> MatrixAnalysis:
        weight = dense_weight(matrix.module)
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"The weight of {matrix.path!r} holds NaN or Inf. Repair it.")
        plain: Truncations = SOLVERS["svd"].decompose(weight.to(self._settings[0].device or weight.device))
        found = plain
        is_target = matrix in self.targets
        if looks_closer := is_target and bool(SOLVERS[self._settings[0].method].needs):
            found = self._decomposer(matrix)
        modules = [module for report in reports for module in report.modules if module.name == matrix.name]
        timed = times if is_target and matrix.kind == "linear" else None
        rows, columns = matrix.shape
        return MatrixAnalysis(
            name=matrix.name,
            role=matrix.role,
            shape=matrix.shape,
            parameters=matrix.num_weights,
            break_even_rank=rows * columns // (rows + columns),
            spectrum=spectrum_of(plain.singular_values),
            metric_spectrum=spectrum_of(found.singular_values) if looks_closer else None,
            planned=tuple(self._planned(module, matrix, timed) for module in modules),
        )

    @cached_property
    def _groups(self) -> list[JointMatrix]:
        return self._decomposer.joint(self.targets) if self._settings[0].rank is None else []

    def _planned(
        self,
        module: ModuleReport,
        matrix: DenseMatrix,
        times: LayerTimes | None,
    ) -> PlannedMatrix:
        common = (module.structure, module.rank, module.parameters, module.multiply_adds)
        if module.rank is None:
            return PlannedMatrix(*common, 0.0, 0.0, 0.0, None if times is None else times.of_dense(matrix))
        unit: Matrix = matrix
        if module.structure == JOINT:
            unit = next(group for group in self._groups if matrix in group.members)
        found = self._decomposer(unit)
        products = found.factors(module.rank).product.split([member.shape[0] for member in unit.members])
        product = products[unit.members.index(matrix)]
        weight = matrix.weight.to(product)
        norm = float(torch.linalg.norm(weight))
        difference = float(torch.linalg.norm(product - weight))
        seconds = None
        if times is not None:
            ranks = np.array([module.rank])
            seconds = float(times.of_ranks(unit, module.structure, ranks)[0]) / len(unit.members)
        energies = found.singular_values.square()
        metric_norm, lost = float(energies.sum()), float(energies[module.rank :].sum())
        return PlannedMatrix(
            *common,
            relative_error=difference / norm if norm > 0 else 0.0,
            metric_error=(lost / metric_norm) ** 0.5 if metric_norm > 0 else 0.0,
            predicted_loss=float(self._known.errors([unit])[unit.name][module.rank - 1]) / len(unit.members),
            seconds=seconds,
        )
