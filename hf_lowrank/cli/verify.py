"""`hf-lowrank verify PATH`."""

import argparse
from dataclasses import asdict

from hf_lowrank.cli import CHECK_FAILED, tables
from hf_lowrank.sharing.verification import verify


def run(arguments: argparse.Namespace) -> int:
    """Print what was proved, or what is wrong."""
    verification = verify(arguments.path, trust_remote_code=arguments.trust_remote_code)
    if arguments.json:
        tables.print_json({"path": arguments.path, **asdict(verification)})
    else:
        tables.print_line(f"{'ok' if verification.ok else 'FAILED'}: {verification.message}")
    return 0 if verification.ok else CHECK_FAILED
