"""The plan: which module gets which structure with which sizes, as plain JSON in `config.json`.

    {
        "format_version": 1,
        "modules": {
            "encoder.layer.0.intermediate.dense": {"structure": "low_rank", "rank": 96},
            "encoder.layer.0.attention.self.key": {
                "structure": "joint_low_rank",
                "shared": "encoder.layer.0.attention.self.joint",
            },
        },
        "shared": {"encoder.layer.0.attention.self.joint": {"structure": "shared_down", "rank": 144}},
        "output_embeddings": {"structure": "low_rank", "rank": 64},
        "provenance": {...},
    }

Names in `modules` are relative to `model.base_model`, so that every head shares one plan. `shared` holds what several
of them use: a part is a module of its own, new to the host, at that name, and its parameters exist once.
`output_embeddings` is for an untied language-model head; a tied head follows the input embedding. `provenance` is
never read to build.
"""

import difflib
from collections.abc import Iterable
from typing import Any

FORMAT_VERSION = 2  # of plans with rounded weights; 1 without

Spec = dict[str, Any]
Plan = dict[str, Any]


class PlanError(ValueError):
    """A plan that cannot be read or does not fit the model."""


def specs_of(plan: Plan) -> dict[str, Spec]:
    """Every spec of a plan by the name of its module, of the head or of the shared part."""
    specs = {**plan["modules"], **(plan.get("shared") or {})}
    if plan.get("output_embeddings") is not None:
        specs["output_embeddings"] = plan["output_embeddings"]
    return specs


def members_of(plan: Plan, part: str) -> list[str]:
    """Names of the modules that use a shared part, in a fixed order."""
    return sorted(name for name, spec in plan["modules"].items() if spec.get("shared") == part)


def validate_plan(plan: Plan, structures: dict[str, Any], shared_parts: dict[str, Any]) -> None:
    """Check the form of a plan; whether its names and sizes fit a model is seen when it is installed.

    Args:
        structures: Name of each known structure with its class, whose `SIZES` are the fields a spec must have and
            whose `OPTIONAL_SIZES` and `OPTIONS` (with the words allowed), if any, those it may have besides.
        shared_parts: The same for what structures can share.

    Raises:
        PlanError: With the offending key, the rule, the value found and what to do.
    """
    if not isinstance(plan, dict):
        raise PlanError(f"compression must be a JSON object, got {type(plan).__name__}. Restore config.json.")
    version = plan.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise PlanError(
            f"compression.format_version must be between 1 and {FORMAT_VERSION}, got {version!r}. "
            "Load the model with the code it was saved with, or a newer hf_lowrank."
        )
    for key in ("modules", "shared", "packed", "provenance"):
        value = plan.get(key)
        if not isinstance(value, dict) and (value is not None or key == "modules"):
            raise PlanError(f"compression.{key} must be a JSON object, got {value!r:.50}. Restore config.json.")
    _validate_packed(plan.get("packed"))
    modules, parts = plan["modules"], plan.get("shared") or {}
    head = plan.get("output_embeddings")
    for name, spec in [*modules.items(), *([] if head is None else [("output_embeddings", head)])]:
        _validate_spec(name, spec, structures)
        _validate_reference(name, spec, structures, parts)
    for name, spec in parts.items():
        _validate_spec(name, spec, shared_parts)
        if not members_of(plan, name):
            raise PlanError(f"{name}: no module of the plan uses this shared part. Restore config.json.")


def _validate_packed(packed: Any) -> None:
    for part in ("tensors", "outside"):
        sizes = (packed or {}).get(part, {})
        if not isinstance(sizes, dict) or any(type(size) is not int or size < 1 for size in sizes.values()):
            raise PlanError(
                f"packed.{part} must hold a number of bytes by name, got {sizes!r:.50}. Restore config.json."
            )


def _validate_spec(name: str, spec: Spec, structures: dict[str, Any]) -> None:
    found = spec.get("structure") if isinstance(spec, dict) else spec
    if not isinstance(spec, dict) or not isinstance(found, str) or found not in structures:
        raise PlanError(f"{name}: structure must be one of {', '.join(sorted(structures))}, got {found!r:.50}.")
    structure = structures[spec["structure"]]
    options = getattr(structure, "OPTIONS", {})
    sizes = {key: value for key, value in sizes_of(spec).items() if key not in options}
    expected = set(structure.SIZES)
    if set(sizes) - set(getattr(structure, "OPTIONAL_SIZES", ())) != expected:
        raise PlanError(
            f"{name}: {spec['structure']} needs exactly the sizes {', '.join(sorted(expected)) or 'none'}, "
            f"got {', '.join(sorted(sizes)) or 'none'}."
        )
    for size, value in sizes.items():
        if type(value) is not int or value < 1:
            raise PlanError(f"{name}: {size} must be a whole number of at least 1, got {value!r:.50}.")
    for option in set(spec) & set(options):
        if spec[option] not in options[option]:
            raise PlanError(f"{name}: {option} must be one of {', '.join(options[option])}, got {spec[option]!r}.")


def _validate_reference(name: str, spec: Spec, structures: dict[str, Any], parts: dict[str, Any]) -> None:
    shares = getattr(structures[spec["structure"]], "SHARES", None) is not None
    part = spec.get("shared")
    if shares and not (isinstance(part, str) and part in parts):
        raise PlanError(
            f"{name}: shared must name one of {', '.join(sorted(parts)) or 'no parts'}, got {part!r:.100}."
        )
    if not shares and "shared" in spec:
        raise PlanError(f"{name}: {spec['structure']} shares nothing, got shared={part!r:.50}.")


def sizes_of(spec: Spec) -> dict[str, Any]:
    """The sizes and options in a spec, without what it is and what it shares."""
    return {key: value for key, value in spec.items() if key not in ("structure", "shared")}


def closest_name(name: str, known: Iterable[str]) -> str:
    """The known name most like `name` in any case, for an error message; empty if there are none."""
    plain = {one.lower(): one for one in known}
    return next((plain[one] for one in difflib.get_close_matches(name.lower(), plain, n=1, cutoff=0.0)), "")
