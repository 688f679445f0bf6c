"""Train a small T5 or BART to say the words of a text backwards, compress it, recover it, and print what each costs.

    python examples/reverse_texts.py --model t5 --text wiki.train.raw --out build/reverse-t5
    python examples/reverse_texts.py --smoke        # a smaller model, a few steps, seconds

Token accuracy is of texts that neither the training nor the compression saw: how often the next token of the reversed
text is the most likely one. The tokenizer is learned from the text: Unigram with an end token for T5, byte-level BPE
for BART. `--out` keeps the dense model, the compressed and the recovered one, and the texts, for the command line.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_lowrank import compress, evaluate, recover
from hf_lowrank.data.target_texts import pair_batches, with_targets
from hf_lowrank.sharing.saving import save_folder

Row = dict[str, str]

_WORDS = 200
_BATCH = 32


def main() -> None:
    """Print one row a model."""
    options = parse()
    torch.manual_seed(options.seed)
    words = frequent_words(options.text)
    tokenizer = TOKENIZERS[options.model](words)
    rows = make_rows(words, options.rows, options.seed)
    train, calibration, test = (
        rows[: -2 * options.held_out],
        rows[-2 * options.held_out : -options.held_out],
        rows[-options.held_out :],
    )
    dense = MODELS[options.model](len(tokenizer), options.width, options.layers)
    learn(dense, pair_batches(train, tokenizer, None, "target", 64, _BATCH), options.steps)
    if options.out is not None:
        keep(options.out, {"dense": dense}, tokenizer, {"train": train, "calibration": calibration, "test": test})

    def accuracy(model: Any) -> float:
        return evaluate(model, test, "seq2seq-lm", tokenizer=tokenizer, cost=False).model.scores["token_accuracy"]

    best = accuracy(dense)
    print(f"{options.model}: {options.keep_targets:.0%} of the blocks' matrices stay; {len(test)} texts")
    print(f"{'dense':<24}{best:>8.2%}")
    given: dict[str, Any] = {"keep_targets": options.keep_targets, "seed": options.seed}
    for name, own in {
        "svd": {"method": "svd"},
        "two_sided_svd": {"calibration": calibration, "tokenizer": tokenizer},
    }.items():
        small = compress(dense, **given, **own)
        print(f"{name:<24}{accuracy(small):>8.2%}", flush=True)
        recover(
            small, teacher=dense, dataset=calibration, tokenizer=tokenizer, epochs=options.epochs, seed=options.seed
        )
        print(f"{name + ', recovered':<24}{accuracy(small):>8.2%}", flush=True)
        if options.out is not None:
            keep(options.out, {name: small}, tokenizer, {})


def learn(model: Any, batches: list[Any], steps: int) -> None:
    """Train a model on its own loss with a cosine from 1e-3."""
    batches = with_targets(batches, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    draw, model = random.Random(0), model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**draw.choice(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def frequent_words(text: Path | None) -> list[str]:
    """The most frequent words of a text, or words that are made up."""
    if text is None:
        draw = random.Random(0)
        return ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 6))) for _ in range(_WORDS)]
    found = Counter(re.findall(r"[a-z]{2,}", text.read_text(encoding="utf-8").lower()))
    return [word for word, _ in found.most_common(_WORDS)]


def make_rows(words: list[str], count: int, seed: int) -> list[Row]:
    """Texts of four to eight words, and the same backwards."""
    draw = random.Random(seed)
    texts = [draw.choices(words, k=draw.randint(4, 8)) for _ in range(count)]
    return [{"source": " ".join(text), "target": " ".join(reversed(text))} for text in texts]


def unigram(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer as T5's."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    core.train_from_iterator(
        words * 8, trainers.UnigramTrainer(vocab_size=256, special_tokens=special, unk_token="<unk>")
    )
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def byte_pairs(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer as BART's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([f" {word}" for word in words], trainer)
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {
        "bos": "<s>",
        "pad": "<pad>",
        "eos": "</s>",
        "unk": "<unk>",
        "mask": "<mask>",
        "cls": "<s>",
        "sep": "</s>",
    }
    return PreTrainedTokenizerFast(tokenizer_object=core, **{f"{name}_token": token for name, token in names.items()})


def t5(vocabulary: int, width: int, layers: int) -> Any:
    """A T5 with random weights."""
    sizes = {"d_model": width, "d_kv": width // 4, "d_ff": 4 * width, "num_layers": layers, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=vocabulary, dropout_rate=0.0, **sizes, **tokens))


def bart(vocabulary: int, width: int, layers: int) -> Any:
    """A BART with random weights."""
    sizes = {f"{half}_{name}": size for half in ("encoder", "decoder")
             for name, size in {"layers": layers, "attention_heads": 4, "ffn_dim": 4 * width}.items()}  # fmt: skip
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=vocabulary, d_model=width, max_position_embeddings=96, dropout=0.0, forced_bos_token_id=0,
        **sizes, **tokens,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


TOKENIZERS = {"t5": unigram, "bart": byte_pairs}
MODELS = {"t5": t5, "bart": bart}


def keep(out: Path, saved: dict[str, Any], tokenizer: Any, texts: dict[str, list[Row]]) -> None:
    """Save the models, each with the tokenizer, and the texts as JSON lines."""
    for name, model in saved.items():
        save_folder(model, out / name, tokenizer=tokenizer, overwrite=True)
    for name, rows in texts.items():
        (out / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="t5")
    parser.add_argument("--text", type=Path, help="its most frequent words are used (default: words made up)")
    parser.add_argument("--out", type=Path, help="folder for the models and the texts")
    parser.add_argument("--keep-targets", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=1500, help="of training the dense model")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--held-out", type=int, default=400, help="texts to compress with, and as many to score on")
    parser.add_argument("--epochs", type=float, default=10, help="of recovery")
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="sizes for a test")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.rows, options.held_out, options.epochs, options.width = 20, 200, 40, 1, 32
    return options


if __name__ == "__main__":
    main()
