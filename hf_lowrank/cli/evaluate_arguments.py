"""What `evaluate` can be told."""

import argparse
from typing import Any

_EXAMPLES = """examples:
  hf-lowrank evaluate small-bert --dense my-bert --task masked-lm --dataset wiki.test.txt
  hf-lowrank evaluate small-encoder --dense my-encoder --task similarity --dataset stsb-dev.tsv
  hf-lowrank evaluate small-classifier --task text-classification --dataset nyu-mll/glue:sst2:validation --json

masked-lm, causal-lm and agreement need a column of text; text-classification and text-regression a label too;
similarity two sentences and a score; question-answering rows or a file as in SQuAD."""

Commands = Any  # argparse's private type for sub-parsers


def add_evaluate(commands: Commands) -> None:
    """Add the command that scores a model."""
    summary = "score a model on data, beside the dense one it came from"
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help=summary,
        description=f"{summary.capitalize()}.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a model, compressed or not")
    parser.add_argument("--dataset", metavar="DATA", required=True, help="file, or NAME:CONFIG:SPLIT of the Hub")
    tasks = "masked-lm, causal-lm, text-classification, text-regression, question-answering, similarity or agreement"
    parser.add_argument("--task", required=True, help=tasks)
    parser.add_argument("--dense", metavar="MODEL", help="the dense model, to compare with")
    _add_options(parser.add_argument_group("of the task"))
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="examples at once (default: 8)")
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=types, help="type to run in (default: as stored)")
    parser.add_argument("--device", help="where to run, such as cuda (default: cpu)")
    parser.add_argument("--record", action="store_true", help="append the scores to PATH's report and card")
    parser.add_argument("--no-cost", action="store_true", help="do not measure latency and memory")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_options(task: Any) -> None:
    for column in ("text", "text-pair", "label", "score"):
        task.add_argument(f"--{column}-column", metavar="NAME", help=f"where the {column.replace('-', ' ')} is")
    task.add_argument("--max-examples", type=int, metavar="N", help="examples or blocks at most, drawn by --seed")
    task.add_argument("--max-seq-length", type=int, metavar="N", help="tokens of an example at most")
    task.add_argument("--block-length", type=int, metavar="N", help="tokens of a language model's block (128)")
    task.add_argument("--stride", type=int, metavar="N", help="tokens between causal-lm windows (no overlap)")
    task.add_argument("--seed", type=int, metavar="N", help="of masks and of the examples drawn (default: 0)")
