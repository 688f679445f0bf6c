"""Whether a command keeps its promises, whatever it is given: runs it here, and says which one it broke."""

import io
import os
import resource
import shutil
import signal
import traceback
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path

from hf_lowrank.cli import main

SECONDS = 20  # far more than any case needs
_ROOM = 6 << 30  # bytes of address space more than there were
# What a command may write: the folder OUT that stands third, files of the folder PATH, what these options name.
_WITH_OUT = ("compress", "decompress", "recover", "lpaf")
_WRITES_INTO = {"card": ("README.md", "compression_report.json"), "evaluate": ("README.md", "compression_report.json")}
_OTHER_OUTPUTS = ("--cache-dir", "--work-dir", "--plot")


class NoEnd(BaseException):
    """A command ran for too long; no handler of errors holds it up."""


@contextmanager
def _bounded():
    """Time and memory end before the machine's do."""

    def stop(*_):
        raise NoEnd

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    handler = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM, before[1]))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def contents(folder):
    """Path -> when and how long each file was written; a command that writes the same again has written."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def complaint(argv, folder):
    """What is wrong with how a command, run in a folder, ended; None where all is as promised."""
    before, here = contents(folder), Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with _bounded(), redirect_stdout(out), redirect_stderr(err):
            status = main(argv)
    except NoEnd as error:
        return f"no end after {SECONDS} s: {_where(error)}"
    except BaseException as error:
        return f"traceback: {type(error).__name__} at {_where(error)}: {str(error)[:200]}"
    finally:
        os.chdir(here)
    return _broken(argv, status, err.getvalue(), before, contents(folder))


def _where(error):
    ours = [f for f in traceback.extract_tb(error.__traceback__) if "hf_lowrank/" in f.filename]
    return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[:-4:-1])


def _broken(argv, status, err, before, after):
    said = err.splitlines()
    if status == 1 and "a fault of hf-lowrank" in err:
        return f"a fault was told: {said[-1]}"
    if status not in (0, 1, 2):
        return f"exit status {status}"
    if status == 2 and (len(said) != 1 or not said[0].startswith("hf-lowrank: ") or not said[0][12:].strip()):
        return f"{len(said)} lines for bad input: {err[:300]!r}"
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    odd = sorted(name for name in changed if not _may_write(argv, status, name))
    return f"exit {status}, and written or removed: {odd[:5]}" if odd else None


def _may_write(argv, status, name):
    if status == 0 and argv[0] in _WITH_OUT and name.startswith(f"{Path(argv[2])}/"):
        return True
    if status == 0 and argv[0] == "export" and Path(name).parent.name in ("onnx", "openvino"):
        return True
    if status == 0 and name in {f"{Path(argv[1])}/{file}" for file in _WRITES_INTO.get(argv[0], ())}:
        return True
    named = {value for option, value in pairwise(argv) if option in _OTHER_OUTPUTS}
    return any(name == value or name.startswith(f"{Path(value)}/") or value in ("", " ") for value in named)


def remove(folder):
    """Delete a case's folder."""
    shutil.rmtree(folder, ignore_errors=True)
