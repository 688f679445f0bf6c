"""One row of a report for each matrix."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.hosts.multiply_adds import dense_multiply_adds, shape_of
from hf_lowrank.records.wording import few_tokens_in_words, vocabulary_in_words
from hf_lowrank.remote_code.lowrank_structures import dense_at, is_bias, structure_name


@dataclass(frozen=True)
class ModuleReport:
    """One matrix before and after.

    Args:
        structure: What holds it now; `dense` if it was left as it was. A part that several matrices share has a row of
            its own, with nothing dense before it.
        rank: Inner size, None where there is none.
        shape: `(O, I)`, `(V, D)` of a table, `(E, O, I)` of experts.
        dense_parameters: Stored numbers while dense, bias not counted.
        multiply_adds: For one token; `dense_multiply_adds` is what it was.
        relative_error: `||W - W'||_F / ||W||_F`, None where nothing was replaced.
        note: Why it stayed dense, or which experts saw too little; or empty.
        bits: What its numbers take in the mean where they are rounded, else None.
    """

    name: str
    structure: str
    rank: int | None
    shape: tuple[int, ...]
    dense_parameters: int
    parameters: int
    dense_multiply_adds: int
    multiply_adds: int
    relative_error: float | None
    note: str = ""
    bits: float | None = None


def replaced_modules(
    model: PreTrainedModel, provenance: dict[str, Any], bits: Mapping[str, float]
) -> list[ModuleReport]:
    """Of the structures of a compressed model, and of what they share.

    Args:
        bits: What a number of each rounded parameter takes.
    """
    names_of = {id(parameter): name for name, parameter in model.named_parameters()}
    plan, base, errors = model.config.plan, model.base_model, provenance.get("relative_errors", {})
    names = [*sorted(plan.get("shared") or {}), *sorted(plan["modules"])]
    found: list[tuple[str, Any]] = [(name, base.get_submodule(name)) for name in names]
    if plan.get("output_embeddings") and structure_name(model.get_output_embeddings()):
        found.append(("output_embeddings", model.get_output_embeddings()))
    kinds = {**(plan.get("shared") or {}), **plan["modules"], "output_embeddings": plan.get("output_embeddings")}
    return [
        ModuleReport(
            name=name,
            structure=kinds[name]["structure"],
            rank=getattr(structure, "rank", None),
            shape=shape_of(structure),
            dense_parameters=math.prod(shape_of(structure)) if structure_name(structure) else 0,
            parameters=sum(p.numel() for key, p in structure.named_parameters() if not is_bias(structure, key)),
            dense_multiply_adds=dense_multiply_adds(structure),
            multiply_adds=structure.multiply_adds(),
            relative_error=None if errors.get(name) is None else float(errors[name]),
            note=_note(name, structure, provenance),
            bits=_mean_bits({names_of.get(id(p), ""): p.numel() for p in structure.parameters()}, bits),
        )
        for name, structure in found
    ]


def _note(name: str, structure: Any, provenance: Mapping[str, Any]) -> str:
    if (seen := provenance.get("vocabulary_seen")) and getattr(structure, "HOSTS", None) == "embedding":
        return vocabulary_in_words(seen)
    return few_tokens_in_words(provenance.get("experts_with_few_tokens", {}).get(name, 0), shape_of(structure))


def _mean_bits(counts: Mapping[str, int], bits: Mapping[str, float]) -> float | None:
    """What numbers take in the mean, of the parameters that are rounded."""
    rounded = {name: count for name, count in counts.items() if name in bits}
    return sum(bits[name] * n for name, n in rounded.items()) / sum(rounded.values()) if rounded else None


def dense_modules(model: PreTrainedModel, provenance: dict[str, Any], bits: Mapping[str, float]) -> list[ModuleReport]:
    """Of the candidates that no structure took the place of.

    Args:
        bits: What a number of each rounded parameter takes.
    """
    kept, errors = [], provenance.get("rounding_errors", {})
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    for name, (shape, role, note) in sorted(provenance.get("kept_dense", {}).items()):
        size = math.prod(shape)
        products = 0 if role == "embedding" else size
        if role == "experts":
            products = dense_multiply_adds(dense_at(model.base_model, name))
        key = f"{prefix}{name}.weight"
        kept.append(
            ModuleReport(
                name, "dense", None, tuple(shape), size, size, products, products, errors.get(key), note, bits.get(key)
            )
        )
    return kept
