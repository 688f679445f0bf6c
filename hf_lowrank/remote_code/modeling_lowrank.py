"""Compressed models: `LowRankX` for every model class `X` of transformers, by name.

    LowRankBertForMaskedLM, LowRankGPT2LMHeadModel, LowRankLlamaForCausalLM, ...

Such a class is its host class with the plan of its configuration installed. It is made when it is first asked for, so
every architecture and every head is served without being listed. The files beside this one are all the code it needs.
"""

from typing import Any

import transformers
from transformers import PreTrainedModel

from .configuration_lowrank import PREFIX, compressed_config_class
from .lowrank_model import LowRankMixin


def compressed_model_class(host: type[PreTrainedModel]) -> type:
    """`LowRankX` for `X`."""
    return __getattr__(PREFIX + host.__name__)


def __getattr__(name: str) -> Any:
    host = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(host, type) and issubclass(host, PreTrainedModel) and host.config_class is not None):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in globals():
        namespace = {
            "__module__": __name__,
            "__doc__": f"`{host.__name__}` with the plan of its configuration installed.",
            "config_class": compressed_config_class(host.config_class),
        }
        globals()[name] = type(name, (LowRankMixin, host), namespace)
    return globals()[name]
