"""Teach what was cut: a sentence encoder made smaller, before and after `recover` on unlabeled text.

    python examples/teach_encoder.py --model sentence-transformers/all-MiniLM-L6-v2 --text TEXT --pairs STSB \
        --other STORIES --keep-targets 0.25 0.5 --sizes 9.3 7.2 5.0 --seeds 0 1 2
    python examples/teach_encoder.py --smoke        # a tiny model with random weights, seconds

`TEXT` is any plain text or JSON lines; nothing else is trained on. `--pairs` is a folder with `dev.tsv` and `test.tsv`
of sentence pairs and gold scores, `--other` text of another kind, in the sentences of which neighbours are looked for.
Printed are Spearman's rank correlations on both sets with the interval of 95 of 100 draws of pairs, the mean cosine to
the dense model's vectors and the share of the ten nearest neighbours that stay; of several seeds the means.
"""

import argparse
import csv
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from scipy.stats import spearmanr
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from hf_lowrank import compress, recover
from hf_lowrank.data.rows import load_rows, load_texts
from hf_lowrank.hosts.outputs import run
from hf_lowrank.sharing.saving import load_compressed
from hf_lowrank.training.features import make_features

_DRAWS = 1000
_NEIGHBOURS, _OTHERS = 10, 5000
_BATCH = 32


@dataclass(frozen=True)
class Exam:
    """What an encoder is asked: pairs with gold scores by name, and sentences to find neighbours among."""

    tokenizer: Any
    pairs: dict[str, tuple[list[str], torch.Tensor]]
    others: list[str]

    def vectors(self, model: PreTrainedModel, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors of texts, pooled as the model's folder says, (N, D)."""
        ids = self.tokenizer(list(texts), truncation=True, max_length=128)["input_ids"]
        order, found = sorted(range(len(ids)), key=lambda index: len(ids[index])), {}
        for start in range(0, len(order), _BATCH):
            some = order[start : start + _BATCH]
            batch = self.tokenizer.pad({"input_ids": [ids[index] for index in some]}, return_tensors="pt")
            with torch.inference_mode():
                said = run(model.eval(), {name: value.to(model.device) for name, value in batch.items()})
            found |= dict(zip(some, said.rows.double().cpu(), strict=True))
        return torch.stack([found[index] for index in range(len(ids))])

    def answers(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """The vectors of all pairs, set after set, and of the others."""
        return [self.vectors(model, texts) for texts, _ in self.pairs.values()] + [self.vectors(model, self.others)]

    def marks(self, found: Sequence[torch.Tensor], dense: Sequence[torch.Tensor]) -> list[float]:
        """Score and interval of each set of pairs, then cosine and share of neighbours, of a model's answers."""
        marks = []
        for vectors, (_, gold) in zip(found, self.pairs.values(), strict=False):
            first, second = vectors.chunk(2)
            marks += _spearman((first * second).sum(1), gold)
        cosine = (torch.cat([*found[:-1]]) * torch.cat([*dense[:-1]])).sum(1).mean()
        near = [_neighbours(answers[-1]) for answers in (found, dense)]
        return [*marks, float(cosine), float((near[0] & near[1]).sum() / near[1].sum())]


def _spearman(said: torch.Tensor, gold: torch.Tensor) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(gold), (len(gold),), generator=generator) for _ in range(_DRAWS))
    drawn = torch.tensor([spearmanr(said[draw], gold[draw]).statistic for draw in draws])
    ends = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return [100 * one for one in (float(spearmanr(said, gold).statistic), *ends)]


def _neighbours(vectors: torch.Tensor) -> torch.Tensor:
    """Whether each of the sentences is among the nearest of another, (N, N)."""
    near = (vectors @ vectors.T).fill_diagonal_(-2)
    chosen = near.topk(min(_NEIGHBOURS, len(near) - 1)).indices
    return torch.zeros_like(near, dtype=torch.bool).scatter(1, chosen, True)


