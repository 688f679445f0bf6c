"""What the commands can be told."""

import argparse

from hf_lowrank.cli.flags.commands import Commands, Parser, add_command, add_out, methods_in_words
from hf_lowrank.cli.flags.evaluate import add_evaluate
from hf_lowrank.cli.flags.sharing import add_sharing_commands
from hf_lowrank.cli.flags.studies import add_calibration, add_study_commands
from hf_lowrank.cli.flags.training import add_training_commands
from hf_lowrank.compression.settings import CompressOptions
from hf_lowrank.options import add_flags, names_of_flags
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of `hf-lowrank`."""
    parser = Parser(
        prog="hf-lowrank",
        description="Make a Hugging Face model smaller and faster by low-rank factors; it loads without this library.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hf-lowrank {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    _add_compress(commands)
    _add_folders(commands)
    add_evaluate(commands)
    add_study_commands(commands)
    add_sharing_commands(commands)
    add_training_commands(commands)
    return parser


def _add_compress(commands: Commands) -> None:
    examples = _COMPRESS_EXAMPLES + methods_in_words()
    parser = add_command(commands, "compress", "make a model smaller and save it", examples)
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a dense model")
    add_out(parser)
    budget = parser.add_argument_group("budget, exactly one (none with --bits or a method that names its ranks)")
    add_flags(budget.add_mutually_exclusive_group(), CompressOptions, names_of_flags(CompressOptions, "budget"))
    choice = parser.add_argument_group("what is compressed, and how")
    add_flags(choice, CompressOptions, names_of_flags(CompressOptions, "choice"))
    choice.add_argument(
        "--vocabulary", metavar="TEXT", help="file or Hub data set: keep only the tokens it uses (default: keep all)"
    )
    add_flags(add_calibration(parser), CompressOptions, names_of_flags(CompressOptions, "text"))
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument("--no-latency", action="store_true", help="do not measure how fast the two models run")


def _add_folders(commands: Commands) -> None:
    """Add the commands that look at a saved folder."""
    what = "folder or Hub id of a compressed model"
    parser = add_command(commands, "inspect", "show what a compressed model is made of")
    parser.add_argument("path", metavar="PATH", help=what)
    parser.add_argument("--modules", action="store_true", help="one line for every matrix")
    parser = add_command(commands, "decompress", "turn a compressed model into a stock transformers model")
    parser.add_argument("path", metavar="PATH", help=what)
    add_out(parser)
    parser = add_command(commands, "verify", "prove that a folder loads without this library and computes the same")
    parser.add_argument("path", metavar="PATH", help="folder of a compressed model")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that this library did not ship")
