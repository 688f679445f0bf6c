"""What `analyze` and `compare` can be told."""

from collections.abc import Sequence
from typing import Any

from hf_lowrank.cli.flags.commands import Commands, Parser, add_command, methods_in_words
from hf_lowrank.cli.flags.evaluate import add_task
from hf_lowrank.compression.settings import ANALYZED, COMPARED, ComparisonOptions, CompressOptions
from hf_lowrank.options import add_flags

_ANALYZE_EXAMPLES = """examples:
  hf-lowrank analyze my-bert --method svd                      looks at no text: seconds
  hf-lowrank analyze my-bert --calibration texts.txt --plot bert.html
  hf-lowrank analyze my-bert --calibration texts.txt --keep-targets 0.7 0.5 --json"""

_COMPARE_EXAMPLES = """examples:
  hf-lowrank compare my-bert --dataset test.txt --task masked-lm --calibration train.txt \\
      --methods svd whitened_svd:uniform:low_rank two_sided_svd two_sided_svd:measured:pivoted:0 \\
      --keep-targets 0.8 0.6 --off-calibration stories.txt --work-dir comparison --plot comparison.html

Killed, it goes on where it was when started again with the same --work-dir."""


def add_study_commands(commands: Commands) -> None:
    """Add the commands that look and measure, and change nothing."""
    parser = add_command(
        commands, "analyze", "show what compressing would do to each matrix", _ANALYZE_EXAMPLES + methods_in_words()
    )
    _add_model(parser)
    _add_fractions(parser, ANALYZED)
    add_flags(parser, CompressOptions, ["method"])
    add_flags(add_calibration(parser), CompressOptions, ["text_column", "cache_dir"])

    parser = add_command(
        commands, "compare", "score methods side by side at equal sizes", _COMPARE_EXAMPLES + methods_in_words()
    )
    _add_model(parser)
    _add_fractions(parser, COMPARED)
    add_flags(parser, ComparisonOptions, ["methods"])
    add_task(parser, ["text_column", "max_examples"])
    add_calibration(parser)
    parser.add_argument("--off-calibration", metavar="DATA", help="text of another kind to score on as well")
    add_flags(parser, ComparisonOptions, ["work_dir"])


def add_calibration(parser: Parser) -> Any:
    """Add the text that methods look at, and the group for what is said of it."""
    group = parser.add_argument_group("the text that is looked at")
    group.add_argument(
        "--calibration", metavar="TEXT", help="file or Hub data set of text like that the model is for; default: none"
    )
    return group


def _add_model(parser: Parser) -> None:
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a dense model; it is not changed")
    parser.add_argument("--plot", metavar="FILE", help="draw: out.png, or out.html with the tables")


def _add_fractions(parser: Parser, default: Sequence[float]) -> None:
    what = f"fractions of the replaced matrices' parameters that stay (default: {' '.join(map(str, default))})"
    parser.add_argument("--keep-targets", type=float, metavar="F", nargs="+", help=what)
