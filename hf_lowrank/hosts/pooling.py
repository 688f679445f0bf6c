"""How the hidden states of a text become its one vector: as the folder of an encoder says, else by their mean."""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils.hub import cached_file

MEAN = ("mean",)


def _first(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _at(states, mask.int().argmax(dim=1))


def _last(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _at(states, mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1))


def _at(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return states[torch.arange(len(states), device=states.device), places]


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weights = mask.to(states)[..., None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _weighted_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return _mean(states, mask * mask.cumsum(dim=1))


def _largest(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)


# As sentence-transformers calls them -> vectors (B, D) of hidden states (B, T, D) where the mask (B, T) is true. Unit
# vectors are wanted, so that a sum over the root of the length is a mean.
POOLINGS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cls": _first,
    "max": _largest,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


# Keys that named them in older folders, one for each.
_OLDER = ("pooling_mode_{}", "pooling_mode_{}_token", "pooling_mode_{}_tokens")


def pooled(states: torch.Tensor, mask: torch.Tensor | None, modes: Sequence[str] = MEAN) -> torch.Tensor:
    """The unit vectors of hidden states (B, T, D), or of images (B, D, H, W), side by side where there are several.

    Args:
        mask: Which of the states are of no padding, (B, T); None where all are.
        modes: Of `POOLINGS`.
    """
    if states.dim() == 4:
        return F.normalize(states.mean(dim=(2, 3)), dim=-1)
    mask = torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask.bool()
    return F.normalize(torch.cat([POOLINGS[mode](states, mask) for mode in modes], dim=-1), dim=-1)


def pooling_of(model: Any) -> tuple[str, ...]:
    """How the folder or Hub repository a model was loaded from pools its hidden states, for `pooled`.

    That of `modules.json`, where sentence-transformers has written one; else the mean.
    """
    folder = Path(getattr(model.config, "_name_or_path", None) or "/")
    if folder.is_dir():
        return _modes(lambda name: folder / name)
    return MEAN if folder.is_absolute() else _modes_on_hub(folder.as_posix())


@cache
def _modes_on_hub(name: str) -> tuple[str, ...]:
    return _modes(lambda file: Path(cached_file(name, file) or ""))


def _modes(file: Callable[[str], Path]) -> tuple[str, ...]:
    try:
        modules = json.loads(file("modules.json").read_text(encoding="utf-8"))
        path = next(str(module["path"]) for module in modules if str(module["type"]).endswith("Pooling"))
        said: dict[str, Any] = json.loads(file(f"{path}/config.json").read_text(encoding="utf-8"))
        older = {mode: [key.format(mode) for key in _OLDER] for mode in POOLINGS}
        named = said.get("pooling_mode") or [mode for mode, keys in older.items() if any(map(said.get, keys))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StopIteration):
        return MEAN
    modes = list(named) if isinstance(named, (list, tuple)) else [named]
    return tuple(mode for mode in POOLINGS if mode in modes) or MEAN
