"""The plan: which module gets which structure with which sizes, as plain JSON in `config.json`.

    {
        "format_version": 1,
        "modules": {"encoder.layer.0.intermediate.dense": {"structure": "low_rank", "rank": 96}},
        "output_embeddings": {"structure": "low_rank", "rank": 64},
        "provenance": {...},
    }

Names in `modules` are relative to `model.base_model`, so that every head shares one plan. `output_embeddings` is
for an untied language-model head; a tied head follows the input embedding. `provenance` is never read to build.
"""

import difflib
from collections.abc import Iterable
from typing import Any

FORMAT_VERSION = 1

Spec = dict[str, Any]
Plan = dict[str, Any]


class PlanError(ValueError):
    """A plan that cannot be read or does not fit the model."""


def validate_plan(plan: Plan, structures: dict[str, Any]) -> None:
    """Check the form of a plan; whether its names and sizes fit a model is seen when it is installed.

    Args:
        structures: Name of each known structure with its class, whose `SIZES` are the fields a spec must have.

    Raises:
        PlanError: With the offending key, the rule, the value found and what to do.
    """
    if not isinstance(plan, dict):
        raise PlanError(f"compression must be a JSON object, got {type(plan).__name__}. Restore config.json.")
    version = plan.get("format_version")
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise PlanError(
            f"compression.format_version must be between 1 and {FORMAT_VERSION}, got {version!r}. "
            "Load the model with the code it was saved with, or a newer hf_lowrank."
        )
    modules = plan.get("modules")
    if not isinstance(modules, dict):
        raise PlanError("compression.modules must map module names to specs. Restore config.json.")
    specs = dict(modules)
    if plan.get("output_embeddings") is not None:
        specs["output_embeddings"] = plan["output_embeddings"]
    for name, spec in specs.items():
        _validate_spec(name, spec, structures)


def _validate_spec(name: str, spec: Spec, structures: dict[str, Any]) -> None:
    if not isinstance(spec, dict) or spec.get("structure") not in structures:
        found = spec.get("structure") if isinstance(spec, dict) else spec
        raise PlanError(f"{name}: structure must be one of {', '.join(sorted(structures))}, got {found!r}.")
    sizes = {key: value for key, value in spec.items() if key != "structure"}
    expected = set(structures[spec["structure"]].SIZES)
    if set(sizes) != expected:
        raise PlanError(
            f"{name}: {spec['structure']} needs exactly the sizes {', '.join(sorted(expected))}, "
            f"got {', '.join(sorted(sizes)) or 'none'}."
        )
    for size, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PlanError(f"{name}: {size} must be a whole number of at least 1, got {value!r}.")


def closest_name(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`, for an error message; empty if there are none."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)), "")
