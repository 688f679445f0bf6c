"""Folders for what is too large to hold and nobody keeps."""

import shutil
import tempfile
import weakref
from pathlib import Path


def scratch_folder(owner: object) -> Path:
    """A new folder among the system's temporary ones that goes when its owner does, or the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="hf_lowrank-"))
    weakref.finalize(owner, shutil.rmtree, folder)
    return folder
