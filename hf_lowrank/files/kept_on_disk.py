"""Tensors that would not all fit in memory: in files until they are asked for."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


@dataclass(eq=False)
class KeptOnDisk(Generic[T]):
    """Tensors that are made when they are first asked for, kept among the temporary files, and read a piece at a time.

    Args:
        make: Gives them; nothing but tensors and what is made of them.
        folder: Where.
    """

    make: Callable[[], T]
    folder: Path
    _name: str = field(default_factory=lambda: f"{uuid.uuid4().hex}.pt")

    def __call__(self) -> T:
        """The tensors."""
        file = self.folder / self._name
        if not file.is_file():
            torch.save(self.make(), file)
        read: T = torch.load(file, mmap=True, weights_only=False)  # our own
        return read
