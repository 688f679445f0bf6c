"""Compress a causal language model by several methods, recover each, and print what came back.

    python examples/recover_gpt2.py --model my-gpt2 --train texts.jsonl --test wiki.test.raw
    python examples/recover_gpt2.py --smoke        # a tiny model with random weights, seconds

Perplexity is reported on the test text. Factors are found and trained on the training text alone, and the state that
is kept is chosen on a part of that which is not trained on.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import beginning, detokenized
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_lowrank import compress, recover
from hf_lowrank.data.rows import load_texts
from hf_lowrank.evaluation import make_task
from hf_lowrank.hosts.loading import load_dense

_BLOCK = 128

METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "allocation": "uniform"},
    "weighted_svd": {"method": "weighted_svd", "allocation": "uniform"},
    "whitened_svd": {"method": "whitened_svd", "allocation": "uniform"},
    "two_sided_svd": {"method": "two_sided_svd", "allocation": "first_order"},
}


def main() -> None:
    """Print one row a method."""
    options = parse()
    torch.manual_seed(options.seed)
    if options.smoke:
        dense, tokenizer = tiny()
        texts = test = tiny_texts()
        options.examples, options.methods = 32, ["svd", "two_sided_svd"]
    else:
        dense, tokenizer = load_dense(options.model, torch.float32), AutoTokenizer.from_pretrained(options.model)
        texts, test = load_texts(options.train), detokenized(Path(options.test))
        test = beginning(test, tokenizer, options.test_blocks, _BLOCK)
    task = make_task("causal-lm", block_length=_BLOCK)

    def perplexity(model: Any) -> float:
        return task.evaluate(model, tokenizer, test)["perplexity"]

    start = perplexity(dense)
    print(
        f"dense: perplexity {start:.1f}; {options.keep_targets:.0%} of the blocks' matrices stay; seed {options.seed}"
    )
    print(f"{'method':<16}{'compressed':>12}{'recovered':>12}{'loss closed':>13}{'best step':>11}{'minutes':>9}")
    for name in options.methods:
        small = compress(
            dense, keep_targets=options.keep_targets, calibration=texts, tokenizer=tokenizer, refine_passes=0,
            **METHODS[name],
        )  # fmt: skip
        before, clock = perplexity(small), time.perf_counter()
        recover(
            small, teacher=dense, dataset=texts, tokenizer=tokenizer, max_examples=options.examples,
            epochs=options.epochs, learning_rate=options.learning_rate, seed=options.seed,
        )  # fmt: skip
        minutes, after = (time.perf_counter() - clock) / 60, perplexity(small)
        closed = torch.tensor([before / after]).log() / torch.tensor([before / start]).log()
        step = small.config.compression["provenance"]["recovery"]["step"]
        print(f"{name:<16}{before:>12.1f}{after:>12.1f}{float(closed):>12.0%}{step:>11}{minutes:>9.1f}", flush=True)


def tiny() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast]:
    """A model of random weights and a tokenizer of letters."""
    core = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate("abcdefghijklmnop.")}, "."))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 16, "eos_token_id": 16}
    return GPT2LMHeadModel(GPT2Config(vocab_size=17, **sizes)).eval(), PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="."
    )


def tiny_texts() -> list[str]:
    """Letters in the order of the alphabet."""
    return [" ".join("abcdefghijklmnop"[i % 16] for i in range(start, start + 40)) for start in range(40)]


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder or Hub id of a causal language model")
    parser.add_argument("--train", help="text to look at and to train on")
    parser.add_argument("--test", help="text to report on, in the form of WikiText")
    parser.add_argument("--keep-targets", type=float, default=0.5)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--examples", type=int, default=4096, help="sequences of 128 tokens to train on")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--learning-rate", type=float, help="default: what suits the method")
    parser.add_argument("--test-blocks", type=int, default=200, help="of 128 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
