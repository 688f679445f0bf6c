"""What head a model has, and which auto class of transformers loads it."""

from typing import Any

from hf_lowrank.remote_code.configuration_lowrank import stock_class
from hf_lowrank.remote_code.lowrank_model import auto_classes


def auto_class(model_class: Any) -> str | None:
    """The auto class that loads a compressed class as it was saved; None for a head that has none."""
    host: Any = stock_class(model_class)
    heads = auto_classes(host.config_class.model_type)
    # The shortest name is the plainest: AutoModel rather than AutoModelForTextEncoding.
    return min((auto for auto, name in heads.items() if name == host.__name__), key=len, default=None)


def says_vectors(model: Any) -> bool:
    """Whether what a model says of a text is one vector: it has no head, and no decoder."""
    config = model.config
    return model.base_model is model and not (model.can_generate() or getattr(config, "is_encoder_decoder", False))
