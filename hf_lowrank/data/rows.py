"""Rows and texts from anything: a file, a data set, a list."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_lowrank.data.data_files import FILE_TYPES, read_file
from hf_lowrank.errors import InputError
from hf_lowrank.extras import load_part

Row = Mapping[str, Any]

# Beyond it no file system has a name.
_LONGEST_NAME = 255
# What a text is looked for under where no column is named, in this order.
_TEXT_COLUMNS = ("text", "sentence", "content", "document", "source", "article")
# What models read, in batches or in rows that are ready, and how many dimensions a row of it has.
READY = {"input_ids": 1, "pixel_values": 3, "input_values": 1, "input_features": 2}


def load_rows(source: Any, limit: int | None = None, seed: int = 0) -> list[Row]:
    """The rows of a data set, a text being a row `{"text": ...}`.

    Args:
        source: A file (see `hf_lowrank.data.data_files`), a folder of images or sounds, those of a class in a folder
            of its name, the Hub name of a data set (`NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`), a
            `datasets.Dataset`, or an iterable of texts or of rows.
        limit: Draw that many at random, their order kept; None takes all.
        seed: Of that draw.

    Raises:
        InputError: If it cannot be read, holds nothing, or a row is neither a text nor columns of whole characters.
    """
    if isinstance(source, (str, Path)):
        rows = _read(str(source))
    elif isinstance(getattr(source, "column_names", None), dict):
        raise InputError(f"The data set has the splits {', '.join(source)}. Give one of them, such as data['train'].")
    elif isinstance(source, Iterable):
        rows = list(source)
    else:
        raise InputError(f"Data must be a file, a data set's name, texts or rows, got {type(source).__name__}.")
    rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    if not rows:
        raise InputError(f"{_named(source)} is empty. Give some text.")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            kind = type(row).__name__
            raise InputError(f"Data must consist of texts or of rows (dicts), got {kind} as row {number}. Mend it.")
        if not _is_whole(row):
            raise InputError(f"Row {number} of {_named(source)} holds half a character (a surrogate alone). Mend it.")
    return [rows[place] for place in drawn_places(len(rows), limit, seed)]


def drawn_places(count: int, limit: int | None, seed: int) -> list[int]:
    """Which of `count` things are taken: `limit` of them drawn at random, in order; all where there are not more."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), limit))


def _is_whole(value: Any) -> bool:
    """Whether all text in a value can be written as UTF-8."""
    if isinstance(value, str):
        return value.isascii() or value == value.encode(errors="ignore").decode()
    if isinstance(value, Mapping):
        return all(map(_is_whole, value.values()))
    return not isinstance(value, (list, tuple)) or all(map(_is_whole, value))


def load_texts(source: Any, text_column: str | None = None, limit: int | None = None, seed: int = 0) -> list[str]:
    """The texts of a data set that are not blank.

    Args:
        source: See `load_rows`.
        text_column: Column that holds them; None finds it where it is called text, or is the only one of strings.
        limit: Draw that many at random, their order kept; None takes all.
        seed: Of that draw.

    Raises:
        InputError: If there is no such column (with the columns there), or no text.
    """
    rows = load_rows(source)
    column = find_text_column(rows[0], text_column)
    values = [row.get(column) for row in rows]
    if bad := [value for value in values if not isinstance(value, (str, type(None)))]:
        raise InputError(f"Column {column!r} of {_named(source)} must hold text, got {type(bad[0]).__name__}.")
    texts = [value for value in values if isinstance(value, str) and value.strip()]
    if not texts:
        raise InputError(f"{_named(source)} holds no text: all {len(rows)} are blank.")
    return [texts[place] for place in drawn_places(len(texts), limit, seed)]


def find_text_column(row: Row, text_column: str | None = None) -> str:
    """The column that holds a row's text.

    Raises:
        InputError: If the named one is absent, or none is named and it cannot be told, with the columns there.
    """
    if text_column is not None:
        require_columns([row], [text_column])
        return text_column
    named = [name for name in _TEXT_COLUMNS if isinstance(row.get(name), str)]
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if not named and len(strings) != 1:
        raise InputError(f"Which column holds the text? Set text_column to one of: {', '.join(row)}.")
    return (named or strings)[0]


def require_columns(rows: Sequence[Row], columns: Sequence[str], hint: str = "") -> None:
    """Check that every row of a data set has columns.

    Raises:
        InputError: Naming the first that is absent and the columns there.
    """
    for number, row in enumerate(rows, 1):
        for column in columns:
            if column not in row:
                place, there = "" if number == 1 else f" in row {number}", ", ".join(map(str, row))
                raise InputError(f"The data has no column {column!r}{place}; there are: {there}.{hint and ' ' + hint}")


def as_text(value: Any, column: str) -> str:
    """What a column of texts holds; a number is text.

    Raises:
        InputError: If it is neither, with the column's name.
    """
    if not isinstance(value, (str, int, float)) or value != value:
        raise InputError(f"Column {column!r} must hold text, got {type(value).__name__}.")
    return str(value)


def as_number(value: Any, column: str) -> float:
    """What a column of numbers holds, which files give as text.

    Raises:
        InputError: If it is none, with the column's name.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"Column {column!r} must hold numbers, got {str(value)[:50]!r}.")
    return number


def _read(name: str) -> list[Any]:
    path = Path(name)
    if "\n" in name or len(name) > _LONGEST_NAME:
        raise InputError("Data given as one string must be a file or a data set's name. Give texts as a list.")
    if path.is_dir():
        found: list[Any] = load_part("hf_lowrank.data.media", "train").folder_rows(path)
        if not found:
            raise InputError(f"{name} is a folder. Give a file in it, or the Hub name of a data set.")
        return found
    if path.is_file():
        return read_file(path)
    if path.suffix in FILE_TYPES:
        raise InputError(f"There is no file {name}.")
    rows: list[Any] = load_part("hf_lowrank.data.hub_datasets", "train").load_hub_rows(name)
    return rows


def source_name(source: Any) -> str:
    """What a record calls data: a file's name without where it lies, a Hub name, or what kind of data it was."""
    if isinstance(source, (str, Path)):
        return Path(source).name if Path(source).exists() else str(source)
    is_texts = isinstance(source, Sequence) and bool(source) and isinstance(source[0], str)
    return "texts" if is_texts else "batches" if is_ready(source) else "rows"


def is_ready(source: Any) -> bool:
    """Whether a source that can be read again holds batches or rows of what models read, such as token ids."""
    if isinstance(source, (str, Path)) or not isinstance(source, Iterable):
        return False
    first = next(iter(source), None)
    return isinstance(first, Mapping) and bool(READY.keys() & first.keys())


def _named(source: Any) -> str:
    return str(source) if isinstance(source, (str, Path)) else "The data"