def main() -> None:
    """One row for each model before and after."""
    options = parse()
    model, tokenizer, texts, exam = smoke() if options.smoke else given(options)
    model = model.to(options.device)
    columns = [f"{name} (95 %)" for name in exam.pairs]
    print("| | " + " | ".join([*columns, "cosine", f"top {_NEIGHBOURS}", "steps", "minutes"]) + " |")
    print("|---" * (len(columns) + 5) + "|")
    dense = exam.answers(model)
    show("dense", [exam.marks(dense, dense)], 0, 0.0)
    makers: dict[str, dict[str, Any]] = {f"{keep:g} kept": {"keep_targets": keep} for keep in options.keep_targets}
    makers |= {f"{size:g} MB": {"target_size": f"{size}MB"} for size in options.sizes}
    with TemporaryDirectory() as folder:
        for name, budget in makers.items():
            about = {"calibration": texts[: options.calibration], "tokenizer": tokenizer, "fast": options.fast}
            small = compress(model, **budget, **about)
            small.save_pretrained(folder)
            show(name, [exam.marks(exam.answers(small), dense)], 0, 0.0)
            clock, marks = time.perf_counter(), []
            for seed in options.seeds:
                healed = taught(load_compressed(folder), model, tokenizer, texts, options, seed)
                marks.append(exam.marks(exam.answers(healed), dense))
            show(f"{name}, taught", marks, options.steps, (time.perf_counter() - clock) / 60 / len(options.seeds))


def taught(
    small: PreTrainedModel, dense: PreTrainedModel, tokenizer: Any, texts: Any, options: argparse.Namespace, seed: int
) -> PreTrainedModel:
    """The model after that many steps."""
    examples = options.steps * options.batch_size
    held_out = min(512, examples // 9)
    more = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
    recover(
        small.to(options.device), teacher=dense, dataset=texts, tokenizer=tokenizer, epochs=1,
        max_examples=examples + held_out, batch_size=options.batch_size, seed=seed, **more,
    )  # fmt: skip
    print(f"<!-- {small.config.compression['provenance']['recovery']} -->", flush=True)
    return small


def show(name: str, marks: Sequence[Sequence[float]], steps: int, minutes: float) -> None:
    """A row of the means of all seeds."""
    mean = torch.tensor(marks, dtype=torch.float64).mean(0).tolist()
    scores = [f"{mean[i]:.2f} ({mean[i + 1]:.2f} to {mean[i + 2]:.2f})" for i in range(0, len(mean) - 2, 3)]
    cells = [name, *scores, *(f"{one:.3f}" for one in mean[-2:]), str(steps), f"{minutes:.1f}"]
    print("| " + " | ".join(cells) + " |", flush=True)


def given(options: argparse.Namespace) -> tuple[PreTrainedModel, Any, list[str], Exam]:
    """What the options name."""
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts, pairs = load_texts(options.text, "text"), {}
    random.Random(0).shuffle(texts)
    for name in ("dev", "test"):
        with (options.pairs / f"{name}.tsv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        gold = torch.tensor([float(row["score"]) for row in rows], dtype=torch.float64)
        pairs[f"STS-B {name}"] = ([row[key] for key in ("sentence1", "sentence2") for row in rows], gold)
    return model, tokenizer, texts, Exam(tokenizer, pairs, _sentences(model, tokenizer, options.other))


def _sentences(model: PreTrainedModel, tokenizer: Any, source: str) -> list[str]:
    rows = make_features(model, tokenizer, load_rows(source), max_examples=_OTHERS)
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


def smoke() -> tuple[PreTrainedModel, Any, list[str], Exam]:
    """A model of random weights that reads letters."""
    letters = "abcdefghijklmnop"
    core = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(f".{letters}")}, "."))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=".", unk_token=".")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    draw = random.Random(0)
    texts = [" ".join(draw.choices(letters, k=draw.randint(4, 12))) for _ in range(120)]
    pairs = {f"pairs {name}": (texts[:40], torch.rand(20, dtype=torch.float64)) for name in ("dev", "test")}
    model = BertModel(BertConfig(vocab_size=17, **sizes)).eval()  # type: ignore[arg-type]
    return model, tokenizer, texts, Exam(tokenizer, pairs, texts[:30])


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--text", help="text to look at and to train on")
    parser.add_argument("--pairs", type=Path, help="folder with dev.tsv and test.tsv")
    parser.add_argument("--other", help="text of another kind")
    parser.add_argument("--keep-targets", type=float, nargs="*", default=[0.25, 0.5])
    parser.add_argument("--sizes", type=float, nargs="*", default=[], help="megabytes, met by bits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2000, help="of teaching; 20 minutes of two cores")
    parser.add_argument("--batch-size", type=int, default=_BATCH)
    parser.add_argument("--learning-rate", type=float, help="default: what suits the model")
    parser.add_argument("--calibration", type=int, default=400, help="texts to look at when it is made smaller")
    parser.add_argument("--fast", action="store_true", help="without the bettering that compressing does by itself")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    options = parser.parse_args()
    if options.smoke:
        options.steps, options.keep_targets, options.fast = 4, [0.5], True
    return options


if __name__ == "__main__":
    main()
