"""Compressing a model that does not fit in memory: the same methods, plan and folder, a block at a time."""

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from hf_lowrank.compression.filling import become_compressed_, cast_, replace_matrices_
from hf_lowrank.compression.job import Job
from hf_lowrank.files.digests import digest_of
from hf_lowrank.files.processes import my_share, wait_for_all
from hf_lowrank.hosts.blocks import block_name
from hf_lowrank.hosts.disk.offloaded import (
    Offloaded,
    move_out_,
    moved_out_,
    offloaded,
    retype_stored_,
)
from hf_lowrank.hosts.matrices import JointMatrix, Matrix
from hf_lowrank.methods.rotation import rotate_
from hf_lowrank.planning.plans import specs_of
from hf_lowrank.remote_code.lowrank_plan import Plan
from hf_lowrank.remote_code.lowrank_structures import build_shared_part, build_structure, replace_


def stream_(job: Job) -> PreTrainedModel:
    """Turn a model whose weights are in files into the compressed model, whose weights are in files too.

    Statistics are gathered a block at a time, and its matrices decomposed at once (`StagedEvidence`); the plan is made
    of all spectra; then a block at a time is replaced and written. Memory holds a block, the activations of a batch in
    it, and what one decomposition takes, whatever the number of blocks. With `cache_dir`, a run that was killed goes
    on after the last batch, matrix or block that was done, and ends with the same numbers.
    """
    evidence, small, away = job.problem.evidence, job.model, offloaded(job.model)
    assert away is not None
    plan, replaced = job.plan()
    folder = (
        evidence.folder
        / f"blocks-{digest_of([evidence.identity_of_solutions, plan['modules'], plan.get('shared')])[:16]}"
    )
    away.kept.append(evidence)
    units = _units(replaced)
    mine = my_share(list(units))
    for name in job.problem.progress(mine, "replacing"):
        _replace_unit_(small, away, name, units[name], plan, job, folder)
    wait_for_all()
    for name in units.keys() - {*mine}:  # which other processes have made
        _replace_unit_(small, away, name, units[name], plan, job, folder)
    become_compressed_(small, plan)
    away.attach()
    retype_stored_(small, job.problem.dtype)
    cast_(small, job.problem.dtype)
    return small


def _units(matrices: Sequence[Matrix]) -> dict[str, list[Matrix]]:
    """Blocks and tables, by full name, with the matrices that are replaced in them."""
    units: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        path = matrix.members[0].path
        units.setdefault(block_name(path) or path, []).append(matrix)
    return units


def _replace_unit_(
    small: PreTrainedModel, away: Offloaded, name: str, matrices: Sequence[Matrix], plan: Plan, job: Job, folder: Path
) -> None:
    """Replace the matrices of one block and leave it on disk; one that is there is not made again."""
    weights, dtype = folder / f"{name}.safetensors", job.problem.dtype
    errors = plan["provenance"].setdefault("relative_errors", {})
    if weights.is_file():
        with safe_open(weights, framework="pt") as file:
            known = json.loads(file.metadata()["record"])
        for one, spec in known["specs"].items():
            specs_of(plan)[one].update(spec)
        _install_(small, matrices, plan)
        errors |= known["errors"]
        moved_out_(small.get_submodule(name), weights, name, dtype, small.device)
        return
    with away.present(small.get_submodule(name)):
        replace_matrices_(small, matrices, plan, job, dtype, frees=True)
        rotate_(small.get_submodule(name))
    names = [member.name for matrix in matrices for member in matrix.members]
    about = {"specs": {n: specs_of(plan)[n] for n in names}, "errors": {n: errors[n] for n in names}}
    move_out_(small.get_submodule(name), weights, name, dtype, {"record": json.dumps(about)})


def _install_(small: PreTrainedModel, matrices: Sequence[Matrix], plan: Plan) -> None:
    """Put structures without numbers in the place of matrices."""
    for matrix in matrices:
        part = None
        if isinstance(matrix, JointMatrix):
            spec = plan["shared"][matrix.name]
            part = build_shared_part([member.module for member in matrix.members], spec, device="meta")
            parent, _, leaf = matrix.path.rpartition(".")
            small.get_submodule(parent).add_module(leaf, part)
        for member in matrix.members:
            structure = build_structure(member.module, specs_of(plan)[member.name], device="meta", shared=part)
            replace_(small, member.path, structure)
