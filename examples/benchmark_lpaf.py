r"""What pruning, row weights, mixed ranks and consistency each add: accuracy of a classifier, mean and spread.

    python examples/benchmark_lpaf.py --model my-bert-on-sst2 --train SST-2/train.tsv --test SST-2/dev.tsv \
        --work-dir build/lpaf
    python examples/benchmark_lpaf.py --smoke        # a tiny model with random weights, seconds

The first table prunes to the budgets, the second as `lpaf` does. Every row of the second has the same teacher, the
dense model, and the same loss, and makes as many steps in all: the rows without pruning train the dense model as long
as the others prune it, and rows that prune alike start from the same pruned model. The third table is of `recover`,
from what each method makes of the dense model or of a pruned one. Nothing is chosen on the test data. Finished cells
and pruned models are kept in the work directory, of which `lpaf_tables.py` makes the tables of several tasks. In 16
bits, with `ACCELERATE_MIXED_PRECISION=bf16`.
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from glue_lpaf import tiny
from lpaf_tables import Cells, Tables
from transformers import AutoTokenizer

from hf_lowrank import FirstOrderPruningCallback, compress, evaluate, lpaf, recover
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.options import add_flags
from hf_lowrank.training.lessons import make_lesson, train_in
from hf_lowrank.training.lpaf import default_prune_keep
from hf_lowrank.training.options import IMPORTANCES, LPAFOptions

NOT_PRUNED = "nothing"  # but trained as long
# row -> what prunes, and options of `lpaf`, without mixed ranks unless given
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "SVD + fine-tuning": (NOT_PRUNED, {"method": "svd"}),
    "FWSVD + fine-tuning": (NOT_PRUNED, {"method": "weighted_svd"}),
    "two-sided SVD + fine-tuning": (NOT_PRUNED, {"method": "two_sided_svd"}),
    "magnitude-pruned, SVD": ("magnitude", {"method": "svd"}),
    "pruned, SVD": ("sensitivity", {"method": "svd"}),
    "pruned, mixed ranks": ("sensitivity", {"method": "svd", "probability": 0.5}),
    "pruned, mixed ranks, consistency": ("sensitivity", {"method": "svd", "probability": 0.5, "consistency": 1.0}),
    "pruned, rows by survivors": ("sensitivity", {"method": "sparsity_aware_svd"}),
    "pruned, rows by importance": ("sensitivity", {"method": "importance_aware_svd"}),
    "pruned, rows by importance, mixed ranks": ("sensitivity", {"method": "importance_aware_svd", "probability": 0.5}),
    "pruned, two-sided (lpaf)": ("sensitivity", {"method": "two_sided_svd"}),
    "pruned, two-sided, mixed ranks": ("sensitivity", {"method": "two_sided_svd", "probability": 0.5}),
}
# what is healed -> what prunes the dense model before, and the method
RECOVERED = {
    "svd": (None, "svd"),
    "weighted_svd": (None, "weighted_svd"),
    "whitened_svd": (None, "whitened_svd"),
    "two_sided_svd": (None, "two_sided_svd"),
    "pruned, svd": ("sensitivity", "svd"),
    "pruned, by importance": ("sensitivity", "importance_aware_svd"),
    "pruned, two_sided_svd": ("sensitivity", "two_sided_svd"),
}


class Study:
    """One model and task, and the cells that are known.

    Args:
        options: Of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self._scratch = tempfile.TemporaryDirectory()
        self.folder = Path(options.work_dir or self._scratch.name)
        names = ("epochs", "losses", "max_examples", "prune_keep", "recover_rate")
        self.cells = Cells(self.folder, {name: getattr(options, name) for name in names})
        if options.smoke:
            torch.manual_seed(0)
            self.dense, self.tokenizer = tiny()
            self.train: Any = [{"text": f"{'abcdefgh'[i % 8]} b c", "label": int(i % 8 < 4)} for i in range(32)]
            self.test: Any = self.train
        else:
            self.dense, self.tokenizer = load_dense(options.model), AutoTokenizer.from_pretrained(options.model)
            self.train, self.test = options.train, options.test

    def run(self) -> None:
        """Make what is asked for and not there yet."""
        options, get = self.options, self.cells.get
        get(lambda: {"accuracy": self.accuracy(self.dense)}, table="dense")
        for seed, keep in itertools.product(options.seeds, options.keep):
            for importance in options.importances:
                self.pruned(importance, keep, seed)
            for row in options.rows:
                get(partial(self.compressed, row, keep, seed), table="compressed", what=row, keep=keep, seed=seed)
            for name in options.recover:
                get(partial(self.recovered, name, keep, seed), table="recovered", what=name, keep=keep, seed=seed)

    def accuracy(self, model: Any) -> float:
        """On the test data."""
        found = evaluate(model, self.test, "text-classification", tokenizer=self.tokenizer, cost=False)
        return found.model.scores["accuracy"]

    def pruned(self, importance: str, keep: float, seed: int) -> Any:
        """The model pruned, or trained as long; made once, with its accuracy and mean ranks (of full rank)."""
        keep = 1.0 if importance == NOT_PRUNED else keep
        folder = self.folder / f"pruned {importance} {keep} {seed}"

        def make() -> dict[str, float]:
            model, found = self._prune(importance, keep, seed)
            model.save_pretrained(folder)
            return found

        self.cells.get(make, table="pruned", what=importance, keep=keep, seed=seed)
        return load_dense(str(folder))

    def _prune(self, importance: str, keep: float, seed: int) -> tuple[Any, dict[str, float]]:
        model, options = copy.deepcopy(self.dense), self.options
        training = LPAFOptions(seed=seed, losses=options.losses, max_examples=options.max_examples)
        lesson = make_lesson(model, self.dense, self.tokenizer, self.train, None, training)
        pruning = FirstOrderPruningCallback(keep, importance="magnitude" if importance == NOT_PRUNED else importance)
        rates = {"epochs": options.epochs, "learning_rate": training.prune_learning_rate}
        with tempfile.TemporaryDirectory() as folder:
            train_in(folder, model, lesson, training, [pruning], eval_strategy="no", eval_on_start=False, **rates)
        ranks = pruning.ranks.values()
        return model, {
            "accuracy": self.accuracy(model.eval()),
            "rank": statistics.mean(one.rank / one.full_rank for one in ranks),
            "energy_rank": statistics.mean(one.energy_rank / one.full_rank for one in ranks),
        }

    def start(self, importance: str, keep: float, seed: int) -> Any:
        """What is compressed to a budget: pruned as `lpaf` prunes for it, or trained as long."""
        return self.pruned(importance, self.options.prune_keep or default_prune_keep(keep), seed)

    def compressed(self, row: str, keep: float, seed: int) -> dict[str, float]:
        """One row of the table at one budget."""
        importance, options = ROWS[row]
        start, sizes = self.start(importance, keep, seed), self.options
        small = lpaf(
            start, dataset=self.train, tokenizer=self.tokenizer, teacher=self.dense, keep_targets=keep, seed=seed,
            max_examples=sizes.max_examples, prune_epochs=0, tune_epochs=sizes.epochs, losses=sizes.losses, **options,
        )  # fmt: skip
        return {"accuracy": self.accuracy(small)}

    def recovered(self, name: str, keep: float, seed: int) -> dict[str, float]:
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
        return {"before": before, "after": self.accuracy(small), "minutes": minutes}


def main() -> None:
    """Make the cells, and print the tables."""
    options = parse()
    torch.manual_seed(0)
    study = Study(options)
    study.run()
    name = Path(options.test).parent.name if options.test else "test"
    print("\n" + "\n".join(Tables({name: study.cells.list}).lines()))


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
    add_flags(parser, LPAFOptions, ["losses", "max_examples"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work-dir", help="keeps the cells that are finished")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, seconds")
    options = parser.parse_args()
    if options.smoke:
        options.keep, options.seeds, options.epochs = [0.5], [0], 1
        options.rows, options.importances = ["SVD + fine-tuning", "pruned, mixed ranks"], ["sensitivity"]
        options.recover = ["svd"]
    return options


if __name__ == "__main__":
    main()
