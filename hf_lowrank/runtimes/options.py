"""What an export can be told."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lowrank.options import Options, option

RUNTIMES = ("onnx", "openvino")
FLOAT, INT8, INT4, STORED = PRECISIONS = ("float32", "int8", "int4", "as-stored")


@dataclass(frozen=True)
class Draft:
    """How a graph is to be written.

    Args:
        precision: See `ExportOptions`.
        folder: Where; nothing else is there.
        batches: Of text.
        stored: What the model's matrices were rounded to, for `as-stored`.
    """

    precision: str
    folder: Path
    batches: Sequence[Any] = ()
    stored: Sequence[Any] = ()


@dataclass(frozen=True)
class Written:
    """A file that was written.

    Args:
        path: What the runtime is given.
        notes: What of it is in another form than was asked for.
    """

    path: Path
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """What `export` can be told beside the folder.

    Args:
        runtime: What is to run the files: `onnx` or `openvino`.
        precision: Of the matrices: `float32`; `int8`, products of whole numbers; `int4`, the small file; `as-stored`,
            the rounded numbers of the folder (`bits`, `target_size`) without another rounding.
        force: Keep files that fail their check.
        text: To check the files on, and to scale inputs by where a runtime needs that: file, texts or batches.
            Default: two dozen sentences.
    """

    runtime: str = option("onnx", choices=RUNTIMES, metavar="NAME")
    precision: str = option("float32", choices=PRECISIONS, metavar="NAME")
    force: bool = False
    text: Any = None
