"""Prune, factorize and train a classifier with mixed ranks, and print what it scores beside the dense one.

    python examples/glue_lpaf.py --model my-bert-on-sst2 --train SST-2/train.tsv --test SST-2/dev.tsv --out small
    python examples/glue_lpaf.py --smoke        # a tiny model with random weights, seconds

The data are files as GLUE has them, or data sets of the Hub such as `nyu-mll/glue:sst2:train`. Nothing is chosen on
the test data.
"""

import argparse

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from hf_lowrank import evaluate, lpaf, make_report
from hf_lowrank.hosts.loading import load_dense


def main() -> None:
    """Compress one classifier."""
    options = parse()
    torch.manual_seed(options.seed)
    if options.smoke:
        dense, tokenizer = tiny()
        train = test = [{"text": f"{'abcdefgh'[i % 8]} b c", "label": int(i % 8 < 4)} for i in range(32)]
        options.epochs, options.keep_targets = 1, 0.5
    else:
        dense, tokenizer = load_dense(options.model), AutoTokenizer.from_pretrained(options.model)
        train, test = options.train, options.test
    small = lpaf(
        dense,
        dataset=train,
        tokenizer=tokenizer,
        keep_targets=options.keep_targets,
        prune_epochs=options.epochs,
        tune_epochs=options.epochs,
        max_examples=options.max_examples,
        consistency=options.consistency,
        seed=options.seed,
        work_dir=options.work_dir,
    )
    found = small.config.compression["provenance"]["lpaf"]
    ranks = found["ranks_after_pruning"].values()
    print(f"rank after pruning: {sum(one['rank'] / one['full_rank'] for one in ranks) / len(ranks):.0%} of full")
    print(f"parameters: {make_report(small).kept_fraction:.1%} of the dense model's")
    scores = evaluate(small, test, "text-classification", dense=dense, tokenizer=tokenizer, cost=False)
    for name in ("accuracy", "f1", "matthews"):
        print(f"{name}: dense {scores.dense.scores[name]:.4f}, compressed {scores.model.scores[name]:.4f}")
    if options.out:
        small.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)


def tiny() -> tuple[BertForSequenceClassification, PreTrainedTokenizerFast]:
    """A model of random weights and a tokenizer of letters."""
    names = ["[PAD]", "[CLS]", "[SEP]", *"abcdefgh"]
    core = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, "[PAD]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", mask_token="[SEP]")
    return BertForSequenceClassification(BertConfig(vocab_size=11, **sizes)).eval(), tokenizer


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder or Hub id of a classifier fine-tuned on the task")
    parser.add_argument("--train", help="examples to train on")
    parser.add_argument("--test", help="examples to report on")
    parser.add_argument("--keep-targets", type=float, default=0.25)
    parser.add_argument("--epochs", type=float, default=3, help="of pruning, and again of the factors")
    parser.add_argument("--max-examples", type=int)
    parser.add_argument("--consistency", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", help="keep checkpoints there, and go on from them after a kill")
    parser.add_argument("--out", help="folder to save to")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
