"""Mixed-rank training in a plain Accelerate loop, without a Trainer.

    accelerate launch --config_file examples/accelerate/one_process.yaml examples/accelerate/mixed_rank.py --smoke

Prints the number of processes and the loss of every step as one JSON object: the same losses for any number of
processes, since the batch is split among them and a layer's draw is the same in all.
"""

import argparse
import copy
import json
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_lowrank import MixedRank, compress
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.training.callbacks.schedules import Span
from hf_lowrank.training.features import PaddingCollator, make_features
from hf_lowrank.training.processes import end_as_first


def main() -> None:
    """Train, and leave no thread behind."""
    options = parse()
    set_seed(options.seed)
    # The order of the data follows from the seed alone, not from the process that draws it.
    data = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=options.seed)
    # A layer that takes its full-rank weight leaves its factors without a gradient in that step.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(kwargs_handlers=[unused], dataloader_config=data)
    found = {"processes": accelerator.num_processes, "losses": train(accelerator, options)}
    accelerator.free_memory()
    if end_as_first():
        print(json.dumps(found))


def train(accelerator: Accelerator, options: argparse.Namespace) -> list[float]:
    """Train the factors of one sparse model; the loss of every step."""
    if options.smoke:
        pruned, features, padding = tiny()
        options.steps, options.batch_size, options.keep_targets, options.learning_rate = 6, 8, 0.5, 1e-3
    else:
        pruned, tokenizer = load_dense(options.model), AutoTokenizer.from_pretrained(options.model)
        features, padding = make_features(pruned, tokenizer, options.train), tokenizer.pad_token_id
    small = compress(copy.deepcopy(pruned), keep_targets=options.keep_targets, method="svd")
    mixed = MixedRank(
        small, pruned, max_steps=options.steps, span=Span(0, 0.7), consistency=options.consistency, seed=options.seed
    )
    optimizer = torch.optim.AdamW(small.parameters(), lr=options.learning_rate, weight_decay=0.0)
    loader = DataLoader(
        features, options.batch_size, shuffle=True, collate_fn=PaddingCollator(padding), drop_last=True
    )
    model, optimizer, loader = accelerator.prepare(small, optimizer, loader)
    losses: list[float] = []
    model.train()
    while len(losses) < options.steps:
        for batch in loader:
            mixed.draw(len(losses))
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss.detach(), reduction="mean")))
            if len(losses) == options.steps:
                break
    mixed.finish()
    if options.out and accelerator.is_main_process:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False).save_pretrained(options.out)
    return losses


def tiny() -> tuple[BertForSequenceClassification, list[dict[str, torch.Tensor]], int]:
    """A sparse model of random weights and rows of random tokens."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # Dropout is drawn by each process for itself.
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, **sizes, **rates)).eval()
    with torch.no_grad():
        for matrix in find_matrices(model):
            if matrix.role == "block":
                weight = matrix.module.get_parameter("weight")
                weight.mul_(torch.rand(weight.shape) < 0.3)
    features = []
    for index in range(32):
        ids = torch.randint(1, 50, (6 + index % 5,))
        features.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor(index % 2)})
    return model, features, 0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder or Hub id of a pruned classifier")
    parser.add_argument("--train", help="examples to train on")
    parser.add_argument("--keep-targets", type=float, default=0.25)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--consistency", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder to save to")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
