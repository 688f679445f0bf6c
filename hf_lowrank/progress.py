"""How long work tells where it is: a wrapper around what it iterates over, as `tqdm` has made customary."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """Passes on the items of `work`, showing how many are done."""

    def __call__(self, work: Sequence[T], description: str) -> Iterable[T]: ...


def no_progress(work: Sequence[T], description: str) -> Iterable[T]:
    """Shows nothing."""
    return work


def progress_bar(work: Sequence[T], description: str) -> Iterable[T]:
    """A bar with the remaining time, on standard error if that is a terminal."""
    console = Console(stderr=True)
    return track(work, description, console=console, transient=True, disable=not console.is_terminal)
