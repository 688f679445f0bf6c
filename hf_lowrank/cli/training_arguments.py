"""What the commands that train can be told."""

import argparse
from typing import Any

_RECOVER_EXAMPLES = """examples:
  hf-lowrank recover small-bert healed-bert --teacher my-bert --dataset train.tsv
  hf-lowrank recover small-gpt2 healed --teacher my-gpt2 --dataset texts.txt --epochs 1
  hf-lowrank recover small healed --teacher my-bert --dataset nyu-mll/glue:sst2:train --losses logits=1 task=0.5

The state with the least loss on examples set aside is kept; the one before the training competes."""

_LPAF_EXAMPLES = """examples:
  hf-lowrank lpaf bert-on-sst2 small --dataset train.tsv --keep-targets 0.25
  hf-lowrank lpaf bert-on-sst2 small --dataset train.tsv --keep-targets 0.25 --work-dir run   goes on after a kill

MODEL is fine-tuned on the task already. Prunes it, factorizes what is left, trains the factors, both
towards the model as it was (--losses task=1: by the labels alone)."""

Commands = Any  # argparse's private type for sub-parsers


def add_training_commands(commands: Commands) -> None:
    """Add the commands that train."""
    parser = _command(commands, "recover", "train a compressed model back towards the dense one", _RECOVER_EXAMPLES)
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a compressed model")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--teacher", metavar="MODEL", required=True, help="the dense model it came from")
    _add_data(parser)
    _add_losses(parser)
    parser.add_argument("--epochs", type=float, metavar="F", help="passes over the data (default: 3)")
    parser.add_argument("--learning-rate", type=float, metavar="F", help="peak (default: what suits the method)")
    _add_lpaf(commands)


def _add_lpaf(commands: Commands) -> None:
    parser = _command(commands, "lpaf", "prune, factorize and train a fine-tuned model", _LPAF_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a model fine-tuned on the task")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    group = parser.add_argument_group("budget, exactly one").add_mutually_exclusive_group(required=True)
    for name, meaning in (("keep-targets", "of the replaced matrices"), ("keep-params", "of the whole model")):
        group.add_argument(
            f"--{name}", type=float, metavar="F", help=f"fraction of the parameters {meaning} that stay"
        )
    group.add_argument("--target-size", metavar="SIZE", help="size of the weights, such as 100MB or 95MiB")
    group.add_argument("--rank", type=int, metavar="N", help="rank of every replaced matrix")
    _add_data(parser)
    _add_losses(parser)
    parser.add_argument("--method", help="how the sparse matrices are factorized (default: two_sided_svd)")
    parser.add_argument("--importance", help="sensitivity, movement, magnitude or random (default: sensitivity)")
    for name, meaning in (
        ("prune-keep", "fraction of the entries pruning keeps (default: 0.5, or keep-targets if that is more)"),
        ("probability", "of a layer to take its sparse weight at first, such as 0.5 (default: 0)"),
        ("consistency", "weight of the consistency loss (default: 0)"),
        ("prune-epochs", "passes over the data while pruning (default: 3)"),
        ("tune-epochs", "passes with the factors (default: 3)"),
        ("prune-learning-rate", "peak while pruning (default: 1e-4)"),
        ("score-learning-rate", "peak of the scores (default: 1e-2)"),
        ("tune-learning-rate", "peak of the factors (default: 5e-5; 5e-4 for causal language models)"),
    ):
        parser.add_argument(f"--{name}", type=float, metavar="F", help=meaning)
    parser.add_argument("--work-dir", metavar="DIR", help="keep checkpoints there, and go on from them after a kill")


def _add_losses(parser: argparse.ArgumentParser) -> None:
    names = "task, logits, hidden, attention"
    parser.add_argument("--losses", metavar="NAME=W", nargs="+", type=name_and_weight, help=names)
    parser.add_argument("--temperature", type=float, metavar="T", help="of the logits (default: 1)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", metavar="DATA", required=True, help="file, or NAME:CONFIG:SPLIT of the Hub")
    parser.add_argument("--eval-dataset", metavar="DATA", help="to choose the best state by (default: a tenth)")
    for column in ("text", "label"):
        parser.add_argument(f"--{column}-column", metavar="NAME", help=f"where the {column} is")
    for name, meaning in (
        ("max-seq-length", "tokens of an example at most"),
        ("max-examples", "examples at most"),
        ("batch-size", "examples a step"),
        ("seed", "of every draw"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    parser.add_argument("--overwrite", action="store_true", help="replace the model folder OUT if there is one")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _command(commands: Commands, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def name_and_weight(text: str) -> tuple[str, float]:
    """`logits=1` -> `("logits", 1.0)`."""
    name, _, weight = text.partition("=")
    try:
        return name, float(weight)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=W, such as logits=1") from error
