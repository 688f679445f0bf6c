"""What `evaluate` can be told."""

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from hf_lowrank.cli.flags.commands import Commands, add_command
from hf_lowrank.evaluation import TASKS
from hf_lowrank.options import LARGEST_SEED, Options, add_flags, option

_EXAMPLES = """examples:
  hf-lowrank evaluate small-bert --dense my-bert --task masked-lm --dataset wiki.test.txt
  hf-lowrank evaluate small-encoder --dense my-encoder --task similarity --dataset stsb-dev.tsv
  hf-lowrank evaluate small-classifier --task text-classification --dataset nyu-mll/glue:sst2:validation --json

tasks, and the data they read:
"""


@dataclass(frozen=True, kw_only=True)
class _Scored(Options):
    """What is scored.

    Args:
        task: What a model is to do; each reads data of its own kind.
    """

    task: str = option(MISSING, choices=TASKS)


@dataclass(frozen=True, kw_only=True)
class TaskFlags(Options):
    """What tasks can be told on the command line; the options of each, with their defaults, are its own fields.

    Args:
        text_column: Where the text is.
        text_pair_column: Where the second text is.
        label_column: Where the label is.
        max_examples: Examples or blocks at most, drawn by `seed`.
        block_length: Tokens of a language model's block. Default: 128.
        seed: Of masks and of the examples drawn. Default: 0.
    """

    text_column: str | None = option(None, metavar="NAME")
    text_pair_column: str | None = option(None, metavar="NAME")
    label_column: str | None = option(None, metavar="NAME")
    max_examples: int | None = option(None, at_least=1)
    block_length: int | None = option(None, at_least=2)
    seed: int | None = option(None, at_least=0, at_most=LARGEST_SEED)


def add_task(parser: Any, names: Iterable[str]) -> None:
    """Add the task, its data and some of its options."""
    parser.add_argument("--dataset", metavar="DATA", required=True, help="file, or NAME:CONFIG:SPLIT of the Hub")
    add_flags(parser, _Scored, ["task"])
    add_flags(parser.add_argument_group("of the task"), TaskFlags, names)


def add_evaluate(commands: Commands) -> None:
    """Add the command that scores a model."""
    examples = _EXAMPLES + "\n".join(f"  {name:<21}{row.data}" for name, row in TASKS.items())
    parser = add_command(commands, "evaluate", "score a model on data, beside the dense one it came from", examples)
    parser.add_argument("path", metavar="PATH", help="folder or Hub id of a model, compressed or not")
    parser.add_argument("--dense", metavar="MODEL", help="the dense model, to compare with")
    add_task(parser, [field.name for field in fields(TaskFlags)])
    parser.add_argument("--device", help="where to run, such as cuda (default: cpu)")
    parser.add_argument("--record", action="store_true", help="append the scores to PATH's report and card")
    parser.add_argument("--no-cost", action="store_true", help="do not measure latency and memory")
