"""One training in several processes: what all of them must have, and what only one does afterwards."""

import gc
import os
from collections.abc import Iterable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from transformers import TrainingArguments

from hf_lowrank.errors import InputError


def check_launch(args: TrainingArguments) -> None:
    """Refuse processes that know nothing of each other: each would train alone, and write where the others do.

    Raises:
        InputError: If a launcher started several and Accelerate sees one, as it does on a CPU unless told.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and args.world_size == 1:
        raise InputError(
            f"The launcher started {started} processes, and each would train alone. On a CPU set ACCELERATE_USE_CPU=1."
        )


@torch.no_grad()
def share_(tensors: Iterable[torch.Tensor]) -> None:
    """Overwrite tensors by those of the first process."""
    for tensor in tensors:
        tensor.copy_(broadcast(tensor.detach().contiguous()))


def end_as_first() -> bool:
    """End the group of processes, if there is one; whether this process is the one that writes and prints.

    A model in its wrapper holds the group, whose threads drop their last tensors when they come to it. Left to the
    end of the process, torch 2.13 with gloo at times aborts or hangs there, after all work is done.
    """
    state = PartialState()
    is_first = bool(state.is_main_process)
    gc.collect()  # the wrapper, which its trainer holds in a circle
    state.destroy_process_group()
    return is_first
