"""Tensor methods on this machine: how long they take, how exact they are, how fast the models run.

    python examples/benchmark_tensor.py            # BERT-base size, about a quarter of an hour on one core
    python examples/benchmark_tensor.py --smoke    # a tiny model, seconds

Weights are random: time depends on shapes alone. Three tables: the encoder's speed-up beside the ratio of
multiply-adds, for whole batches and for one sentence at a time, as it is and compiled; the time of decomposing; and
ours beside tensorly.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import tensorly
import torch
from benchmark_speed import encoder_runs, interleaved
from tensorly.decomposition import tensor_train_matrix
from tensorly.decomposition import tucker as tensorly_tucker
from transformers import BertConfig, BertModel

from hf_lowrank import compress, make_report
from hf_lowrank.methods.trains.tensor_train import tensor_train
from hf_lowrank.methods.tucker.tucker import TuckerRanks, relative_error, tucker
from hf_lowrank.progress import progress_bar
from hf_lowrank.remote_code.lowrank_tensor_train import factor_shape

PRESETS = ("tucker-III-64", "tucker-IV-36-128", "tucker-IV-72-384")
SHAPES = ((32, 128), (1, 128), (1, 32), (1, 16), (1, 8))
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}


def build_model(smoke: bool) -> BertModel:
    """BERT-base, or something tiny, with random weights."""
    torch.manual_seed(0)
    return BertModel(BertConfig(**TINY, vocab_size=500) if smoke else BertConfig()).eval()


def timed(run: Callable[[], object]) -> tuple[float, object]:
    """Seconds, and what came of it."""
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def peak_gigabytes() -> float:
    """The most memory this process has held so far (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM"))


def compressed(dense: BertModel, methods: dict[str, dict[str, object]]) -> dict[str, BertModel]:
    """The dense model and each compressed one, with the time each took."""
    print(f"decomposing {sum(p.numel() for p in dense.encoder.parameters()):,} parameters of the encoder")
    models = {"dense": dense}
    for name, options in methods.items():
        seconds, models[name] = timed(lambda options=options: compress(dense, progress=progress_bar, **options))
        print(f"{name:22} {seconds:7.1f} s, at most {peak_gigabytes():.2f} GB held", flush=True)
    return models


def attention_multiply_adds(model: BertModel, length: int) -> int:
    """What a token costs in all blocks' attention: its scores with `length` keys, and the mix of as many values."""
    return 2 * model.config.num_hidden_layers * length * model.config.hidden_size


def benchmark_encoder(models: dict[str, BertModel], rounds: int, batch: int, length: int, how: str = "") -> None:
    """Speed-up of the encoder beside the ratio of multiply-adds: of the replaced matrices, and with attention."""
    seconds = interleaved(encoder_runs(models, batch, length), rounds if batch > 1 else 10 * rounds)  # milliseconds
    shape = f"batch {batch} x {length} tokens, {torch.get_num_threads()} threads"
    print(f"\nencoder{how}, {shape}: dense {seconds['dense'] * 1e3:.0f} ms")
    print("model                  multiply-adds  with attention  throughput  share of the ratio  with attention")
    for name, model in models.items():
        if name == "dense":
            continue
        rows, rest = make_report(model).modules, attention_multiply_adds(model, length)
        before, after = sum(row.dense_multiply_adds for row in rows), sum(row.multiply_adds for row in rows)
        ratio, whole, gain = before / after, (before + rest) / (after + rest), seconds["dense"] / seconds[name]
        shares = f"{gain / ratio:19.0%} {gain / whole:15.0%}"
        print(f"{name:22} {ratio:12.2f}x {whole:14.2f}x {gain:10.2f}x {shares}", flush=True)


def benchmark_compiled(models: dict[str, BertModel], rounds: int, shapes: Sequence[tuple[int, int]], how: str) -> None:
    """The same, each model compiled for each shape, by the backend `how`."""
    for batch, length in shapes:
        torch.compiler.reset()  # it stops compiling what it has compiled eight times: four models at two shapes
        for model in models.values():
            model.encoder.compile(backend=how, dynamic=False)
        benchmark_encoder(models, rounds, batch, length, ", compiled")


def compare_with_tensorly(num_blocks: int, width: int, ranks: TuckerRanks) -> None:
    """Time and relative error of both, on blocks with a falling spectrum, in float32."""
    tensorly.set_backend("pytorch")
    torch.manual_seed(0)
    decay = torch.arange(1, width + 1) ** -0.5
    stack = torch.randn(num_blocks, width, width) * decay * decay[:, None]
    print(f"\nTucker of {num_blocks} x {width} x {width} to {ranks}")
    seconds, ours = timed(lambda: tucker(stack, ranks))
    print(f"hf_lowrank  {seconds:7.2f} s, relative error {relative_error(stack, ours):.6f}")
    sizes = [ranks.bank, ranks.left, ranks.right]
    for start in ("svd", "random"):
        options = {"init": start, "tol": 1e-5, "n_iter_max": 50, "random_state": 0}
        seconds, (core, factors) = timed(lambda options=options: tensorly_tucker(stack, rank=sizes, **options))
        found = tensorly.tucker_to_tensor((core, factors))
        print(f"tensorly, {start} start  {seconds:7.2f} s, relative error {(found - stack).norm() / stack.norm():.6f}")
    weight = stack[0].double()
    sizes, rank = factor_shape(width), 4
    seconds, train = timed(lambda: tensor_train(weight, (rank, rank)))
    print(f"tensor train of {width} x {width} to rank {rank}")
    print(f"hf_lowrank  {seconds:7.4f} s, relative error {(train.matrix() - weight).norm() / weight.norm():.9f}")
    tensor = weight.reshape(*sizes, *sizes)
    seconds, found = timed(lambda: tensor_train_matrix(tensor, rank=[1, rank, rank, 1]))
    error = (found.to_matrix() - weight).norm() / weight.norm()
    print(f"tensorly    {seconds:7.4f} s, relative error {error:.9f}")


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, for a test")
    parser.add_argument("--methods", nargs="+", choices=PRESETS, default=list(PRESETS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.smoke:
        methods = {"III": {"method": "tucker", "ranks": (8, 8)}, "IV": {"method": "tucker", "ranks": (6, 8, 8)}}
        models = compressed(build_model(smoke=True), methods)
        benchmark_encoder(models, 1, 2, 16)
        benchmark_compiled(models, 1, [(1, 8), (1, 12)], "eager")
        compare_with_tensorly(6, 24, TuckerRanks(8, 8, 3))
        return
    models = compressed(build_model(smoke=False), {name: {"method": name} for name in arguments.methods})
    for batch, length in SHAPES:
        benchmark_encoder(models, arguments.rounds, batch, length)
    benchmark_compiled(models, arguments.rounds, SHAPES, "inductor")
    compare_with_tensorly(36, 256, TuckerRanks(96, 96, 18))


if __name__ == "__main__":
    main()
