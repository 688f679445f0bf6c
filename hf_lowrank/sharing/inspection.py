"""What a saved compressed model is made of, without loading its weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.hosts.folder_contents import saved_shapes
from hf_lowrank.options import checked
from hf_lowrank.records.report import CompressionReport, make_report
from hf_lowrank.remote_code.lowrank_plan import PlanError
from hf_lowrank.remote_code.lowrank_weights import check_state
from hf_lowrank.sharing.record import read_record
from hf_lowrank.sharing.saving import load_skeleton_config


@checked
def saved_report(path: str | Path) -> CompressionReport:
    """The report of a compressed model: the one beside its weights, or one made from its configuration.

    Args:
        path: Folder or Hub id.

    Raises:
        InputError: If there is no compressed model, or its configuration, weights or record are damaged.
        PlanError: If its weights are not those of its plan.
    """
    skeleton = make_skeleton(path)
    if Path(path).is_dir():
        check_weights(Path(path), skeleton)
    kept = read_record(Path(path)) if Path(path).is_dir() else None
    if kept is not None:
        return kept
    try:
        return make_report(skeleton)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"What {path} says of how it was made is damaged ({error!r}). Compress it again.") from error


def check_weights(folder: Path, skeleton: Any) -> int:
    """Check by their headers that the weights of a folder are whole and those of its plan; how many tensors they are.

    Raises:
        InputError: If they are missing, damaged or cut short.
        PlanError: If they are those of another plan.
    """
    try:
        shapes = saved_shapes(folder)
    except (SafetensorError, OSError) as error:
        raise InputError(f"The weights of {folder} are damaged: {one_line(error)}. Save the model again.") from error
    # The empty tensor in the place of a dense weight is for classes that know nothing of the plan.
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if shape != (0,)}
    check_state(f"The weights of {folder}", state, skeleton, skeleton)
    return len(shapes)


def make_skeleton(path: str | Path) -> Any:
    """A saved compressed model without numbers, on the meta device.

    Args:
        path: Folder or Hub id.

    Raises:
        InputError: If there is no compressed model, or its configuration is damaged.
        PlanError: If its plan does not fit.
    """
    model_class, config = load_skeleton_config(path)
    try:
        with torch.device("meta"):
            skeleton = model_class(config)
    except PlanError:
        raise
    except Exception as error:  # constructors of all families, met with any value
        raise InputError(f"The config.json of {path} is damaged: {one_line(error)}") from error
    return skeleton.to(config.dtype or torch.float32)
