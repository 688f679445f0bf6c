"""Finished rows of a table, kept as files."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def kept(file: Path, make: Callable[[], Row]) -> Row:
    """What is in a file, or what is made for it."""
    if not file.is_file():
        start = time.process_time()
        row = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row | {"seconds": time.process_time() - start}, indent=1), encoding="utf-8")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
