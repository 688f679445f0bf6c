"""Configurations of compressed models: the host's configuration plus one field, `compression`.

`LowRankXConfig` exists for every configuration class `XConfig` of transformers, by name: the class is made when it is
first asked for, so that every architecture is served without being listed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict

from .lowrank_plan import Plan

if tuple(int(number) for number in transformers.__version__.split(".")[:2]) < (5, 10):
    raise ImportError(f"This model needs transformers 5.10 or newer, found {transformers.__version__}. Upgrade it.")

PREFIX = "LowRank"
MODEL_TYPE_PREFIX = "lowrank_"


@dataclass(kw_only=True)
class LowRankConfigMixin:
    """The field that makes a host configuration one of a compressed model.

    Args:
        compression: The plan (see `lowrank_plan`); None or no modules means nothing is compressed.
        materialize: Whether structures that can decode their weight do so `"each_forward"` (least memory) or `"once"`
            (as fast as dense); `from_pretrained(..., materialize="once")` sets it. See `Materializing`.
    """

    compression: dict[str, Any] | None = None
    materialize: str = "each_forward"

    @property
    def plan(self) -> Plan:
        """The plan to install, never None."""
        return self.compression or {"format_version": 1, "modules": {}}


def dense_config_class(config_class: type) -> Any:
    """The transformers class a `LowRank...Config` was made from."""
    return next(base for base in config_class.__mro__ if base.__module__.startswith("transformers.models."))


@contextmanager
def as_stock(config: Any) -> Iterator[None]:
    """Within it `config` is the host's configuration.

    Some hosts make their base by `AutoModel.from_config(config)`, which must find the stock class, and keeps a copy.
    """
    config_class, fields = type(config), dict(vars(config))
    ours = ("compression", "materialize", "auto_map")
    for name in ours:
        vars(config).pop(name, None)
    config.__class__ = dense_config_class(config_class)
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
