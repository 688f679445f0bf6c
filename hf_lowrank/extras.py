"""Parts that need an optional dependency: each is a module of its own that imports it at the top, loaded here."""

import importlib
from typing import Any

from hf_lowrank.errors import InputError


def load_part(module: str, extra: str) -> Any:
    """Import one of our modules that needs the optional dependencies named `extra`.

    Raises:
        InputError: If one of those is not installed, with the command that installs them.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("hf_lowrank"):
            raise
        raise InputError(
            f"This needs the package {error.name}, which is not installed. Run: pip install 'hf-lowrank[{extra}]'"
        ) from error
