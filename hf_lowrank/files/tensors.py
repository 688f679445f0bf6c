"""Tensors of safetensors files, read by plain reads: pages of a mapping would count as memory of this process."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file.

    Args:
        key: Its name there.
        dtype: Type to read it in.
    """

    path: Path
    key: str
    dtype: torch.dtype

    def read(self, index: int | None = None) -> torch.Tensor:
        """The tensor, or one of its first dimension.

        Raises:
            OSError: If the file is shorter than it says.
        """
        start, entries = _header(self.path, self.path.stat().st_mtime_ns)
        kind, shape, offset = entries[self.key]
        if index is not None:
            shape, offset = shape[1:], offset + index * _num_bytes(kind, shape[1:])
        count = _num_bytes(kind, shape)
        values = np.fromfile(self.path, np.uint8, count, offset=start + offset)
        if values.nbytes != count:
            raise OSError(f"{self.path} is shorter than it says.")
        return torch.from_numpy(values).view(kind).view(shape).to(self.dtype)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All of a file, each in its own type."""
    entries = _header(path, path.stat().st_mtime_ns)[1]
    return {key: StoredTensor(path, key, entry[0]) for key, entry in entries.items()}


@lru_cache
def _header(path: Path, changed: int) -> tuple[int, dict[str, tuple[torch.dtype, tuple[int, ...], int]]]:
    """Where the numbers begin; type, shape and offset of each tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    found = {k: (_TYPES[e["dtype"]], tuple(e["shape"]), e["data_offsets"][0]) for k, e in entries.items()}
    return 8 + length, found


def _num_bytes(kind: torch.dtype, shape: tuple[int, ...]) -> int:
    return kind.itemsize * math.prod(shape)
