"""How a training of ours is done where nothing else is asked for."""

from typing import Any

import torch
from transformers import TrainingArguments

from hf_lowrank.training.processes import check_launch

_EVALUATIONS = 10


def make_arguments(folder: str, *, batch_size: int, epochs: float, **options: Any) -> TrainingArguments:
    """AdamW without decay, warmed up over a tenth, then falling as a cosine; ten evaluations and one before the start.

    Batches are of rows of like lengths, since padding costs what words do.

    Args:
        folder: Where checkpoints go, if any are asked for.
        batch_size: Examples a step, of all processes together; each takes the same share of them, rounded up.
        options: More of `TrainingArguments`.

    Raises:
        InputError: If several processes were started and know nothing of each other.
    """
    defaults: dict[str, Any] = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "weight_decay": 0.0,
        "adam_beta2": 0.98,
        "train_sampling_strategy": "group_by_length",
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 1 / _EVALUATIONS,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    args = TrainingArguments(output_dir=folder, num_train_epochs=epochs, **{**defaults, **options})
    check_launch(args)
    share = -(-batch_size // args.world_size)
    args.per_device_train_batch_size, args.per_device_eval_batch_size = share, 2 * share
    return args
