"""Files and folders that appear whole or not at all, and folders that nobody keeps.

All are made in a workshop: a hidden folder beside what will be there, locked as long as its process lives. What a
process that was killed left of one is removed by the next that makes one in the same place.
"""

import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from hf_lowrank.errors import InputError

try:
    import fcntl
except ImportError:  # on Windows nothing is locked, and so nothing cleared
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

_PREFIX = ".hf_lowrank-"
REPLACED = "replaced"  # where a workshop keeps what its output takes the place of
_SCRATCH = "scratch"
_CLAIM = "claim"
_TRIES, _PAUSE = 20, 0.05  # seconds; who looks whether a claim is a dead process's holds it for less


@contextmanager
def workshop(target: Path) -> Iterator[Path]:
    """A folder on the file system of `target`, gone afterwards; on failure so are the parents made for it."""
    with _parents_of(target):
        folder, held = _new_folder(target.parent, target.name)
        try:
            yield folder
        finally:
            _remove(folder, held)


@contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Within, no other process can claim the same target; nothing else hinders any from writing it.

    Raises:
        InputError: If another process has claimed it, or nothing can be written beside it.
    """
    folder = target.with_name(f"{_PREFIX}{target.name}-{_CLAIM}")
    with ExitStack() as stack:
        try:
            stack.enter_context(_parents_of(target))
            stack.callback(_remove, folder, _claim(folder, target))
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error.strerror}. Choose another output.") from error
        yield


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the folders that `target` will be in; on failure they are gone again."""
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for parent in made:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A workshop among the system's temporary folders."""
    with workshop(Path(tempfile.gettempdir()) / _SCRATCH) as folder:
        yield folder


def scratch_folder(owner: object) -> Path:
    """A new folder among the system's temporary ones that goes when its owner does, or the process ends."""
    folder, held = _new_folder(Path(tempfile.gettempdir()), _SCRATCH)
    weakref.finalize(owner, _remove, folder, held)
    return folder


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Put the file that `write` writes in the place of `path`: on an error or a kill the old one is still there.

    What lies in a workshop, nobody else sees and no run after this one: it need not be safe on the disk.
    """
    if any(parent.name.startswith(_PREFIX) for parent in path.parents):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.draft")
        write(draft)
        draft.replace(path)
        return
    with workshop(path) as folder:
        draft = folder / path.name
        write(draft)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)


def write_text(path: Path, text: str) -> None:
    """The same for a text."""
    write_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _new_folder(parent: Path, name: str) -> tuple[Path, int | None]:
    """A new folder and the descriptor that locks it, after those that dead processes left beside it are cleared."""
    for left in parent.glob(f"{_PREFIX}*"):
        _clear(left)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{name}-", dir=parent))
        with suppress(BlockingIOError, FileNotFoundError):  # another process took it for a dead one's
            return folder, _lock(folder)


def _claim(folder: Path, target: Path) -> int | None:
    """The descriptor that locks a claim, which is made if it is not there."""
    for _ in range(_TRIES):
        with suppress(BlockingIOError, FileNotFoundError):
            folder.mkdir(exist_ok=True)
            return _lock(folder)
        time.sleep(_PAUSE)
    raise InputError(f"{target} is being written by another run. Wait for its end, or choose another output.")


def _lock(folder: Path) -> int | None:
    """An open descriptor that locks a folder; None where the file system has no locks.

    Raises:
        BlockingIOError: If another process has it.
        FileNotFoundError: If another process has just removed it.
    """
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise
        return None
    return descriptor


def _clear(left: Path) -> None:
    """Remove a workshop if its process is dead; what its output was about to take the place of is put back."""
    try:
        held = _lock(left)
    except OSError:  # alive, or another user's
        return
    target = left.with_name(left.name.removeprefix(_PREFIX).rpartition("-")[0])
    if held is not None:
        with suppress(OSError):
            if not target.exists():
                (left / REPLACED).rename(target)
        _remove(left, held)


def _remove(folder: Path, held: int | None) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if held is not None:
        os.close(held)
