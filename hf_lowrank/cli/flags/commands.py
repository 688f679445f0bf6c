"""How a command is added to `hf-lowrank`, and what several of them can be told."""

import argparse
from typing import Any, NoReturn

from hf_lowrank.errors import InputError

Commands = Any  # argparse's private type for sub-parsers


class Parser(argparse.ArgumentParser):
    """Complains in one line, as every other part of the command does."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, and where to read on."""
        raise InputError(f"{message}. See {self.prog} --help.")


def add_command(commands: Commands, name: str, summary: str, examples: str = "") -> Parser:
    """Add a command; every one of them has `--json`."""
    parser: Parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def add_out(parser: Parser) -> None:
    """Add the folder that a command writes."""
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model folder OUT if there is one")
