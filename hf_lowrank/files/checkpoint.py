"""What a long computation has finished, kept so that the process after a kill goes on from there."""

from pathlib import Path
from typing import Any

import torch

from hf_lowrank.files.scratch import write_file


class Checkpoint:
    """The latest state of a computation, in a file of its own; without a folder nothing is kept.

    Args:
        folder: Of computations that start from the same numbers.
        name: Of this one, with all that it depends on besides.
    """

    def __init__(self, folder: Path | None = None, name: str = "") -> None:
        self._folder = folder
        self._name = name

    def part(self, name: str) -> "Checkpoint":
        """That of one part of the computation."""
        return Checkpoint(self._folder, f"{self._name}-{name}" if self._name else name)

    def load(self) -> Any | None:
        """What was saved last: tensors, numbers and names in dicts and lists; None if nothing was."""
        if self._folder is None or not self._file.is_file():
            return None
        return torch.load(self._file, weights_only=True)

    def save(self, state: dict[str, Any]) -> None:
        """Put `state` in the place of what was saved before; a kill in the middle leaves the older one."""
        if self._folder is not None:
            write_file(self._file, lambda draft: torch.save(state, draft))

    @property
    def _file(self) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}.pt"


NOT_KEPT = Checkpoint()
