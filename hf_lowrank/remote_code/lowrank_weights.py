"""Whether weights are those of a plan: one that is missing would be drawn at random, so it is an error instead."""

import copy
import sys
from collections.abc import Iterable
from typing import Any

import torch

from .lowrank_plan import PlanError
from .lowrank_structures import named_shared_parts, named_structures


def check_loaded(model: Any, info: dict[str, Any]) -> None:
    """Refuse a model that was loaded from weights other than its plan's.

    A head that was not saved may be new, and one that was saved may be left over; any other weight of the class that
    was saved must be there. Of a structure nothing may be missing, left over or of another shape.

    Args:
        info: What `from_pretrained` says of loading.

    Raises:
        PlanError: Naming a weight.
    """
    missing = info["missing_keys"]
    saved_as = str((model.config.architectures or [""])[0])
    saved_class = getattr(sys.modules.get(type(model).__module__), saved_as, None)
    if missing and saved_class is not None:
        saved = skeleton(saved_class, model.config)
        needed = _names(saved, saved.state_dict())
    else:
        needed = {*model.base_model.state_dict()}
    mismatched = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
    problems = {
        "missing": needed & _names(model, missing),
        "unexpected": _of_structures(model, info["unexpected_keys"]),
        "of another shape": _of_structures(model, mismatched),
    }
    _refuse(f"The weights of {model.config.name_or_path or 'this model'}", problems)


def check_saved(model: Any, state: dict[str, torch.Tensor]) -> None:
    """Refuse to save weights that could not be loaded by the configuration that is saved with them.

    Raises:
        PlanError: Naming a weight.
    """
    check_state("The weights to be saved", state, model, skeleton(type(model), model.config))


def check_state(subject: str, state: dict[str, torch.Tensor], model: Any, saved: Any) -> None:
    """Refuse weights that a skeleton could not load.

    Args:
        subject: What they are, for the message.
        model: Whose weights they are.

    Raises:
        PlanError: Naming a weight.
    """
    expected = {name: value.shape for name, value in saved.state_dict().items()}
    tied = saved.all_tied_weights_keys
    problems = {
        "missing": {name for name in expected if name not in state and name not in tied},
        "unexpected": _of_structures(model, [name for name in state if name not in expected]),
        "of another shape": {name for name, shape in expected.items() if name in state and state[name].shape != shape},
    }
    _refuse(subject, problems)


def skeleton(model_class: Any, config: Any) -> Any:
    """A model of shapes without numbers."""
    config = copy.deepcopy(config)
    if isinstance(config.dtype, str):  # saving leaves the name there
        config.dtype = getattr(torch, config.dtype)
    with torch.device("meta"):
        return model_class(config)


def _names(model: Any, keys: Iterable[str]) -> set[str]:
    """Names of weights relative to the base model, whichever head it is in."""
    return {key.removeprefix(f"{model.base_model_prefix}.") for key in keys}


def _of_structures(model: Any, keys: Iterable[str]) -> set[str]:
    """Those that belong to a structure of the model or to what structures share."""
    ours = _names(model, (f"{name}." for name, _ in [*named_structures(model), *named_shared_parts(model)]))
    return {key for key in _names(model, keys) if key.startswith(tuple(ours))}


def _refuse(weights: str, problems: dict[str, set[str]]) -> None:
    for problem, names in problems.items():
        if names:
            raise PlanError(
                f"{weights} do not fit its plan: {len(names)} {problem}, such as {min(names)!r}. "
                "Get the whole folder, or save the model again."
            )
