"""What `push` can be told."""

import argparse
from typing import Any

_PUSH_EXAMPLES = """examples:
  hf-lowrank push small-bert me/small-bert --dry-run         list the files
  hf-lowrank push small-bert me/small-bert --private
  hf-lowrank push small-bert someone/small-bert --create-pr

The folder is verified first, and everything is published in one commit. Interrupted, run it again."""

Commands = Any  # argparse's private type for sub-parsers


def add_sharing_commands(commands: Commands) -> None:
    """Add the commands that share a model."""
    _add_push(commands)


def _add_push(commands: Commands) -> None:
    parser = _command(commands, "push", "publish a compressed model on the Hub", _PUSH_EXAMPLES)
    parser.add_argument("repo", metavar="REPO", help="owner/name on the Hub; made if it does not exist")
    parser.add_argument("--private", action="store_true", help="make the repository private, if it is made")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; made if it does not exist")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit-message", metavar="TEXT", help="first line: summary; the rest: description")
    parser.add_argument("--token", help="default: HF_TOKEN, or the one `hf auth login` stored; other users see this")
    parser.add_argument("--dry-run", action="store_true", help="list the files and send nothing")


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
