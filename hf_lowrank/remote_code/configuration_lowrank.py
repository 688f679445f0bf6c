"""Configurations of compressed models: the host's configuration plus one field, `compression`.

`LowRankXConfig` exists for every configuration class `XConfig` of transformers, by name: the class is made when it is
first asked for, so that every architecture is served without being listed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict

from .lowrank_plan import Plan, PlanError

if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 10):
    raise ImportError(f"This model needs transformers 5.10 or newer, found {transformers.__version__}. Upgrade it.")

PREFIX = "LowRank"
MODEL_TYPE_PREFIX = "lowrank_"
MAX_DEPTH = 50  # Python gives up copying soon after
MAX_LAYERS = 10_000  # a damaged number would be built for hours


@dataclass(kw_only=True)
class LowRankConfigMixin:
    """The field that makes a host configuration one of a compressed model.

    Args:
        compression: The plan (see `lowrank_plan`); None or no modules means nothing is compressed.
        materialize: None decodes rounded weights when they are loaded, and those of structures that can decode theirs
            in each forward pass. `"each_forward"` decodes both so (least memory), `"once"` both once (as fast as
            dense); `from_pretrained(..., materialize="once")` sets it. See `Materializing`.
    """

    compression: dict[str, Any] | None = None
    materialize: str | None = None

    @classmethod
    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in the host, once what would end somewhere inside it is known to be sound."""
        _check_fields(config_dict)
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]  # the host's

    @property
    def plan(self) -> Plan:
        """The plan to install, never None."""
        return {"format_version": 1, "modules": {}} if self.compression is None else self.compression


def _nests_deeper(value: Any, limit: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return limit < 0 or any(_nests_deeper(part, limit - 1) for part in parts)


def _check_fields(fields: dict[str, Any]) -> None:
    if _nests_deeper(fields, MAX_DEPTH):
        raise PlanError(f"config.json must not be nested more than {MAX_DEPTH} deep. Restore it.")
    if not isinstance(fields.get("compression") or {}, dict):
        raise PlanError(f"compression must be a JSON object, got {fields['compression']!r:.50}. Restore config.json.")
    names = fields.get("architectures") or []
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise PlanError(f"architectures must be a list of class names, got {names!r:.50}. Restore config.json.")
    for dtype in (fields.get("dtype"), fields.get("torch_dtype")):  # the second is the older name
        if dtype is not None and not isinstance(getattr(torch, str(dtype).removeprefix("torch."), None), torch.dtype):
            raise PlanError(f"dtype must name a type of torch, got {dtype!r:.50}. Restore config.json.")
    for part in [fields, *(value for value in fields.values() if isinstance(value, dict))]:
        for name, value in part.items():
            if name.endswith(("layer", "layers", "depth")) and isinstance(value, int) and value > MAX_LAYERS:
                raise PlanError(f"{name} must be at most {MAX_LAYERS}, got {value}. Restore config.json.")


def stock_class(ours: type) -> Any:
    """The transformers class a `LowRank...` class was made from."""
    return next(base for base in ours.__mro__ if base.__module__.startswith("transformers.models."))


@contextmanager
def as_stock(config: Any) -> Iterator[None]:
    """Within it `config` is the host's configuration.

    Some hosts make their base by `AutoModel.from_config(config)`, which must find the stock class, and keeps a copy.
    """
    config_class, fields = type(config), dict(vars(config))
    ours = ("compression", "materialize", "auto_map")
    for name in ours:
        vars(config).pop(name, None)
    config.__class__ = stock_class(config_class)
    try:
        yield
    finally:
        config.__class__ = config_class
        vars(config).update({name: fields[name] for name in ours if name in fields})


def compressed_config_class(host: type) -> type:
    """`LowRankXConfig` for `XConfig`."""
    return __getattr__(PREFIX + host.__name__)


def __getattr__(name: str) -> Any:
    host = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(host, type) and issubclass(host, transformers.PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in globals():
        namespace = {
            "__module__": __name__,
            "__doc__": f"`{host.__name__}` of a compressed model.",
            "model_type": MODEL_TYPE_PREFIX + host.model_type,
            "_auto_class": "AutoConfig",
        }
        globals()[name] = strict(type(name, (LowRankConfigMixin, host), namespace))
    return globals()[name]
