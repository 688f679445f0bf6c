"""How fast a dense and a compressed encoder run in torch, ONNX Runtime and OpenVINO: processor time, interleaved.

    python examples/benchmark_runtimes.py                  # BERT-base size, a quarter of an hour on two cores
    python examples/benchmark_runtimes.py --num-layers 4   # as wide, fewer layers
    python examples/benchmark_runtimes.py --smoke          # a tiny model, seconds

Needs `pip install 'hf-lowrank[openvino]'`. Weights are random: speed depends on shapes alone. All take turns, with one
thread each; what counts is the median of the processor time of a call, in times of the dense model in torch. Every
file is written by `export`; of the dense model only the pooler is replaced, which no file holds.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.remote_code.configuration_lowrank import compressed_config_class
from hf_lowrank.remote_code.modeling_lowrank import compressed_model_class
from hf_lowrank.runtimes.export import export
from hf_lowrank.runtimes.model import load_exported
from hf_lowrank.sharing.saving import save_folder

SHAPES = ((8, 128), (1, 128), (1, 32))
RUNTIMES = (("onnx", "float32"), ("onnx", "int8"), ("openvino", "float32"), ("openvino", "int8"))
# Ranks are multiples of this, which is what groups of 4 bits take.
MULTIPLE = 32


def build(keep: float, num_layers: int, smoke: bool) -> Any:
    """An encoder whose matrices are two factors with that part of their numbers; 1 leaves all but a pooler dense."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128} if smoke else {}
    dense = BertModel(BertConfig(num_hidden_layers=num_layers, vocab_size=3000, **sizes))
    plan: dict[str, Any] = {"format_version": 1, "modules": {}, "provenance": {}}
    for matrix in find_matrices(dense):
        rows, columns = matrix.shape
        rank = max(round(keep * rows * columns / (rows + columns) / MULTIPLE), 1) * MULTIPLE
        if matrix.role == "block" and (keep < 1) != ("pooler" in matrix.name):
            plan["modules"][matrix.name] = {"structure": "low_rank", "rank": min(rank, rows, columns)}
    config = dense.config
    config.__class__ = compressed_config_class(type(config))
    config.compression = plan
    return compressed_model_class(BertModel)(config).eval()


def exported(models: dict[str, Any], folder: Path) -> dict[str, Callable[[Any], Any]]:
    """Every model in torch and in every runtime, by name."""
    runs: dict[str, Callable[[Any], Any]] = {}
    for name, model in models.items():
        path = save_folder(model, folder / name)
        runs[f"{name}, torch"] = lambda given, model=model: model(**given)
        for runtime, precision in RUNTIMES:
            found = export(path, runtime=runtime, precision=precision, force=True)
            megabytes = found.files[0].size_bytes / 1e6
            file = load_exported(found.files[0].path, num_threads=1)
            runs[f"{name}, {runtime} {precision}, {megabytes:.0f} MB"] = lambda given, file=file: file(**given)
    return runs


def processor_times(runs: dict[str, Callable[[Any], Any]], shape: tuple[int, int], rounds: int) -> dict[str, float]:
    """Median seconds of a processor, all taken in turn; the first two rounds are not counted."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 3000, shape, generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(rounds + 2):
            for name, run in runs.items():
                start = time.process_time()
                run(given)
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(spent[2:]) for name, spent in seconds.items()}


def main() -> None:
    """Print a table: a row a model and runtime, a column a shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--keep-targets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    layers, rounds = (1, 1) if given.smoke else (given.num_layers, given.rounds)
    models = {
        "dense" if keep == 1 else f"{keep:g}": build(keep, layers, given.smoke) for keep in (1, *given.keep_targets)
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = exported(models, Path(folder))
        table = {shape: processor_times(runs, shape, rounds) for shape in SHAPES}
    print("| times as fast as dense in torch |", " | ".join(f"{rows} x {tokens}" for rows, tokens in SHAPES), "|")
    print("|---|" + "---|" * len(SHAPES))
    for name in runs:
        ratios = [times["dense, torch"] / times[name] for times in table.values()]
        print(f"| {name} |", " | ".join(f"{ratio:.2f}" for ratio in ratios), "|")


if __name__ == "__main__":
    main()
