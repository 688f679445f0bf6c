"""Run the tests on other releases than constraints.txt names, in an environment of their own.

    python tests/run_on_releases.py newest                  # what pip finds today
    python tests/run_on_releases.py oldest                  # the lower bounds of pyproject.toml
    python tests/run_on_releases.py newest -- -k reload     # what follows goes to pytest

The environment, build/newest or build/oldest, is made of hard links to this one, in which pip then replaces what
differs. Torch stays what it is here: another one is gigabytes.
"""

import argparse
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf-lowrank"
KEPT = ("torch",)
# Tools are no part of what users have: they stay as they are.
TOOLS = ("griffelib", "hypothesis", "markdown-it-py", "mypy", "pytest", "pytest-xdist", "ruff", "tensorly")


def wanted(which, packages):
    """What pip is to install: for `newest` names, for `oldest` the versions that are stated as lower bounds.

    Args:
        packages: The folder of packages that says what is stated.
    """
    installed = next(iter(importlib.metadata.distributions(name=PACKAGE, path=[str(packages)])))
    requirements = [Requirement(text) for text in installed.requires]
    stated = {
        one.name: next(bound.version for bound in one.specifier if bound.operator == ">=")
        for one in requirements
        if one.name not in (*KEPT, *TOOLS, PACKAGE) and one.specifier
    }
    return sorted(stated if which == "newest" else (f"{name}=={version}" for name, version in stated.items()))


def make_environment(which):
    """Build it, or go on with the one that is there."""
    folder = ROOT / "build" / which
    python = folder / "bin" / "python"
    here = Path(sysconfig.get_path("purelib"))
    there = folder / here.relative_to(Path(sys.prefix))
    if not python.exists():
        venv.create(folder, with_pip=False, symlinks=True)
        shutil.copytree(
            here, there, copy_function=os.link, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    kept = [f"{name}=={importlib.metadata.version(name)}" for name in KEPT]
    subprocess.run([*pip, "--no-deps", "-e", ROOT], check=True)
    subprocess.run([*pip, "--upgrade", *wanted(which, there), *kept], check=True)
    return python


def main():
    """Build, say what is in it, and run the tests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=("newest", "oldest"))
    parser.add_argument("--workers", default="2")
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # argparse loses a rest that follows an option
    arguments = parser.parse_args(sys.argv[1:end])
    python = make_environment(arguments.which)
    subprocess.run([python, "-m", "pip", "list", "--disable-pip-version-check", "--format", "freeze"], check=True)
    spread = ["-n", arguments.workers, "--dist", "loadfile", "--no-loadscope-reorder"]
    tests = [python, "-m", "pytest", "-q", *spread, *sys.argv[end + 1 :]]
    return subprocess.run(tests, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
