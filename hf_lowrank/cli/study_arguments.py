"""What `analyze` and `compare` can be told."""

import argparse
from typing import Any

_ANALYZE_EXAMPLES = """examples:
  hf-lowrank analyze my-bert --method svd                      looks at no text: seconds
  hf-lowrank analyze my-bert --calibration texts.txt --plot bert.html
  hf-lowrank analyze my-bert --calibration texts.txt --keep-targets 0.7 0.5 --latency --json"""

_COMPARE_EXAMPLES = """examples:
  hf-lowrank compare my-bert --dataset test.txt --task masked-lm --calibration train.txt \\
      --methods svd whitened_svd:uniform:low_rank two_sided_svd two_sided_svd:measured:pivoted:0 \\
      --keep-targets 0.8 0.6 --off-calibration stories.txt --work-dir comparison --plot comparison.html

Killed, it goes on where it was when started again with the same --work-dir."""

Commands = Any  # argparse's private type for sub-parsers


def add_study_commands(commands: Commands) -> None:
    """Add the commands that look and measure, and change nothing."""
    _add_analyze(commands)
    _add_compare(commands)


def _add_analyze(commands: Commands) -> None:
    parser = _command(commands, "analyze", "show what compressing would do to each matrix", _ANALYZE_EXAMPLES)
    budget = parser.add_mutually_exclusive_group()
    _fractions(budget, "--keep-targets", "of the replaced matrices' parameters that stay (default: 0.8 0.6 0.4 0.25)")
    _fractions(budget, "--keep-params", "of the whole model's parameters that stay")
    parser.add_argument("--method", help="how the factors are found; svd looks at no text (default: two_sided_svd)")
    parser.add_argument("--allocation", help="how the budget is shared (default: what suits the method)")
    parser.add_argument("--storage", help="low_rank (two factors) or pivoted (more rank in the same size)")
    parser.add_argument("--cache-dir", metavar="DIR", help="keep statistics and measurements, and use those there")
    parser.add_argument("--latency", action="store_true", help="time layers of each shape, and predict from that")
    _add_calibration(parser)
    _add_output(parser)


def _add_compare(commands: Commands) -> None:
    parser = _command(commands, "compare", "score methods side by side at equal sizes", _COMPARE_EXAMPLES)
    parser.add_argument("--dataset", metavar="DATA", required=True, help="file or Hub data set to score on")
    parser.add_argument("--task", required=True, help="masked-lm, causal-lm, text-classification, similarity, ...")
    parser.add_argument(
        "--methods",
        metavar="METHOD",
        nargs="+",
        required=True,
        help="each NAME[:ALLOCATION[:STORAGE[:REFINE_PASSES]]], such as svd, whitened_svd:uniform or "
        "two_sided_svd:measured:pivoted:0; what is left out is what compress does by default",
    )
    _fractions(parser, "--keep-targets", "of the replaced matrices' parameters that stay (default: 0.8 0.6 0.4)")
    parser.add_argument("--off-calibration", metavar="DATA", help="text of another kind to score on as well")
    parser.add_argument("--work-dir", metavar="DIR", help="keep what is done, so that a killed run goes on")
    parser.add_argument("--baseline", metavar="METHOD", help="whose g others are divided by, out of --methods")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="type to load the model in")
    parser.add_argument(
        "--refine-passes", type=int, metavar="N", help="of a short training, for methods that do not say"
    )
    task = parser.add_argument_group("of the task")
    for column in ("text", "text-pair", "label", "score"):
        task.add_argument(f"--{column}-column", metavar="NAME")
    task.add_argument("--max-examples", type=int, metavar="N", help="score on that many at most, drawn")
    task.add_argument("--block-length", type=int, metavar="N", help="tokens of a block, for language models")
    task.add_argument("--stride", type=int, metavar="N", help="tokens from block to block, for causal-lm")
    task.add_argument("--batch-size", type=int, metavar="N", help="sequences run at once")
    _add_calibration(parser)
    _add_output(parser)


def _command(commands: Commands, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary.capitalize()}; nothing is changed.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="Hub id or folder of a dense model")
    return parser


def _fractions(parser: Any, option: str, what: str) -> None:
    parser.add_argument(option, type=float, metavar="F", nargs="+", help=f"fractions {what}")


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("the text the methods look at")
    text.add_argument("--calibration", metavar="TEXT", help="file or Hub data set like what the model is for")
    text.add_argument("--calibration-column", metavar="NAME", help="column that holds it")
    text.add_argument("--num-calibration-samples", type=int, metavar="N", help="sequences to look at (default: 256)")
    text.add_argument("--max-seq-length", type=int, metavar="N", help="tokens of each at most (default: 128)")
    text.add_argument("--seed", type=int, metavar="N", help="of every draw (default: 0)")
    parser.add_argument("--embeddings", help="low_rank or dense: whether they are targets too")
    parser.add_argument("--device", help="where to decompose, such as cuda (default: where the model is)")


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plot", metavar="FILE", help="draw: out.png, or out.html with the tables")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
