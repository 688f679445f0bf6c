"""The configurations in a model folder."""

import json
from pathlib import Path
from typing import Any


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A configuration in a model folder; empty if there is none or it is no JSON object."""
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
