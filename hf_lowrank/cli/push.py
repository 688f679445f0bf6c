"""`hf-lowrank push PATH REPO`."""

import argparse

from hf_lowrank.cli import tables
from hf_lowrank.hub import Push, push_to_hub
from hf_lowrank.wording import megabytes


def run(arguments: argparse.Namespace) -> int:
    """Publish a folder, or list what would be published."""
    push = push_to_hub(
        arguments.path,
        arguments.repo,
        private=True if arguments.private else None,
        revision=arguments.revision,
        create_pr=arguments.create_pr,
        commit_message=arguments.commit_message,
        token=arguments.token,
        dry_run=arguments.dry_run,
    )
    if arguments.json:
        about = {"path": arguments.path, "repo": push.repo_id, "dry_run": arguments.dry_run}
        tables.print_json({**about, "files": push.files, "url": push.url})
        return 0
    _print_files(push)
    if arguments.dry_run:
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
