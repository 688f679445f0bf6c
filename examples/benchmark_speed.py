"""How fast compression and compressed models are, on this machine: ratios of interleaved runs, medians.

    python examples/benchmark_speed.py            # BERT-base size, a few minutes on two cores
    python examples/benchmark_speed.py --smoke    # a tiny model, seconds

Weights are random: speed depends on shapes alone. Prints a table for the budgets, one for the storages of one layer,
the time of decomposing against a plain loop of `torch.linalg.svd`, and the peak memory of compressing in place.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel

from hf_lowrank import compress, make_report
from hf_lowrank.hosts.matrices import dense_weight
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.remote_code.lowrank_linear import LowRankLinear
from hf_lowrank.remote_code.lowrank_pivoted import PivotedLinear

PLAIN = {"method": "svd", "allocation": "uniform"}


def build_model(smoke: bool) -> BertModel:
    """BERT-base, or something tiny, with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(**sizes, vocab_size=500) if smoke else BertConfig()
    return BertModel(config).eval()


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, taken in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def encoder_runs(models: dict[str, BertModel], batch: int, length: int) -> dict[str, Callable[[], object]]:
    """One forward pass through the blocks of each model, on the same hidden states."""
    hidden = torch.randn(batch, length, next(iter(models.values())).config.hidden_size)

    def runner(model: BertModel) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode():
                return model.encoder(hidden)

        return run

    return {name: runner(model) for name, model in models.items()}


class Nothing(nn.Module):
    """Costs nothing: stands where a replaced layer stood, to time all the rest."""

    def __init__(self, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.output = torch.empty(0)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], self.out_features)
        if self.output.shape != shape:
            self.output = torch.zeros(shape)
        return self.output


def without_replaced_layers(dense: BertModel) -> BertModel:
    """The encoder's other work: attention, activations, norms."""
    rest = copy.deepcopy(dense)
    for matrix in find_matrices(rest):
        if matrix.role == "block":
            rest.set_submodule(matrix.path, Nothing(matrix.shape[0]))
    return rest


def benchmark_encoder(dense: BertModel, rounds: int, batch: int, length: int) -> None:
    """Speed-up of the encoder, and of the replaced layers in it, beside the ratio of multiply-adds."""
    print(f"\nencoder, batch {batch} x {length} tokens, {torch.get_num_threads()} threads")
    print("storage    keep_targets  multiply-adds  encoder  replaced layers  share of the ratio  replaced")
    rest = without_replaced_layers(dense)
    for storage in ("low_rank", "pivoted"):
        for keep in (0.95, 0.9, 0.8, 0.6, 0.4, 0.25):
            small = compress(dense, keep_targets=keep, storage=storage, **PLAIN)
            report = make_report(small)
            ratio = sum(m.dense_multiply_adds for m in report.modules) / sum(m.multiply_adds for m in report.modules)
            seconds = interleaved(encoder_runs({"dense": dense, "small": small, "rest": rest}, batch, length), rounds)
            layers = (seconds["dense"] - seconds["rest"]) / (seconds["small"] - seconds["rest"])
            replaced = sum(m.structure != "dense" for m in report.modules)
            print(
                f"{storage:10} {keep:12} {ratio:13.2f}x {seconds['dense'] / seconds['small']:7.2f}x {layers:15.2f}x"
                f" {layers / ratio:18.0%}  {replaced}/{len(report.modules)}"
            )


