"""The command `hf-lowrank`. Reading its arguments imports neither torch nor transformers; each command does."""

import argparse
import importlib
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hf_lowrank.cli.flags.parser import build_parser
from hf_lowrank.errors import InputError, Note
from hf_lowrank.files.scratch import claimed

FAULT = 1
CHECK_FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
TERMINATED = 143
DEBUG = "HF_LOWRANK_DEBUG"
_LONGEST_LINE = 1000
# What a model, a file or a machine that is too small raises, besides ours: those classes come with libraries that
# `--help` need not import.
_ABOUT_INPUT = {
    "InputError", "OSError", "PlanError", "StrictDataclassError", "SafetensorError", "UnicodeError",
    "MemoryError", "OutOfMemoryError", "RecursionError",
}  # fmt: skip


class _Terminated(KeyboardInterrupt):
    """SIGTERM, by which schedulers and containers end a process: what is unfinished is removed as at an interrupt."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 done, 1 a check failed or a fault of ours was met, 2 bad input (one line on standard error
        says what), 130 interrupted, 143 terminated. With HF_LOWRANK_DEBUG=1 errors keep their traceback.
    """
    try:
        with _ended_by_sigterm():
            given = list(sys.argv[1:] if argv is None else argv)
            _require_folder()
            for one in given:
                _require_text(one)
            arguments = build_parser().parse_args(given)
            arguments.given = given
            return _run(arguments.command, arguments)
    except _Terminated:
        return _complain("terminated; no half-written folder is left.", TERMINATED)
    except KeyboardInterrupt:
        return _complain("interrupted; no half-written folder is left.", INTERRUPTED)
    except (BrokenPipeError, SystemExit) as error:
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise  # of argparse; that of rich says what it met
        # Whoever read the output has enough; without this Python complains again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get(DEBUG) == "1":
            raise
        return _explain(error)


def _require_folder() -> None:
    try:
        Path.cwd()
    except OSError as error:
        raise InputError("The folder this is run in is gone. Change to one that is there.") from error


def _require_text(argument: str) -> None:
    """Refuse an empty argument, which as a path is the current folder, and one that no file of ours can hold."""
    if not argument:
        raise InputError("An argument is empty. Leave it out, or give a value (is a variable of your shell unset?).")
    if "\0" in argument or argument.encode(errors="ignore").decode() != argument:
        encoding = sys.getfilesystemencoding()
        remedy = "Rename what it names" if encoding == "utf-8" else "Set LC_ALL=C.UTF-8, and leave PYTHONUTF8 out"
        raise InputError(f"{argument!r} is not {encoding.upper()} text, as names are here. {remedy}.")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Within, SIGTERM raises; a thread besides the main one cannot ask for that."""

    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _run(command: str, arguments: argparse.Namespace) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Note)
        warnings.showwarning = _show_note
        # The loaders of transformers have their own reports and bars; ours say what there is to say.
        for library in ("transformers.utils.logging", "huggingface_hub.utils.logging"):
            importlib.import_module(library).set_verbosity_error()
        importlib.import_module("transformers.utils.logging").disable_progress_bar()
        importlib.import_module("hf_lowrank.progress").Lines.are_wanted = True
        with _output_of(arguments):
            status = int(importlib.import_module(f"hf_lowrank.cli.{command}").run(arguments))
        if sys.stdout is not None:  # it is closed
            sys.stdout.flush()  # here whoever stopped reading is told of
        return status


@contextmanager
def _output_of(arguments: argparse.Namespace) -> Iterator[None]:
    """Within, the output folder of a command, if it has one, is there to be written by this run and no other."""
    if not hasattr(arguments, "out") or getattr(arguments, "dry_run", False):
        yield
        return
    source = arguments.model if hasattr(arguments, "model") else arguments.path
    importlib.import_module("hf_lowrank.sharing.saving").check_output(arguments.out, arguments.overwrite, source)
    # Of the processes of one launch, the first writes.
    with claimed(Path(arguments.out).resolve()) if os.environ.get("RANK", "0") == "0" else nullcontext():
        yield


def _explain(error: Exception) -> int:
    """One line: what is wrong with the input, or that it is this program that is wrong, and where."""
    names = {base.__name__ for base in type(error).__mro__}
    if names & _ABOUT_INPUT:
        return _complain(str(error) or type(error).__name__, BAD_INPUT)
    where = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(where.filename).name}:{where.lineno}"
    said = f"{type(error).__name__} at {place}: {error}"
    return _complain(f"a fault of hf-lowrank, not of yours: {said} ({DEBUG}=1 shows all of it)", FAULT)


def _show_note(message: Warning | str, *about: object, **more: object) -> None:
    sys.stderr.write(f"hf-lowrank: {message}\n")


def _complain(message: str, status: int) -> int:
    line = " ".join(message.split())
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE * 2 // 3]} [...] {line[-_LONGEST_LINE // 3 :]}"
    sys.stderr.write(f"hf-lowrank: {line}\n")
    return status
