"""Compress Llama-shaped checkpoints of random weights block by block, and print the peak memory and time of each.

    python examples/benchmark_streaming.py --work build --text DATA --tokenizer FOLDER --layers 4 8 16 --width 1024
    python examples/benchmark_streaming.py --work build --text DATA --tokenizer FOLDER --layers 54 --limit 6e9
    python examples/benchmark_streaming.py --smoke    # a tiny one, on synthetic tokens

The checkpoints, in bfloat16, are written a layer at a time. Each is compressed by a process of its own; with `--limit`
this may have so many bytes of data and no more (RLIMIT_DATA). Memory is what the system says of it afterwards.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

VOCABULARY = 32_000
HEAD = 64
_LIMIT = "resource.setrlimit(resource.RLIMIT_DATA, ({0}, {0})); "


def make_checkpoint(folder: Path, layers: int, width: int, tokenizer: str | None) -> int:
    """Write a checkpoint, a shard for each layer; how many parameters it has."""
    config = LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers, vocab_size=VOCABULARY,
        num_attention_heads=width // HEAD, num_key_value_heads=max(width // HEAD // 4, 1), dtype=torch.bfloat16,
        max_position_embeddings=2048, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    if tokenizer is not None:
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    weight_map = {name: f"{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors" for name in shapes}
    generator = torch.Generator().manual_seed(0)
    for file in dict.fromkeys(weight_map.values()):
        state = {name: _drawn(shapes[name], generator) for name, one in weight_map.items() if one == file}
        save_file(state, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return sum(shape.numel() for shape in shapes.values())


def _drawn(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Weights whose singular values fall as those of trained ones do, more or less; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    scales = torch.arange(1, shape[1] + 1) ** -0.4
    drawn = torch.randn(shape, generator=generator) * scales[torch.randperm(shape[1], generator=generator)]
    return (drawn / drawn.norm() * (0.02**2 * shape.numel()) ** 0.5).bfloat16()


def compress(source: Path, out: Path, options: list[str], limit: int | None) -> tuple[float, float]:
    """Seconds and peak megabytes of compressing a folder in a process of its own."""
    program = f"import resource, sys; from hf_lowrank.cli import main; {_LIMIT.format(limit) if limit else ''}"
    program += (
        "status = main(sys.argv[1:]); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "compress", str(source), str(out), *options]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.monotonic() - began, int(done.stdout.split()[-1]) / 1000


def main() -> None:
    """Make, compress and print one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build"))
    parser.add_argument("--text", help="calibration; without it synthetic tokens are used")
    parser.add_argument("--tokenizer", help="folder to take one from")
    parser.add_argument("--layers", type=int, nargs="+", default=[1])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--memory", default="1MB", help="a large one compresses in memory")
    parser.add_argument("--options", default="--keep-params 0.6", help="of compress")
    parser.add_argument("--smoke", action="store_true", help="a tiny one")
    arguments = parser.parse_args()
    options = ["--memory", arguments.memory, "--no-latency", *arguments.options.split()]
    options += ["--calibration", arguments.text] if arguments.text else []
    limit = None if arguments.limit is None else int(arguments.limit)
    for layers in arguments.layers:
        source, out = arguments.work / "dense", arguments.work / "small"
        for folder in (source, out):
            shutil.rmtree(folder, ignore_errors=True)
        size = make_checkpoint(source, layers, HEAD if arguments.smoke else arguments.width, arguments.tokenizer)
        seconds, megabytes = compress(source, out, options, limit)
        print(f"{layers} layers, {size / 1e9:.2f} B: {seconds:.0f} s, {megabytes:.0f} MB at most", flush=True)
        shutil.rmtree(source)


if __name__ == "__main__":
    main()
