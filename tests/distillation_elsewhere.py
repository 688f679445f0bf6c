"""Run by test_training_processes.py in one or two processes: a distillation whose losses are printed."""

import json
import os
import sys

import tiny_models
import torch
from tiny_training import arguments, rows

from hf_lowrank import compress
from hf_lowrank.training.distillation import DistillationTrainer
from hf_lowrank.training.features import PaddingCollator

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def main(folder):
    torch.set_num_threads(1)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    teacher = tiny_models.build("BertForMaskedLM", **NO_DROPOUT)
    student = compress(teacher, rank=5, method="svd")
    args = arguments(folder, per_device_train_batch_size=8 // processes, max_steps=4)
    trainer = DistillationTrainer(
        model=student,
        args=args,
        train_dataset=rows(32, length=11),
        data_collator=PaddingCollator(0),
        teacher=teacher,
        losses={"logits": 1, "hidden": 1, "attention": 0.1},
    )
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        logged = [{k: v for k, v in entry.items() if k.startswith("loss")} for entry in trainer.state.log_history]
        sys.stdout.write(f"LOSSES{json.dumps([entry for entry in logged if entry])}\n")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
