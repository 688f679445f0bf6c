"""What `push`, `card` and `doctor` can be told."""

import argparse
from typing import Any

from hf_lowrank.options import add_flags
from hf_lowrank.push_options import PushOptions

_PUSH_EXAMPLES = """examples:
  hf-lowrank push small-bert me/small-bert --dry-run         list the files
  hf-lowrank push small-bert me/small-bert --private
  hf-lowrank push small-bert someone/small-bert --create-pr

The folder is verified first, and everything is published in one commit. Interrupted, run it again."""

_CARD_EXAMPLES = """examples:
  hf-lowrank card small-bert
  hf-lowrank card small-bert --base-model google-bert/bert-base-uncased --license apache-2.0

What you wrote below the card's last line is kept."""

Commands = Any  # argparse's private type for sub-parsers


def add_sharing_commands(commands: Commands) -> None:
    """Add the commands that share a model, and the one that looks for what stands in the way."""
    _add_push(commands)
    _add_card(commands)
    _add_doctor(commands)


def _add_push(commands: Commands) -> None:
    parser = _command(commands, "push", "publish a compressed model on the Hub", _PUSH_EXAMPLES)
    parser.add_argument("repo", metavar="REPO", help="owner/name on the Hub; made if it does not exist")
    parser.add_argument("--token", help="default: HF_TOKEN, or the one `hf auth login` stored; other users see this")
    flags = ("private", "revision", "create_pr", "commit_message", "dry_run", "include", "trust_remote_code")
    add_flags(parser, PushOptions, flags)


def _add_card(commands: Commands) -> None:
    parser = _command(commands, "card", "write the card of a compressed model again, from its report", _CARD_EXAMPLES)
    parser.add_argument("--repo", metavar="REPO", help="what the snippet loads from (default: the folder's name)")
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--base-model", metavar="ID", help="Hub id of the dense model, where it was a local copy")
    base.add_argument("--finetuned-from", metavar="ID", help="Hub id of what the dense model was fine-tuned from")
    parser.add_argument("--license", help="of the dense model, as the Hub writes it, such as apache-2.0")
    parser.add_argument("--language", nargs="+", metavar="CODE", help="such as en de")
    parser.add_argument("--overwrite", action="store_true", help="replace a card that hf_lowrank did not write")


def _add_doctor(commands: Commands) -> None:
    summary = "show versions, machine and caches, and what commonly stands in the way"
    parser = commands.add_parser("doctor", help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
    parser.add_argument("path", metavar="PATH", nargs="?", help="model folder to look at as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _command(commands: Commands, name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary.capitalize()}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="PATH", help="folder of a compressed model")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser
