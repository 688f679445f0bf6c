"""The matrices of a language model's blocks at some bits a number, beside GPTQ and low rank."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bits.gptq import gptq, stored_bits
from bits.rows import Row, kept, slug
from transformers import PreTrainedModel

from hf_lowrank import compress
from hf_lowrank.compression.error_costs import costs_of
from hf_lowrank.evaluation.base import Step
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.rounding.levels import Single, rounded_within
from hf_lowrank.remote_code.lowrank_codes import unpack

GROUPS = (32, 64, None)
# Bits a number by which GPTQ may take more than it is held against.
_NEAR = 0.1


@dataclass(frozen=True)
class Blocks:
    """A language model, what is known of the matrices of its blocks, and the windows it is reported on by text."""

    name: str
    problem: Problem
    tokenizer: Any
    task: Any
    reports: Mapping[str, Sequence[Step]]
    work_dir: Path

    @property
    def matrices(self) -> Sequence[DenseMatrix]:
        """Of the blocks."""
        return self.problem.matrices


def with_weights(study: Blocks, make: Callable[[], Mapping[str, torch.Tensor]]) -> Row:
    """The perplexity with other weights (O, I) in the place of some, by path."""
    found = make()
    before = {matrix.path: matrix.weight.detach().clone() for matrix in study.matrices}
    with torch.no_grad():
        try:
            for matrix in study.matrices:
                matrix.weight.copy_(found[matrix.path])
            return perplexity(study, study.problem.model)
        finally:
            for matrix in study.matrices:
                matrix.weight.copy_(before[matrix.path])


def perplexity(study: Blocks, model: PreTrainedModel) -> Row:
    """Of a whole model, by text."""
    return {
        name: study.task.compare({"model": model}, steps)["model"]["perplexity"]
        for name, steps in study.reports.items()
    }


def ours_on_blocks(study: Blocks, bits: float) -> dict[str, torch.Tensor]:
    """All matrices of the blocks at one level of error."""
    parts = [
        Single(
            matrix.path,
            lambda m=matrix: m.weight.detach().float(),
            costs_of(study.problem, matrix, lambda m=matrix: m.weight),
        )
        for matrix in study.matrices
    ]
    found = rounded_within(parts, bits * sum(part.num_codes for part in parts) / 8)
    grids = unpack([(found[matrix.path], matrix.shape) for matrix in study.matrices])
    return {matrix.path: grid.weight() for matrix, grid in zip(study.matrices, grids, strict=True)}


def gptq_on_blocks(study: Blocks, bits: int, group: int | None) -> dict[str, torch.Tensor]:
    """Each matrix for itself."""
    found = {}
    for matrix in study.matrices:
        known = study.problem.evidence.known(matrix, torch.device("cpu"))
        found[matrix.path] = gptq(matrix.weight.detach(), known.input_moment, bits, group)
    return found


def low_rank_on_blocks(study: Blocks, bits: float) -> Row:
    """As many bytes of factors in 16 bits: two-sided and pivoted, not trained, as rounded weights are not."""
    evidence = study.problem.evidence
    small = compress(
        study.problem.model, keep_targets=bits / 16, allocation="first_order", storage="pivoted", anchored=False,
        refine_passes=0, calibration=evidence.source, tokenizer=study.tokenizer,
        text_column=evidence.text.text_column, cache_dir=evidence.cache_dir,
    )  # fmt: skip
    return perplexity(study, small.half().float())


def rows_of_blocks(study: Blocks, bits: float) -> Iterator[tuple[str, float, Callable[[], Row]]]:
    """Name, bits a number, and what makes the row."""
    yield f"**hf_lowrank, {bits:g} bits**", bits, lambda: with_weights(study, lambda: ours_on_blocks(study, bits))
    shapes = [matrix.shape for matrix in study.matrices]
    for group in GROUPS:
        total = sum(rows * columns * stored_bits(columns, int(bits), group) for rows, columns in shapes)
        mean = total / sum(rows * columns for rows, columns in shapes)
        if mean > bits + _NEAR:
            continue
        named = f"GPTQ, {int(bits)} bits, " + (f"groups of {group}" if group else "one scale a row")
        yield named, mean, lambda g=group: with_weights(study, lambda: gptq_on_blocks(study, int(bits), g))
    yield f"low rank, {bits:g} bits as numbers of 16", bits, lambda: low_rank_on_blocks(study, bits)


def print_blocks(study: Blocks, all_bits: Sequence[float]) -> None:
    """One block of rows a size; `g = ln(ppl / ppl_dense)`."""
    folder = study.work_dir / "rows"
    dense = kept(folder / "dense.json", lambda: perplexity(study, study.problem.model))
    said = ", ".join(f"{dense[name]:.2f} on {name}" for name in study.reports)
    print(f"\n{study.name}: dense perplexity {said}\n")
    print("| | bits a number | " + " | ".join(study.reports) + " |\n|---|---" + "|---" * len(study.reports) + "|")
    for bits in all_bits:
        for name, stored, make in rows_of_blocks(study, bits):
            found = kept(folder / f"{slug(name)}.json", make)
            cells = [f"{found[text]:.2f} ({math.log(found[text] / dense[text]):.4f})" for text in study.reports]
            print(f"| {name} | {stored:.2f} | {' | '.join(cells)} |", flush=True)
