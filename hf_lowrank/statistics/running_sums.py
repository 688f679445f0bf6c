"""Sums over batches that live in a file: memory holds one piece of one of them, and a kill loses one batch at most."""

import json
import shutil
from io import BufferedRandom
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_lowrank.files.scratch import write_file, write_text

_ITEMSIZE = 8
_COPIED_AT_ONCE = 1 << 20


class RunningSums:
    """Named float64 tensors on disk that are added to, batch by batch.

    Two files take turns: while a batch is added, sums are read from the one that holds all batches before it and
    written to the other, so that the first stays whole until `commit` has noted that the other one is. However the
    process ends, the next one finds the sums after the last whole batch. (Not if the machine goes down: when files
    reach the disk is up to the system.) Plain reads and writes, not a mapping: pages of a mapping would count as
    memory of this process, and a full disk would end it without an error.

    Args:
        path: Where `save` writes the sums; the files that they are made in lie beside it.
        about: What the sums are of, as JSON holds it; those of anything else are not gone on with.

    Attributes:
        num_batches: How many batches are committed.
        notes: Anything JSON holds that is to be kept with the sums from commit to commit.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self._path = path
        self._about = about
        self._state = path.with_suffix(".state.json")
        self._halves = [path.with_suffix(f".sums{index}") for index in range(2)]
        known = json.loads(self._state.read_text(encoding="utf-8")) if self._state.is_file() else {}
        if known.get("about") != about:
            known = {}
            self._state.unlink(missing_ok=True)  # before the files it speaks of are emptied
        self._current: int = known.get("current", 0)
        self.num_batches: int = known.get("num_batches", 0)
        self.notes: dict[str, Any] = known.get("notes", {})
        self._places: dict[str, tuple[int, list[int]]] = {key: tuple(place) for key, place in known.get("places", [])}
        self._added: set[str] = set()  # keys whose sum is in the other file already
        path.parent.mkdir(parents=True, exist_ok=True)
        self._files: list[BufferedRandom] = [half.open("r+b" if known else "w+b") for half in self._halves]

    def __enter__(self) -> "RunningSums":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    def add(self, key: str, value: torch.Tensor) -> None:
        """Add to the sum of that name, which is the value itself if it is new."""
        found: NDArray[Any] = value.detach().cpu().numpy()
        if key not in self._places:
            self._places[key] = (self._end, list(found.shape))
            total = found.astype(np.float64, order="C")
        else:
            total = self._read(key, 1 - self._current if key in self._added else self._current)
            total += found
        self._write(key, total)

    def commit(self) -> None:
        """The batch is whole: what was added stays, whatever happens now."""
        for key in self._places.keys() - self._added:
            self._write(key, self._read(key, self._current))
        self._added.clear()
        self._current = 1 - self._current
        self._files[self._current].flush()
        self.num_batches += 1
        state = {
            "about": self._about,
            "current": self._current,
            "num_batches": self.num_batches,
            "notes": self.notes,
            "places": list(self._places.items()),
        }
        write_text(self._state, json.dumps(state))

    def save(self, metadata: dict[str, str]) -> None:
        """Write what is committed as one safetensors file, and remove the files it was made in."""
        header: dict[str, Any] = {"__metadata__": metadata}
        for key, (start, shape) in self._places.items():
            header[key] = {"dtype": "F64", "shape": shape, "data_offsets": [start, start + _num_bytes(shape)]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _ITEMSIZE)
        source = self._files[self._current]
        source.seek(0)
        source.truncate(self._end)  # a batch that was killed may have left more

        def copy(draft: Path) -> None:
            with draft.open("wb") as target:
                target.write(len(text).to_bytes(8, "little") + text)
                shutil.copyfileobj(source, target, _COPIED_AT_ONCE)

        write_file(self._path, copy)
        for file, half in zip(self._files, self._halves, strict=True):
            file.close()
            half.unlink()
        self._state.unlink(missing_ok=True)

    @property
    def _end(self) -> int:
        return sum(_num_bytes(shape) for _, shape in self._places.values())

    def _read(self, key: str, index: int) -> NDArray[np.float64]:
        start, shape = self._places[key]
        values = np.empty(shape, np.float64)
        self._files[index].seek(start)
        if self._files[index].readinto(values.data.cast("B")) != values.nbytes:
            raise OSError(f"{self._halves[index]} is shorter than it was. Remove it to begin anew.")
        return values

    def _write(self, key: str, values: NDArray[np.float64]) -> None:
        file = self._files[1 - self._current]
        file.seek(self._places[key][0])
        file.write(values.data.cast("B"))
        self._added.add(key)


def _num_bytes(shape: list[int]) -> int:
    return _ITEMSIZE * int(np.prod(shape))
