"""The finished cells of a comparison in its folder: a line each, so that a killed one goes on."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_lowrank.errors import InputError

_LINE = {"method", "budget", "text", "fingerprint", "sizes", "scores"}


def read_lines(file: Path) -> Iterable[dict[str, Any]]:
    """The finished lines; one that a kill cut short is none.

    Raises:
        InputError: If another wrote in the file.
    """
    for number, text in enumerate(file.read_bytes().split(b"\n") if file.is_file() else (), 1):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if not isinstance(line, dict) or line.keys() != _LINE or not isinstance(line["scores"], dict):
            raise InputError(f"Line {number} of {file} is not of a comparison. Give another work_dir, or remove it.")
        yield line


def append_line(file: Path, line: dict[str, Any]) -> None:
    """Write down one more, below whatever a kill left."""
    with file.open("a+b") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - 1, 0))
        cut_short = stream.read() not in (b"", b"\n")
        stream.write((b"\n" if cut_short else b"") + json.dumps(line).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
