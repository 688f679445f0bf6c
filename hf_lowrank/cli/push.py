"""`hf-lowrank push PATH REPO`."""

import argparse

from hf_lowrank.cli import tables
from hf_lowrank.options import given
from hf_lowrank.records.wording import megabytes
from hf_lowrank.sharing.hub import Push, push_to_hub
from hf_lowrank.sharing.push_options import PushOptions


def run(arguments: argparse.Namespace) -> int:
    """Publish a folder, or list what would be published."""
    push = push_to_hub(arguments.path, arguments.repo, **given(arguments, PushOptions))
    if arguments.json:
        about = {"path": arguments.path, "repo": push.repo_id, "dry_run": push.commit is None}
        tables.print_json({**about, "files": push.files, "left_out": push.left_out, "url": push.url})
        return 0
    _print_files(push)
    if push.commit is None:
        tables.print_line("dry run: nothing was sent, and the folder was not verified")
        return 0
    tables.print_line(f"published: {push.url}")
    tables.print_steps([f"AutoModel.from_pretrained({push.repo_id!r}, trust_remote_code=True)"])
    return 0


def _print_files(push: Push) -> None:
    for name, size in push.files.items():
        tables.print_line(f"{megabytes(size):>10}  {name}")
    total = megabytes(sum(push.files.values()))
    tables.print_line(f"{total:>10}  {len(push.files)} files for {push.repo_id}")
    if push.left_out:
        tables.print_line(f"left out (--include PATTERN takes more): {', '.join(push.left_out)}")
