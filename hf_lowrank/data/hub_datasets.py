"""Data sets of the Hub and parquet files as rows; the one module that needs `datasets`."""

from pathlib import Path
from typing import Any

import datasets
from pyarrow import ArrowException
from pyarrow.parquet import read_table

from hf_lowrank.errors import InputError, one_line


def load_hub_rows(name: str) -> list[dict[str, Any]]:
    """All rows of one split of a data set, given as `NAME`, `NAME:CONFIG` or `NAME:CONFIG:SPLIT`.

    Without a split, the only one there is, or `train`.

    Raises:
        InputError: If it cannot be had, with the first line of the reason.
    """
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None, split=split or None)
    except Exception as error:  # of the builder of any data set
        raise InputError(
            f"There is no file {name!r}, and the Hub data set of that name cannot be loaded: {one_line(error)} "
            "Give a file (.txt, .jsonl, .json, .csv, .tsv, .parquet), or NAME:CONFIG:SPLIT of a data set."
        ) from error
    if isinstance(loaded, dict):
        if len(loaded) > 1 and "train" not in loaded:
            raise InputError(f"{name} has the splits {', '.join(loaded)}. Choose one: {path}:{config}:SPLIT.")
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return list(loaded)


def read_parquet(path: Path) -> list[dict[str, Any]]:
    """All rows of a parquet file.

    Raises:
        InputError: If it is none.
    """
    try:
        rows: list[dict[str, Any]] = read_table(path).to_pylist()
    except ArrowException as error:
        raise InputError(f"{path} is not a parquet file: {one_line(error)}") from error
    return rows
