"""How long work tells where it is: a wrapper around what it iterates over, as `tqdm` has made customary."""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar, runtime_checkable

from rich.console import Console
from rich.progress import track

SECONDS_A_LINE = 5.0

T = TypeVar("T")


@runtime_checkable
class Progress(Protocol):
    """Passes on the items of `work`, showing how many are done."""

    def __call__(self, work: Sequence[T], description: str) -> Iterable[T]: ...


def no_progress(work: Sequence[T], description: str) -> Iterable[T]:
    """Shows nothing."""
    return work


def progress_bar(work: Sequence[T], description: str) -> Iterable[T]:
    """A bar with the remaining time on standard error, or where that is no terminal a plain line now and then."""
    console = Console(stderr=True)
    return (
        track(work, description, console=console, transient=True) if console.is_terminal else _told(work, description)
    )


def _told(work: Sequence[T], description: str) -> Iterator[T]:
    for done, item in enumerate(work):
        tell(f"{description}, {done} of {len(work)} done")
        yield item


def tell(line: str) -> None:
    """Write a line where a command runs, unless the last one, whichever work that was of, is that fresh."""
    if Lines.are_wanted and time.monotonic() - Lines.last >= SECONDS_A_LINE:
        Lines.last = time.monotonic()
        sys.stderr.write(f"hf-lowrank: {line}\n")


class Lines:
    """Those of this process: whether it is a command, and when it wrote one, or began."""

    are_wanted = False
    last = time.monotonic()