def benchmark_layers(rounds: int, smoke: bool) -> None:
    """One layer in both storages at the same size."""
    print("\none layer at 8 x 128 tokens, seconds relative to dense")
    print("shape         keep   two factors   pivoted")
    shapes = [(64, 64)] if smoke else [(384, 384), (768, 768), (768, 3072), (3072, 768)]
    for inputs, outputs in shapes:
        for keep in (0.8, 0.6, 0.4):
            states = torch.randn(8, 128, inputs)
            total = inputs + outputs
            pair_rank = int(keep * inputs * outputs / total)
            pivot_rank = int((total - (total**2 - 4 * keep * inputs * outputs) ** 0.5) / 2)
            layers = {
                "dense": nn.Linear(inputs, outputs),
                "pair": LowRankLinear(inputs, outputs, pair_rank),
                "pivoted": PivotedLinear(inputs, outputs, pivot_rank, moved=8),  # what real matrices need
            }
            with torch.inference_mode():
                runs = {name: partial(layer, states) for name, layer in layers.items()}
                seconds = interleaved(runs, rounds * 3)
            print(
                f"{inputs:5} -> {outputs:<5} {keep:5} {seconds['pair'] / seconds['dense']:12.2f} "
                f"{seconds['pivoted'] / seconds['dense']:10.2f}"
            )


def benchmark_decomposition(dense: BertModel, rounds: int) -> None:
    """`compress` at a uniform budget against a plain loop of SVDs, and its distance from the optimum."""
    blocks = [matrix for matrix in find_matrices(dense) if matrix.role == "block"]

    def plain_loop() -> None:
        for matrix in blocks:
            left, values, right = torch.linalg.svd(dense_weight(matrix.module), full_matrices=False)
            rank = matrix.num_weights // (2 * sum(matrix.shape))
            _ = left[:, :rank] * values[:rank], right[:rank]

    ours = {"compress": lambda: compress(dense, keep_targets=0.5, **PLAIN), "svd loop": plain_loop}
    seconds = interleaved(ours, rounds)
    small = compress(dense, keep_targets=0.5, **PLAIN)
    shapes = {matrix.name: matrix for matrix in blocks}
    excess = 0.0
    for row in make_report(small).modules:
        if row.rank is not None and row.relative_error is not None:
            values = torch.linalg.svdvals(dense_weight(shapes[row.name].module).double())
            best = float(values[row.rank :].square().sum().sqrt() / values.square().sum().sqrt())
            excess = max(excess, row.relative_error - best)
    print(f"\ndecomposing {len(blocks)} matrices at keep_targets=0.5: {seconds['compress']:.1f} s,")
    print(
        f"a plain loop of torch.linalg.svd {seconds['svd loop']:.1f} s: "
        f"{seconds['svd loop'] / seconds['compress']:.1f} x"
    )
    print(f"largest relative error above the optimum: {excess:.1e}")


_MEMORY = """
import sys, torch
sys.path.insert(0, {folder!r})
from pathlib import Path
from benchmark_speed import PLAIN, build_model
from hf_lowrank import compress

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))

model = build_model({smoke})
compress(build_model(True), keep_params=0.5, inplace=True, **PLAIN)  # loads what any first call loads
largest = max(p.numel() * p.element_size() for p in model.parameters()) / 2**20
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
compress(model, keep_params=0.5, inplace=True, **PLAIN)
print(before, status("VmHWM"), largest)
"""


def benchmark_memory(smoke: bool) -> None:
    """Peak memory of compressing in place, in a process of its own (Linux)."""
    code = _MEMORY.format(folder=str(Path(__file__).parent), smoke=smoke)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after, largest = map(float, found.split())
    print(f"\ncompress(..., inplace=True): {before:.0f} MiB with the dense model before, peak {after:.0f} MiB;")
    print(f"{after - before:.0f} MiB on top, the bound is 2 x {largest:.0f} MiB (largest matrix) + 300 MiB")


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rounds = 1 if arguments.smoke else arguments.rounds
    dense = build_model(arguments.smoke)
    benchmark_encoder(dense, rounds, *((2, 16) if arguments.smoke else (8, 128)))
    benchmark_layers(rounds, arguments.smoke)
    benchmark_decomposition(copy.deepcopy(dense), max(1, rounds // 4))
    benchmark_memory(arguments.smoke)


if __name__ == "__main__":
    main()
