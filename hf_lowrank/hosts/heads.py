"""Which auto class of transformers loads a compressed model."""

from typing import Any

from hf_lowrank.remote_code.configuration_lowrank import stock_class
from hf_lowrank.remote_code.lowrank_model import auto_classes


def auto_class(model_class: Any) -> str | None:
    """The auto class that loads a compressed class as it was saved; None for a head that has none."""
    host: Any = stock_class(model_class)
    heads = auto_classes(host.config_class.model_type)
    # The shortest name is the plainest: AutoModel rather than AutoModelForTextEncoding.
    return min((auto for auto, name in heads.items() if name == host.__name__), key=len, default=None)
