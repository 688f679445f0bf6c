r"""On an accelerator: do models come out as on the CPU, how long does it take, and what is faster afterwards.

    python examples/benchmark_device.py --model MODELS/gpt2-mini --text DATA/lm-corpus/train.jsonl \
        --test DATA/wikitext-2-raw/wiki.test.raw
    python examples/benchmark_device.py --smoke    # tiny models on the CPU, seconds

Prints a small real model compressed on the CPU and on the device; then for Llamas with random weights (speed
depends on shapes alone) time and peak memory of compressing them there, and the speed of dense and half-kept models
on a prompt and on single tokens, as they are and captured in a graph.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_lowrank import compress, evaluate

PLAIN = {"method": "svd", "allocation": "uniform"}
TEXTS = [f"the river number {number} runs past the mill and the old house" for number in range(64)]


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def watched(device: torch.device) -> Iterator[dict[str, float]]:
    """Seconds of what is done within, and the peak of the device's memory in GB."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield found
    wait(device)
    found["seconds"] = time.perf_counter() - start
    found["gigabytes"] = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else float("nan")


def interleaved(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn; the first two rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            with torch.inference_mode():
                run()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[2:]) for name, values in seconds.items()}


def small_model(arguments: argparse.Namespace) -> Callable[[], Any]:
    """How to get the real model, or a tiny one."""
    if arguments.smoke:
        config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=64)
        torch.manual_seed(0)
        state = GPT2LMHeadModel(config).state_dict()

        def build() -> Any:
            model = GPT2LMHeadModel(config).eval()
            model.load_state_dict(state)
            return model

        return build
    return lambda: AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()


def same_as_on_the_cpu(arguments: argparse.Namespace, device: torch.device) -> None:
    """The default with text, made on either; what differs is rounding, and what rounding decides."""
    load = small_model(arguments)
    how = {"method": "svd"} if arguments.smoke else {"calibration": str(arguments.text)}
    print("\nmade on     seconds   perplexity of the test text, measured on the device")
    for name, place in (("cpu", torch.device("cpu")), (str(device), device)):
        dense = load().to(place)
        with watched(place) as found:
            small = compress(dense, keep_targets=0.6, **how)
        line = f"{name:10} {found['seconds']:8.1f}"
        if not arguments.smoke:
            tokenizer = AutoTokenizer.from_pretrained(arguments.model)
            options = {"max_examples": 200, "tokenizer": tokenizer, "cost": False}
            scored = evaluate(small.to(device), str(arguments.test), "causal-lm", **options)
            line += f"   {scored.model.scores['perplexity']:.2f}"
        print(line)


# Llama of 1.1 billion parameters, and the first four blocks of one of 8 billion.
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"1.1B": (2048, 5632, 22, 32, 4), "8B, 4 blocks": (4096, 14336, 4, 32, 8)}
SMOKE_SHAPES = {"tiny": (32, 64, 2, 4, 4)}


def llama(sizes: Sequence[int], vocab_size: int, device: torch.device) -> Any:
    """A Llama of that shape, weights random, bfloat16."""
    config = LlamaConfig(**dict(zip(SIZES, sizes, strict=True)), vocab_size=vocab_size)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def captured(model: Any, tokens: torch.Tensor) -> Callable[[], object]:
    """The same forward pass as one graph of kernels, whose launches cost nothing: what serving engines do."""
    with torch.inference_mode():
        for _ in range(3):
            model(tokens, use_cache=False)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(tokens, use_cache=False)
    return graph.replay


def speed(models: dict[str, Any], device: torch.device, shapes: Sequence[tuple[int, int]], rounds: int) -> None:
    """One forward pass as it is, and captured in a graph, beside the dense model in the same rounds."""
    print(f"{'':12} {'tokens':>11} {'ms':>9} {'times dense':>12}   captured: {'ms':>9} {'times dense':>12}")
    for batch, length in shapes:
        tokens = torch.randint(0, models["dense"].config.vocab_size, (batch, length), device=device)
        runs = {name: partial(model, tokens, use_cache=False) for name, model in models.items()}
        plain = interleaved(runs, device, rounds)
        graphs = {name: captured(model, tokens) for name, model in models.items()} if device.type == "cuda" else runs
        bare = interleaved(graphs, device, rounds)
        for name in models:
            print(
                f"{name:12} {batch:4} x {length:4} {plain[name] * 1e3:9.2f} {plain['dense'] / plain[name]:11.2f}x"
                f"   {'':9} {bare[name] * 1e3:9.2f} {bare['dense'] / bare[name]:11.2f}x"
            )


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if not arguments.smoke and None in (arguments.model, arguments.text, arguments.test):
        parser.error("--model, --text and --test are needed")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bfloat16 for the large model, seed 0")
    same_as_on_the_cpu(arguments, device)

    for name, sizes in (SMOKE_SHAPES if arguments.smoke else SHAPES).items():
        dense = llama(sizes, 200 if arguments.smoke else 32000, device)
        models = {"dense": dense}
        weights = sum(parameter.numel() for parameter in dense.parameters())
        print(f"\nLlama {name}: {weights / 1e9:.2f} billion parameters, {4 * weights / 1e9:.1f} GB in float32")
        for storage in ("low_rank", "pivoted"):
            with watched(device) as found:
                models[storage] = compress(dense, keep_targets=0.5, storage=storage, **PLAIN)
            print(f"svd, {storage}: {found['seconds']:.1f} s, {found['gigabytes']:.1f} GB at peak")
        lengths = ((1, 8),) if arguments.smoke else ((1, 2048), (8, 512), (32, 1), (1, 1))
        speed(models, device, lengths, rounds=3 if arguments.smoke else 15)


if __name__ == "__main__":
    main()
