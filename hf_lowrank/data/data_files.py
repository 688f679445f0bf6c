"""Data files as rows: text, JSON, JSON lines, CSV, TSV, parquet."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_lowrank.errors import InputError
from hf_lowrank.extras import load_part

# A file whose lines are all this short at most, with blank lines between some, was wrapped by an editor.
_WRAPPED_LINE = 120
_LARGEST_CELL = 1 << 30  # characters; csv's own limit of 131072 is less than an article


def read_file(path: Path) -> list[Any]:
    """The rows of a file by its suffix; anything unknown is read as text.

    Raises:
        InputError: If it is not what its suffix says.
    """
    return FILE_TYPES.get(path.suffix.lower(), _read_plain)(path)


def _read_plain(path: Path) -> list[Any]:
    """One text a line; one text a paragraph where lines are wrapped and blank lines part paragraphs."""
    lines = [line.strip() for line in _text_of(path).splitlines()]
    if all(lines) or max(map(len, lines), default=0) > _WRAPPED_LINE:
        return [line for line in lines if line]
    paragraphs = "\n".join(lines).split("\n\n")
    return [" ".join(paragraph.split("\n")).strip() for paragraph in paragraphs if paragraph.strip()]


def _read_json_lines(path: Path) -> list[Any]:
    return [_parse(path, line, number) for number, line in enumerate(_text_of(path).split("\n"), 1) if line.strip()]


def _read_json(path: Path) -> list[Any]:
    """A list, or an object with the list under `data`."""
    content = _parse(path, _text_of(path), 1)
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise InputError(f"{path} must be a JSON list of texts or objects, or have one under 'data'.")
    return rows


def _read_csv(path: Path) -> list[Any]:
    return _read_cells(path, io.StringIO(_text_of(path), newline=""))


def _read_tsv(path: Path) -> list[Any]:
    """Quotes are characters like any other, as in GLUE's files."""
    lines = _text_of(path).split("\n")
    return _read_cells(path, (line for line in lines if line), delimiter="\t", quoting=csv.QUOTE_NONE)


def _read_cells(path: Path, lines: Iterable[str], **form: Any) -> list[Any]:
    csv.field_size_limit(_LARGEST_CELL)
    try:
        rows = list(csv.DictReader(lines, **form))
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as rows: {error}. Mend it.") from error
    for number, row in enumerate(rows, 1):
        if None in row:
            raise InputError(f"Row {number} of {path} has more cells than the first line has names. Quote its commas.")
    return rows


def _read_parquet(path: Path) -> list[Any]:
    rows: list[Any] = load_part("hf_lowrank.data.hub_datasets", "train").read_parquet(path)
    return rows


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start}). Convert it.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error


def _parse(path: Path, text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error.msg} in line {line + error.lineno - 1}.") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply in line {line}. Give a list of texts or objects.") from error


# suffix -> reader
FILE_TYPES: dict[str, Callable[[Path], list[Any]]] = {
    ".txt": _read_plain,
    ".raw": _read_plain,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
}
