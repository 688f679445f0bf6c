"""How a command is added to `hf-lowrank`, and what several of them can be told."""

import argparse
import re
from typing import Any, NoReturn

from hf_lowrank.errors import InputError
from hf_lowrank.methods.table import METHOD_NAMES, METHODS
from hf_lowrank.remote_code.lowrank_plan import closest_name

Commands = Any  # argparse's private type for sub-parsers


class Parser(argparse.ArgumentParser):
    """Complains in one line, as every other part of the command does."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong, and where to read on."""
        raise InputError(f"{message}. See {self.prog} --help.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse a flag that there is not; commands are parsed by this too."""
        found, rest = super().parse_known_args(args, namespace)
        if flag := next((word.partition("=")[0] for word in rest if word.startswith("-")), None):
            known = re.findall(r"--[\w-]+", self.format_usage())
            self.error(f"{self.prog} has no {flag}. Closest: {closest_name(flag, known)}")
        return found, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            self.error(f"There is no {action.metavar} {value!r}. Closest: {closest_name(value, action.choices)!r}")


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


def methods_in_words() -> str:
    """What help says of methods: those for use, and the names of all."""
    recommended = [f"  {name:<18}{row.summary}" for name, row in METHODS.items() if row.is_recommended]
    return "\n".join(["\n\nrecommended methods:", *recommended, f"all: {', '.join(METHOD_NAMES)}"])


def add_out(parser: Parser) -> None:
    """Add the folder that a command writes."""
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the model folder OUT if there is one")
