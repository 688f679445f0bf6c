"""Compressed models: `LowRankX` for every model class `X` of transformers, by name.

    LowRankBertForMaskedLM, LowRankGPT2LMHeadModel, LowRankLlamaForCausalLM, ...

Such a class is its host class with the plan of its configuration installed. It is made when it is first asked for, so
every architecture and every head is served without being listed. The files beside this one are all the code it needs.
"""

from typing import Any

import transformers
from transformers import PreTrainedModel

# Older releases of transformers copy only the files that this one names, not those that these import.
from .configuration_lowrank import PREFIX, compressed_config_class
from .lowrank_autoencoder import AutoencoderEmbedding as AutoencoderEmbedding
from .lowrank_dense import dense_shape as dense_shape
from .lowrank_joint import JointLinear as JointLinear
from .lowrank_linear import LowRankEmbedding as LowRankEmbedding
from .lowrank_linear import LowRankLinear as LowRankLinear
from .lowrank_model import LowRankMixin, auto_classes
from .lowrank_pivoted import PivotedLinear as PivotedLinear
from .lowrank_plan import PlanError as PlanError
from .lowrank_structures import STRUCTURES as STRUCTURES


def dense_model_class(model_class: type) -> type:
    """The transformers class a `LowRank...` class was made from."""
    return next(base for base in model_class.__mro__ if base.__module__.startswith("transformers.models."))


def compressed_model_class(host: type[PreTrainedModel]) -> type:
    """`LowRankX` for `X`."""
    return __getattr__(PREFIX + host.__name__)


def _auto_class(host: type[PreTrainedModel]) -> str:
    # transformers ships the code of a class that has an auto class. A head without one (GPT-2's double heads) goes by
    # its own name, so that it does not take the place of another in the `auto_map`.
    config_class: Any = host.config_class
    heads = auto_classes(config_class.model_type)
    return next((auto for auto, name in heads.items() if name == host.__name__), PREFIX + host.__name__)


def __getattr__(name: str) -> Any:
    host = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(host, type) and issubclass(host, PreTrainedModel) and host.config_class is not None):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in globals():
        namespace = {
            "__module__": __name__,
            "__doc__": f"`{host.__name__}` with the plan of its configuration installed.",
            "config_class": compressed_config_class(host.config_class),
            "_auto_class": _auto_class(host),
        }
        globals()[name] = type(name, (LowRankMixin, host), namespace)
    return globals()[name]
