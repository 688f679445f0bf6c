"""What a saved compressed model is made of, without loading its weights."""

from pathlib import Path

import torch

from hf_lowrank.record import read_record
from hf_lowrank.report import CompressionReport, make_report
from hf_lowrank.saving import load_skeleton_config


def saved_report(path: str | Path) -> CompressionReport:
    """The report of a compressed model: the one beside its weights, or one made from its configuration.

    Args:
        path: Folder or Hub id.

    Raises:
        InputError: If there is no compressed model, or its configuration or record is damaged.
    """
    model_class, config = load_skeleton_config(path)
    kept = read_record(Path(path)) if Path(path).is_dir() else None
    if kept is not None:
        return kept
    with torch.device("meta"):
        skeleton = model_class(config)
    return make_report(skeleton.to(config.dtype or torch.float32))
