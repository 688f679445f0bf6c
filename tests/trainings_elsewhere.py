"""Every training in this process and its companions, if it has any: what it logs, and what its model then says.

Run by test_training_processes.py as `trainings_elsewhere.py FOLDER`, alone or by a launcher; each process
writes FOLDER/RANK.json.
"""

import copy
import json
import os
import sys
from pathlib import Path

import tiny_models
import torch
from tiny_training import arguments, rows
from transformers import Trainer

from hf_lowrank import compress, lpaf, recover
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.training.callbacks.mixed_rank import MixedRankCallback
from hf_lowrank.training.callbacks.pruning import IMPORTANCES, FirstOrderPruningCallback
from hf_lowrank.training.callbacks.rank_schedule import RankScheduleCallback, StableRankPenaltyCallback
from hf_lowrank.training.distillation import DistillationTrainer
from hf_lowrank.training.features import PaddingCollator
from hf_lowrank.training.processes import end_as_first

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# Dropout is drawn by each process for itself.
HEAD, OPTIONS = "BertForSequenceClassification", {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BATCH, STEPS = 8, 6


def dense_model():
    return tiny_models.build(HEAD, **OPTIONS)


def sparse_model():
    model = dense_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for matrix in find_matrices(model):
            if matrix.role == "block":
                weight = matrix.module.weight
                weight.mul_(torch.rand(weight.shape, generator=generator) < 0.3)
    return model


def small_model(dense):
    return compress(copy.deepcopy(dense), rank=5, method="svd")


def trained(folder, model, callback=None, make=Trainer, **options):
    # The Trainer takes a classifier's loss for a sum over tokens, and multiplies it by the number of processes.
    sizes = {"per_device_train_batch_size": BATCH // PROCESSES, "average_tokens_across_devices": False}
    args = arguments(folder, max_steps=STEPS, **sizes)
    trainer = make(
        model=model,
        args=args,
        train_dataset=rows(BATCH * STEPS, length=11, labels="class"),
        data_collator=PaddingCollator(0),
        callbacks=[callback] if callback else [],
        **options,
    )
    trainer.train()
    return model, [value for entry in trainer.state.log_history for value in of_losses(entry)]


def of_losses(logged):
    # The Trainer's summary and norm are of one process alone.
    return [value for name, value in logged.items() if name.startswith(("loss", "pruning"))]


def distilled(folder):
    dense = dense_model()
    losses = {"logits": 1, "hidden": 1, "attention": 0.1}
    return trained(folder, small_model(dense), make=DistillationTrainer, teacher=dense, losses=losses)


def pruned(importance):
    return lambda folder: trained(folder, dense_model(), FirstOrderPruningCallback(0.4, importance=importance))


def mixed(consistency):
    def training(folder):
        dense = sparse_model()
        return trained(folder, small_model(dense), MixedRankCallback(dense, consistency=consistency))

    return training


def data(labels):
    """What is trained on, and what is chosen by."""
    return {"dataset": rows(48, length=11, labels=labels), "eval_dataset": rows(16, length=11, labels=labels, seed=1)}


def recovered(head):
    def training(folder):
        dense = tiny_models.build(head, **(OPTIONS if "Bert" in head else {}))
        labels = "class" if head == HEAD else None
        small = recover(
            small_model(dense), teacher=dense, **data(labels), batch_size=BATCH, epochs=1, learning_rate=1e-3
        )  # fmt: skip
        found = small.config.compression["provenance"]["recovery"]
        assert found["step"] > 0
        return small, [found["before"], found["after"], found["step"]]

    return training


def pruned_and_factorized(keep_targets=0.4, **options):
    def training(folder):
        small = lpaf(
            dense_model(), **data("class"), keep_targets=keep_targets, batch_size=BATCH, prune_epochs=1, tune_epochs=1,
            tune_learning_rate=1e-3, probability=0.5, **options,
        )  # fmt: skip
        return small, list(small.config.compression["provenance"]["lpaf"]["held_out_loss"].values())

    return training


TRAININGS = {
    # First: where nothing has joined the processes yet.
    **{f"recover {head}": recovered(head) for head in (HEAD, "BertModel", "BertForMaskedLM", "GPT2LMHeadModel")},
    "distillation": distilled,
    **{f"pruning by {importance}": pruned(importance) for importance in IMPORTANCES},
    "mixed ranks": mixed(0.0),
    "mixed ranks with consistency": mixed(0.5),
    "rank schedule": lambda folder: trained(folder, small_model(dense_model()), RankScheduleCallback(0.5, cuts=2)),
    "stable rank penalty": lambda folder: trained(folder, dense_model(), StableRankPenaltyCallback(1.0)),
    "lpaf": pruned_and_factorized(),
    # At 0.4 two scores are equal but for rounding, and which of them is kept moves the losses by 4e-4.
    "lpaf by the labels alone": pruned_and_factorized(0.3, losses={"task": 1.0}, consistency=0.5),
}


def main(folder):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokens = rows(4, length=11, seed=2)
    inputs = PaddingCollator(0)(tokens)
    found = {}
    for name, training in TRAININGS.items():
        model, losses = training(Path(folder) / name)
        with torch.no_grad():
            says = model.eval()(**inputs)[0].flatten().tolist()
        found[name] = {"losses": losses, "says": says}
    file = Path(folder) / f"{os.environ.get('RANK', '0')}.json"
    file.write_text(json.dumps({"processes": PROCESSES, "found": found}))
    end_as_first()


if __name__ == "__main__":
    main(sys.argv[1])
