"""Compress a GPT-2 for a CPU: its size, how fast it reads and writes, its perplexity, and what it writes.

    python examples/gpt2_on_cpu.py --model my-gpt2 --text texts.jsonl --test wiki.test.raw --out small-gpt2
    python examples/gpt2_on_cpu.py --smoke        # a tiny model with random weights, seconds

Dense and compressed run in turns, so that whatever else the machine does slows both. "Reads" is one pass over a batch
of tokens; "writes" is one token at a time with a cache, where small matrices leave little to gain.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import beginning, detokenized
from recover_gpt2 import tiny, tiny_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lowrank import compress, make_report
from hf_lowrank.evaluation import make_task
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.progress import progress_bar
from hf_lowrank.records.wording import megabytes
from hf_lowrank.sharing.saving import save_folder

_ROUNDS = 5
_READ = (4, 128)
_WRITTEN = 48


def main() -> None:
    """Compress, save, load as anyone would, and compare."""
    options = parse()
    torch.manual_seed(0)
    if options.smoke:
        options.model, options.text, options.test = smoke_files(Path(tempfile.mkdtemp()))
    dense, tokenizer = load_dense(options.model, torch.float32), AutoTokenizer.from_pretrained(options.model)
    small = compress(
        dense, keep_targets=options.keep_targets, calibration=options.text, tokenizer=tokenizer, fast=options.fast,
        text_column=options.text_column, progress=progress_bar,
    )  # fmt: skip
    report = make_report(small)
    folder = save_folder(small, options.out or tempfile.mkdtemp(), options.model, overwrite=True)
    small = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()

    rows = [("parameters", f"{report.dense_parameters:,}", f"{report.parameters:,}")]
    rows.append(("weights", megabytes(report.dense_size_bytes), megabytes(report.size_bytes)))
    pair = {"dense": dense.eval(), "small": small}
    for name, work in (("reads, tokens/s", read), ("writes, tokens/s", write)):
        speed = tokens_per_second(pair, work)
        rows.append((name, f"{speed['dense']:.0f}", f"{speed['small']:.0f}"))
    if options.test:
        task = make_task("causal-lm")
        test = beginning(detokenized(Path(options.test)), tokenizer, options.test_blocks, task.block_length)
        found = task.compare(pair, task.steps(tokenizer, test, 8, dense))
        rows.append(("perplexity", *(f"{found[name]['perplexity']:.2f}" for name in pair)))
    print(f"{'':<18}{'dense':>14}{'compressed':>14}   ({torch.get_num_threads()} threads)")
    for name, before, after in rows:
        print(f"{name:<18}{before:>14}{after:>14}")
    for name, model in pair.items():
        print(f"{name} writes: {continued(model, tokenizer, options.prompt)!r}")


def tokens_per_second(pair: dict[str, Any], work: Any) -> dict[str, float]:
    """The median over rounds in which the models take turns; a first round is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in pair}
    for _ in range(_ROUNDS + 1):
        for name, model in pair.items():
            start = time.perf_counter()
            num_tokens = work(model)
            speeds[name].append(num_tokens / (time.perf_counter() - start))
    return {name: statistics.median(found[1:]) for name, found in speeds.items()}


@torch.no_grad()
def read(model: Any) -> int:
    """One pass over a batch."""
    rows, length = _READ[0], min(_READ[1], model.config.n_positions)
    model(input_ids=torch.ones(rows, length, dtype=torch.long))
    return rows * length


@torch.no_grad()
def write(model: Any) -> int:
    """Tokens one by one, all of them, whatever they are."""
    count = min(_WRITTEN, model.config.n_positions - 1)
    start = torch.ones(1, 1, dtype=torch.long)
    model.generate(
        input_ids=start, attention_mask=start, max_new_tokens=count, min_new_tokens=count, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return count


def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model makes of a prompt, without chance."""
    inputs = tokenizer(prompt, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=24, do_sample=False, repetition_penalty=1.3, pad_token_id=0)
    return str(tokenizer.decode(found[0]))


def smoke_files(folder: Path) -> tuple[str, str, str]:
    """A tiny model with its tokenizer, and two texts."""
    for part in tiny():
        part.save_pretrained(folder / "model")
    for name in ("text.txt", "test.txt"):
        (folder / name).write_text("\n".join(tiny_texts()))
    return str(folder / "model"), str(folder / "text.txt"), str(folder / "test.txt")


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="openai-community/gpt2", help="folder or Hub id of a GPT-2")
    parser.add_argument("--text", help="text to look at; default: synthetic tokens")
    parser.add_argument("--text-column", help="its column of text")
    parser.add_argument("--test", help="text to report perplexity on, in the form of WikiText")
    parser.add_argument("--test-blocks", type=int, default=200, help="of 128 tokens")
    parser.add_argument("--keep-targets", type=float, default=0.5, help="of the blocks' matrices")
    parser.add_argument("--fast", action="store_true", help="predicted ranks, no training")
    parser.add_argument("--prompt", default="The city was founded")
    parser.add_argument("--out", help="folder to write")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
