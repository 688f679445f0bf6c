"""How long compressing with text takes, and how much memory, on a model of BERT-base size with random weights.

    python examples/benchmark_compression_time.py            # 128 x 256 tokens; about twenty minutes on two cores
    python examples/benchmark_compression_time.py --smoke    # a tiny model, seconds

Time depends on shapes, not on what the weights are. Every line comes from a process of its own. Memory is the resident
size at its peak less that of the process with the dense model; it is held against a bound of three times the largest
second moment and what running one batch forwards and backwards takes without looking at anything.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel

from hf_lowrank import compress
from hf_lowrank.data.calibration import Text, make_calibration
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.statistics.collection import collect_statistics

TIERS = {"default": {}, "default without refinement": {"refine_passes": 0}, "fast": {"fast": True}}
ONE_BATCH = "one batch"
BATCH_SIZE = 8
BUDGET = {"keep_targets": 0.5, "batch_size": BATCH_SIZE}

Batches = list[dict[str, torch.Tensor]]


def resident(name: str) -> float:
    """MiB of this process, now (`VmRSS`) or at its peak (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def dense_model(smoke: bool) -> tuple[PreTrainedModel, Batches]:
    """A masked language model and random text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=500) if smoke else BertConfig()).eval()
    count, length = (32, 16) if smoke else (128, 256)
    draw = torch.randint(1000 if not smoke else 5, model.config.vocab_size, (count, length))
    return model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draw.split(BATCH_SIZE)]


def run_batch(model: PreTrainedModel, batches: Batches) -> None:
    """One batch forwards and backwards, with statistics of one matrix, the first."""
    calibration = make_calibration(model, batches, None, Text(batch_size=BATCH_SIZE))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "none.safetensors"
        kinds = frozenset({"output_moment"})
        collect_statistics(model, find_matrices(model)[:1], calibration.batches[:1], kinds, path=path, fingerprint="")


def run_tier(name: str, model: PreTrainedModel, batches: Batches) -> None:
    """Compress."""
    if TIERS[name].get("fast"):
        batches = batches[: max(2, len(batches) // 4)]  # batches that are made are taken as they are
    compress(model, calibration=batches, **BUDGET, **TIERS[name])


def measure(name: str, smoke: bool) -> dict[str, float]:
    """Seconds, MiB and what they are to be compared with, of one tier or one batch in this process."""
    model, batches = dense_model(smoke)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far (Linux)
    start, start_cpu = time.perf_counter(), time.process_time()
    if name == ONE_BATCH:
        run_batch(model, batches)
    else:
        run_tier(name, model, batches)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - start_cpu,
        "extra": resident("VmHWM") - before,
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
        "largest_moment": max(max(m.shape) for m in find_matrices(model) if m.role == "block") ** 2 * 8 / 2**20,
    }


def measure_apart(name: str, smoke: bool) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--inside", name, *(["--smoke"] if smoke else [])]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """Measure one batch and each tier."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--tiers", nargs="+", choices=list(TIERS), default=list(TIERS), metavar="TIER")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(measure(arguments.inside, arguments.smoke)))
        return
    batch = measure_apart(ONE_BATCH, arguments.smoke)
    bound = 3 * batch["largest_moment"] + batch["extra"]
    print(
        f"{torch.get_num_threads()} threads; weights {batch['weights']:.0f} MiB; bound on memory: 3 x "
        f"{batch['largest_moment']:.0f} MiB + one batch of {batch['extra']:.0f} MiB = {bound:.0f} MiB",
        flush=True,
    )
    for name in arguments.tiers:
        found = measure_apart(name, arguments.smoke)
        print(
            f"{name}: {found['seconds']:.0f} s ({found['cpu_seconds']:.0f} s of processor time), "
            f"{found['extra']:.0f} MiB, {found['extra'] / bound:.2f} of the bound",
            flush=True,
        )


if __name__ == "__main__":
    main()
