"""Which folder of the package a file of tests states the laws of: the one it imports most from."""

import re
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "hf_lowrank"
FOLDERS = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py")))


def folder_of(path):
    """The folder, None for tests of the package as a whole."""
    imported = re.findall(r"^from hf_lowrank\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    counted = Counter(name for name in imported if name in FOLDERS).most_common(1)
    return counted[0][0] if counted else None
