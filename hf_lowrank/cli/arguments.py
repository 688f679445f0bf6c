"""What the commands can be told."""

import argparse
from typing import NoReturn

from hf_lowrank.cli.evaluate_arguments import add_evaluate
from hf_lowrank.cli.sharing_arguments import add_sharing_commands
from hf_lowrank.cli.study_arguments import add_study_commands
from hf_lowrank.cli.training_arguments import add_training_commands
from hf_lowrank.errors import InputError
from hf_lowrank.version import __version__

_EXAMPLES = """examples:
  hf-lowrank compress google-bert/bert-base-uncased small-bert --keep-params 0.6
  hf-lowrank compress my-encoder small --target-size 60MB --overwrite
  hf-lowrank compress my-gpt2 small --keep-targets 0.5 --exclude-modules c_attn --dry-run
  hf-lowrank verify small-bert          prove that it loads without this library
  hf-lowrank inspect small-bert --modules
  hf-lowrank decompress small-bert stock-bert

exit status: 0 done, 1 a check failed, 2 bad input, with one line on standard error that says what to do"""

_COMPRESS_EXAMPLES = """examples:
  hf-lowrank compress MODEL OUT --keep-params 0.6            60 % of the whole model's parameters stay
  hf-lowrank compress MODEL OUT --keep-targets 0.5           half of the replaced matrices' parameters stay
  hf-lowrank compress MODEL OUT --target-size 100MB          the whole folder, tokenizer included
  hf-lowrank compress MODEL OUT --rank 64 --rank-pattern query=32 key=32
  hf-lowrank compress MODEL OUT --keep-params 0.6 --target-modules query key value
  hf-lowrank compress MODEL OUT --keep-params 0.6 --dry-run --json"""


class _Parser(argparse.ArgumentParser):
    """Complains in one line, as every other part of the command does."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """The parser of `hf-lowrank`."""
    parser = _Parser(
        prog="hf-lowrank",
        description="Make a Hugging Face model smaller and faster by low-rank factors; it loads without this library.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf-lowrank {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_compress(commands)
    _add_inspect(commands)
    _add_decompress(commands)
    _add_verify(commands)
    add_evaluate(commands)
    add_study_commands(commands)
    add_sharing_commands(commands)
    add_training_commands(commands)
    return parser


def _add(commands: "argparse._SubParsersAction[_Parser]", name: str, summary: str, epilog: str = "") -> _Parser:
    return commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_compress(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add(commands, "compress", "make a model smaller and save it", _COMPRESS_EXAMPLES)
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a dense model")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    _add_budget(parser)
    choice = parser.add_argument_group("what is compressed, and how")
    choice.add_argument(
        "--rank-pattern", metavar="NAME=R", nargs="+", action="extend", default=[], type=_name_and_rank
    )
    choice.add_argument("--method", help="how the factors are found; svd looks at no text (default: two_sided_svd)")
    choice.add_argument("--group", help="what a tensor method takes: attention, feed_forward or both (default: both)")
    choice.add_argument("--allocation", help="how the budget is shared (default: what suits the method)")
    choice.add_argument("--storage", help="low_rank (two factors) or pivoted (more rank in the same size)")
    names = "names, last parts of names, all-linear, or one regular expression"
    choice.add_argument("--target-modules", metavar="NAME", nargs="+", action="extend", help=names)
    choice.add_argument("--exclude-modules", metavar="NAME", nargs="+", action="extend", help="the same, taken away")
    choice.add_argument(
        "--embeddings",
        help="low_rank, autoencoder or dense; default: low_rank where the budget is the whole model's",
    )
    choice.add_argument(
        "--embedding-objective", help="of autoencoders: loss (default), direction, published or nonlinear"
    )
    choice.add_argument(
        "--vocabulary", metavar="TEXT", help="file or Hub data set: keep only the tokens it uses (default: keep all)"
    )
    choice.add_argument("--dtype", help="type to store the weights in, such as bfloat16 (default: as they are)")
    choice.add_argument("--device", help="where to decompose, such as cuda (default: cpu)")
    _add_text(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the model folder OUT if there is one")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--no-latency", action="store_true", help="do not measure how fast the two models run")
    _add_json(parser)


def _add_text(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("the text that is looked at")
    text.add_argument(
        "--calibration", metavar="TEXT", help="file or Hub data set of text like that the model is for; default: none"
    )
    text.add_argument("--text-column", metavar="NAME", help="column that holds the text")
    for name, meaning in (
        ("num-calibration-samples", "sequences to look at"),
        ("max-seq-length", "tokens of a sequence at most"),
        ("batch-size", "sequences run at once"),
        ("seed", "of every draw"),
        ("refine-block-passes", "passes of training one block after the other"),
        ("refine-passes", "passes of training towards the dense model; 0 for none"),
    ):
        text.add_argument(f"--{name}", type=int, metavar="N", help=meaning)
    text.add_argument(
        "--anchored",
        action=argparse.BooleanOptionalAction,
        help="solve again, in the order of the model, on what the compressed model before each matrix gives",
    )
    text.add_argument(
        "--bias-correction",
        action="store_true",
        default=None,
        help="biases make up for what the replaced weights lose on the mean input",
    )
    text.add_argument(
        "--fast", action="store_true", default=None, help="a quarter of the text, predicted ranks, no training"
    )
    text.add_argument("--cache-dir", metavar="DIR", help="keep what was found, for other budgets or after a kill")


def _add_budget(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "budget, exactly one (none with a method that names its ranks)"
    ).add_mutually_exclusive_group()
    group.add_argument(
        "--keep-params", type=float, metavar="F", help="fraction of the whole model's parameters that stay"
    )
    group.add_argument("--keep-targets", type=float, metavar="F", help="the same, of the replaced matrices only")
    group.add_argument("--target-size", metavar="SIZE", help="size of the whole folder, such as 100MB or 95MiB")
    group.add_argument("--keep-latency", type=float, metavar="F", help="fraction of the model's latency that stays")
    group.add_argument("--rank", type=int, metavar="N", help="rank of every replaced matrix")
    group.add_argument(
        "--ranks", type=int, metavar="N", nargs="+", help="ranks of a tensor method, such as 72 384 384"
    )


def _add_inspect(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add(commands, "inspect", "show what a compressed model is made of")
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a compressed model")
    parser.add_argument("--modules", action="store_true", help="one line for every matrix")
    _add_json(parser)


def _add_decompress(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add(commands, "decompress", "turn a compressed model into a stock transformers model")
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a compressed model")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model folder OUT if there is one")
    _add_json(parser)


def _add_verify(commands: "argparse._SubParsersAction[_Parser]") -> None:
    parser = _add(commands, "verify", "prove that a folder loads without this library and computes the same")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that this library did not ship")
    parser.add_argument("path", metavar="PATH", help="folder of a compressed model")
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _name_and_rank(text: str) -> tuple[str, int]:
    name, _, rank = text.rpartition("=")
    if not name or not rank.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=R, such as query=32")
    return name, int(rank)
