"""How long compressing with text takes, and how much memory, on a model of BERT-base size with random weights.

    python examples/benchmark_compression_time.py            # 128 x 256 tokens; about twenty minutes on two cores
    python examples/benchmark_compression_time.py --smoke    # a tiny model, seconds

Time depends on shapes, not on what the weights are. The default and the fast tier run in processes of their own; peak
memory is the resident size of the process.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM

from hf_lowrank import compress

TIERS = {"default": {}, "default without refinement": {"refine_passes": 0}, "fast": {"fast": True}}


def resident(name: str) -> float:
    """MiB of this process, now (`VmRSS`) or at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def run_tier(name: str, smoke: bool) -> None:
    """Compress once and print seconds and MiB."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=500) if smoke else BertConfig()).eval()
    count, length = (32, 16) if smoke else (128, 256)
    draw = torch.randint(1000 if not smoke else 5, model.config.vocab_size, (count, length))
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draw.split(8)]
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    options = dict(TIERS[name])
    if options.get("fast"):
        batches = batches[: max(2, len(batches) // 4)]  # batches that are made are taken as they are
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far (Linux)
    start = time.perf_counter()
    compress(model, keep_targets=0.5, calibration=batches, batch_size=8, **options)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM")
    print(
        f"{name}: {seconds:.0f} s, peak {peak:.0f} MiB ({peak - before:.0f} MiB more than the process with the dense "
        f"model, whose weights are {weights:.0f} MiB)",
        flush=True,
    )


def main() -> None:
    """Run each tier in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tiers", nargs="+", choices=list(TIERS), default=list(TIERS), metavar="TIER")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        run_tier(arguments.inside, arguments.smoke)
        return
    print(f"{torch.get_num_threads()} threads, 128 x 256 tokens", flush=True)
    for name in arguments.tiers:
        command = [sys.executable, str(Path(__file__)), "--inside", name]
        subprocess.run([*command, "--smoke"] if arguments.smoke else command, check=True)


if __name__ == "__main__":
    main()
