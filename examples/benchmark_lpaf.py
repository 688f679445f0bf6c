r"""What pruning, row weights, mixed ranks and consistency each add: accuracy of a classifier, mean and spread.

    python examples/benchmark_lpaf.py --model my-bert-on-sst2 --train SST-2/train.tsv --test SST-2/dev.tsv \
        --work-dir build/lpaf
    python examples/benchmark_lpaf.py --smoke        # a tiny model with random weights, seconds

The first table prunes to the budgets, the second as `lpaf` does. Every row of the second has the same teacher, the
dense model, and the same loss, and makes as many steps in all: the rows without pruning train the dense model as long
as the others prune it, and rows that prune alike start from the same pruned model. The third table is of `recover`,
from what each method makes of the dense model or of a pruned one. Nothing is chosen on the test data. Finished cells
and pruned models are kept in the work directory. In 16 bits, under `accelerate launch --mixed_precision bf16`.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from glue_lpaf import tiny
from transformers import AutoTokenizer

from hf_lowrank import FirstOrderPruningCallback, compress, evaluate, lpaf, recover
from hf_lowrank.cli.training_arguments import name_and_weight
from hf_lowrank.loading import load_dense
from hf_lowrank.training.distillation import default_losses
from hf_lowrank.training.features import hold_out, make_features
from hf_lowrank.training.lpaf import Lesson, LPAFOptions, default_prune_keep, train
from hf_lowrank.training.pruning import IMPORTANCES

# row -> what prunes (None: trained as long, nothing pruned), and options of `lpaf`, without mixed ranks unless given
ROWS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "SVD + fine-tuning": (None, {"method": "svd"}),
    "FWSVD + fine-tuning": (None, {"method": "weighted_svd"}),
    "two-sided SVD + fine-tuning": (None, {"method": "two_sided_svd"}),
    "magnitude-pruned, SVD": ("magnitude", {"method": "svd"}),
    "first-order pruned, SVD": ("sensitivity", {"method": "svd"}),
    "... mixed ranks": ("sensitivity", {"method": "svd", "probability": 0.5}),
    "... mixed ranks, consistency": ("sensitivity", {"method": "svd", "probability": 0.5, "consistency": 1.0}),
    "... rows by survivors": ("sensitivity", {"method": "sparsity_aware_svd"}),
    "... rows by importance": ("sensitivity", {"method": "importance_aware_svd"}),
    "... by importance, mixed ranks": ("sensitivity", {"method": "importance_aware_svd", "probability": 0.5}),
    "... two-sided": ("sensitivity", {"method": "two_sided_svd"}),
}
NOT_PRUNED = "none"
# what is healed -> what prunes the dense model before, and the method
RECOVERED = {
    "svd": (None, "svd"),
    "weighted_svd": (None, "weighted_svd"),
    "whitened_svd": (None, "whitened_svd"),
    "two_sided_svd": (None, "two_sided_svd"),
    "pruned, svd": ("sensitivity", "svd"),
    "pruned, by importance": ("sensitivity", "importance_aware_svd"),
}


class Study:
    """One model and task, and the cells that are known.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pruned_to = f" {options.prune_keep}" if options.prune_keep else ""  # of a cell's name
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = Path(options.work_dir or self._scratch.name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "cells.json"
        self.cells: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        if options.smoke:
            torch.manual_seed(0)
            self.dense, self.tokenizer = tiny()
            self.train: Any = [{"text": f"{'abcdefgh'[i % 8]} b c", "label": int(i % 8 < 4)} for i in range(32)]
            self.test: Any = self.train
        else:
            self.dense, self.tokenizer = load_dense(options.model), AutoTokenizer.from_pretrained(options.model)
            self.train, self.test = options.train, options.test

    def accuracy(self, model: Any) -> float:
        """On the test data."""
        found = evaluate(model, self.test, "text-classification", tokenizer=self.tokenizer, cost=False)
        return found.model.scores["accuracy"]

    def cell(self, name: str, make: Any) -> Any:
        """A number or more, computed once."""
        if name not in self.cells:
            self.cells[name] = make()
            self.file.write_text(json.dumps(self.cells, indent=1), encoding="utf-8")
        return self.cells[name]

    def pruned(self, importance: str | None, keep: float, seed: int) -> tuple[Any, list[float]]:
        """The pruned model; its accuracy, mean rank and mean 90 %-energy rank (of full rank). Made once."""
        name = f"pruned {importance} {keep} {seed}" if importance else f"trained {seed}"
        if name not in self.cells:
            model, found = self._prune(importance, keep, seed)
            model.save_pretrained(self.folder / name)
            self.cell(name, lambda: found)
        return load_dense(str(self.folder / name)), self.cells[name]

    def _prune(self, importance: str | None, keep: float, seed: int) -> tuple[Any, list[float]]:
        model, options = copy.deepcopy(self.dense), self.options
        features = make_features(model, self.tokenizer, self.train, max_examples=options.max_examples, seed=seed)
        training = LPAFOptions(seed=seed, losses=options.losses or default_losses(features))
        lesson = Lesson(self.dense, training.losses, *hold_out(features, seed), self.tokenizer.pad_token_id)
        pruning = FirstOrderPruningCallback(keep if importance else 1.0, importance=importance or "magnitude")
        rates = {"epochs": options.epochs, "learning_rate": training.prune_learning_rate}
        with tempfile.TemporaryDirectory() as folder:
            train(model, lesson, [pruning], training, folder, eval_strategy="no", eval_on_start=False, **rates)
        ranks = pruning.ranks.values()
        shares = [[one.rank / one.full_rank for one in ranks], [one.energy_rank / one.full_rank for one in ranks]]
        return model, [self.accuracy(model.eval()), *(statistics.mean(share) for share in shares)]

    def start(self, importance: str | None, keep: float, seed: int) -> Any:
        """What is compressed to a budget: pruned as `lpaf` prunes for it, or trained as long."""
        return self.pruned(importance, self.options.prune_keep or default_prune_keep(keep), seed)[0]

    def compressed(self, row: str, keep: float, seed: int) -> float:
        """Accuracy of one row of the table at one budget."""
        importance, options = ROWS[row]
        start, sizes = self.start(importance, keep, seed), self.options
        small = lpaf(
            start, dataset=self.train, tokenizer=self.tokenizer, teacher=self.dense, keep_targets=keep, seed=seed,
            max_examples=sizes.max_examples, prune_epochs=0, tune_epochs=sizes.epochs, losses=sizes.losses, **options,
        )  # fmt: skip
        return self.accuracy(small)

    def recovered(self, name: str, keep: float, seed: int) -> tuple[float, float, float]:
        """Accuracy before and after `recover`, and the minutes that took."""
        importance, method = RECOVERED[name]
        dense, sizes = self.start(importance, keep, seed) if importance else self.dense, self.options
        small = compress(
            dense, method=method, keep_targets=keep, allocation="uniform", refine_passes=0,
            calibration=self.train, tokenizer=self.tokenizer, seed=seed,
        )  # fmt: skip
        before, start = self.accuracy(small), time.perf_counter()
        recover(
            small, teacher=self.dense, dataset=self.train, tokenizer=self.tokenizer, seed=seed,
            max_examples=sizes.max_examples, epochs=sizes.epochs, learning_rate=sizes.recover_rate,
        )  # fmt: skip
        minutes = (time.perf_counter() - start) / 60
        return before, self.accuracy(small), minutes


def main() -> None:
    """Print the tables."""
    options = parse()
    study = Study(options)
    torch.manual_seed(0)
    print(f"dense: accuracy {study.cell('dense', partial(study.accuracy, study.dense)):.4f}; seeds {options.seeds}")
    if options.importances:
        print_pruned(study)
    if options.rows:
        print_compressed(study)
    if options.recover:
        print_recovered(study)


def print_pruned(study: Study) -> None:
    """What pruning leaves."""
    print(f"\n{'pruned by':<12}{'kept':>6}{'accuracy':>18}{'rank':>8}{'90 % energy':>13}")
    for keep in study.options.keep:
        for how in study.options.importances:
            importance = None if how == NOT_PRUNED else how
            found = [study.pruned(importance, keep, seed)[1] for seed in study.options.seeds]
            accuracy, rank, energy = ([one[index] for one in found] for index in range(3))
            print(f"{how:<12}{keep:>6.2f}{spread(accuracy):>18}{mean(rank):>8.1%}{mean(energy):>13.1%}", flush=True)


def print_compressed(study: Study) -> None:
    """What each row makes of it."""
    print(f"\n{'compressed':<32}" + "".join(f"{f'keep_targets {keep}':>20}" for keep in study.options.keep))
    for row in study.options.rows:
        cells = []
        for keep in study.options.keep:
            found = [
                study.cell(f"{row} {keep} {seed}{study.pruned_to}", partial(study.compressed, row, keep, seed))
                for seed in study.options.seeds
            ]
            cells.append(spread(found))
        print(f"{row:<32}" + "".join(f"{cell:>20}" for cell in cells), flush=True)


def print_recovered(study: Study) -> None:
    """What `recover` brings back of what each method loses."""
    rate = study.options.recover_rate
    print(f"\n{'recovered':<24}{'kept':>6}{'before':>18}{'after':>18}{'loss closed':>13}{'minutes':>9}")
    for name in study.options.recover:
        for keep in study.options.keep:
            found = [
                study.cell(
                    f"recover {name} {keep} {seed} {rate}{study.pruned_to}", partial(study.recovered, name, keep, seed)
                )
                for seed in study.options.seeds
            ]
            before, after, minutes = zip(*found, strict=True)
            lost = study.cells["dense"] - mean(before)
            closed = f"{(mean(after) - mean(before)) / lost:.0%}" if lost > 0 else "-"
            print(
                f"{name:<24}{keep:>6.2f}{spread(before):>18}{spread(after):>18}{closed:>13}{mean(minutes):>9.1f}",
                flush=True,
            )


def mean(values: Sequence[float]) -> float:
    """Of all seeds."""
    return statistics.mean(values)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.4f} ± {deviation:.4f}"


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="folder or Hub id of a classifier fine-tuned on the task")
    parser.add_argument("--train", help="examples to train on")
    parser.add_argument("--test", help="examples to report on")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25, 0.16])
    parser.add_argument("--prune-keep", type=float, help="entries that pruning keeps before (default: as in `lpaf`)")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--importances", nargs="*", default=[NOT_PRUNED, *IMPORTANCES])
    parser.add_argument(
        "--recover", nargs="*", default=list(RECOVERED), choices=list(RECOVERED), help="of the third table"
    )
    parser.add_argument("--recover-rate", type=float, help="of that (default: what suits the method)")
    parser.add_argument("--epochs", type=float, default=3, help="of pruning, and again of the factors")
    parser.add_argument("--losses", nargs="+", type=name_and_weight, help="of all rows (default: lpaf's own)")
    parser.add_argument("--max-examples", type=int)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work-dir", help="keeps the cells that are finished")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    options = parser.parse_args()
    options.losses = dict(options.losses or {}) or None
    if options.smoke:
        options.keep, options.seeds, options.epochs = [0.5], [0], 1
        options.rows, options.importances = ["SVD + fine-tuning", "... mixed ranks"], ["sensitivity"]
        options.recover = ["svd"]
    return options


if __name__ == "__main__":
    main()
