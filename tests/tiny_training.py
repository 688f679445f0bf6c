"""Data and arguments for trainings of a few steps."""

import tiny_models
import torch
from transformers import TrainerCallback, TrainingArguments


def rows(count=8, length=9, labels=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(count):
        ids = torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator)
        row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        row["attention_mask"][length - index % 3 :] = 0
        if labels == "class":
            row["labels"] = torch.tensor(index % 2)
        found.append(row)
    return found


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "report_to": [], "use_cpu": True,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "linear",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


class StopAt(TrainerCallback):
    """Ends a training early, as a kill after a checkpoint would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
