"""Which code in a saved folder is this library's own, of any version: known by its digest, and so safe to run.

`python -m hf_lowrank.sharing.shipped_code` adds the files as they are now, and those of every commit there is, to the
list.
"""

import hashlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hf_lowrank import remote_code
from hf_lowrank.hosts.config_file import read_config

_DIGESTS = Path(__file__).with_name("shipped_code.txt")
_SHIPPED = Path(remote_code.__path__[0])
_TABLE = "lowrank_table.py"
_CLASS = re.compile(r"[^\W\d].*\.\w+")  # in an `auto_map`: `file.Class`


def foreign_code(folder: Path) -> list[str]:
    """What loading a folder would run and this library never shipped: its files, and code it takes from elsewhere."""
    known = {*known_digests(), *shipped_digests()}
    files = sorted(path for path in folder.rglob("*") if path.suffix == ".py" and path.is_file())
    foreign = [path.relative_to(folder).as_posix() for path in files if not _is_known(path, known)]
    configs = [read_config(folder), read_config(folder, "tokenizer_config.json")]
    return foreign + [entry for config in configs for entry in _entries(config.get("auto_map")) if "--" in entry]


def missing_code(folder: Path) -> list[str]:
    """Names of the files that the classes of a folder are named to be in, and that are not there.

    `auto_map` itself is among them where it names no class, or something that cannot be one.
    """
    entries = _entries(read_config(folder).get("auto_map")) or ["nothing"]
    named = {f"{entry.partition('.')[0]}.py" if _CLASS.fullmatch(entry) else "auto_map" for entry in entries}
    return sorted(name for name in named if not (folder / name).is_file())


def _is_known(path: Path, known: set[str]) -> bool:
    whole, *lines = _digests_of(path.name, path.read_bytes())
    return whole in known or (bool(lines) and known.issuperset(lines))


def _digests_of(name: str, content: bytes) -> list[str]:
    """That of a file and, of the table of structures, of each line: a plan's own has some of them."""
    parts = [content, *(b"line " + line for line in (content.splitlines() if name == _TABLE else []))]
    return [hashlib.sha256(part).hexdigest() for part in parts]


def _entries(value: object) -> list[str]:
    """The texts in an `auto_map`, which holds names and lists of names."""
    if isinstance(value, dict):
        value = list(value.values())
    return [text for one in value for text in _entries(one)] if isinstance(value, list) else [str(value)]


def shipped_digests() -> set[str]:
    """Of the code that this version ships."""
    files = [_digests_of(path.name, path.read_bytes()) for path in _SHIPPED.glob("*.py")]
    return {digest for digests in files for digest in digests}


def known_digests() -> list[str]:
    """SHA-256 of every file of code that a version of this library saved with models."""
    return _DIGESTS.read_text(encoding="utf-8").split()


def _committed() -> Iterator[str]:
    """Of the code that each commit ships."""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", *arguments], cwd=_SHIPPED, capture_output=True, check=True).stdout

    for commit in git("log", "--format=%H", "--", ".").decode().split():
        for line in git("ls-tree", commit, "./").decode().splitlines():
            about, _, name = line.partition("\t")
            if name.endswith(".py"):
                yield from _digests_of(name, git("cat-file", "blob", about.split()[2]))


if __name__ == "__main__":
    text = "\n".join(sorted({*known_digests(), *shipped_digests(), *_committed()})) + "\n"
    _DIGESTS.write_text(text, encoding="utf-8")
