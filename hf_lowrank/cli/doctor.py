"""`hf-lowrank doctor [PATH]`."""

import argparse
from dataclasses import asdict

from hf_lowrank.cli import CHECK_FAILED, tables
from hf_lowrank.studies.doctor import PROBLEM, diagnose


def run(arguments: argparse.Namespace) -> int:
    """Print what was found, one line each, with what to do."""
    findings = diagnose(arguments.path)
    if arguments.json:
        tables.print_json({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            remedy = f"  ->  {finding.remedy}" if finding.remedy else ""
            tables.print_line(f"{finding.verdict:8}{finding.name:14}{finding.found}{remedy}")
    return CHECK_FAILED if any(finding.verdict == PROBLEM for finding in findings) else 0
