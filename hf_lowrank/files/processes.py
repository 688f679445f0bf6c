"""The processes that a launcher started together: which of the work is this one's, and waiting for the others.

They share a file system: what one has found the others read there.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from hf_lowrank.errors import InputError

T = TypeVar("T")


def rank_and_count() -> tuple[int, int]:
    """Which process this is, and of how many.

    Raises:
        InputError: If a launcher started several and Accelerate sees one, as it does on a CPU unless told.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started == 1:
        return 0, 1
    state = PartialState(cpu=not torch.cuda.is_available())
    if state.num_processes != started:
        raise InputError(
            f"The launcher started {started} processes, and each would work alone. On a CPU set ACCELERATE_USE_CPU=1."
        )
    return state.process_index, started


def my_share(work: Sequence[T]) -> Sequence[T]:
    """Every n-th item, for n processes, from this one's own on."""
    rank, count = rank_and_count()
    return work[rank::count]


def wait_for_all() -> None:
    """Go on when all processes are here."""
    if rank_and_count()[1] > 1:
        PartialState().wait_for_everyone()


def told_by_first(value: T) -> T:
    """What the first process has as `value`."""
    if rank_and_count()[1] == 1:
        return value
    told: T = broadcast_object_list([value])[0]
    return told
