"""What a push can be told."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_lowrank.options import Options, option


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """What `push_to_hub` can be told beside the model and the repository.

    Args:
        private: Make the repository private, if it is made; None leaves it to the account's default.
        revision: Branch to commit to; made if it does not exist.
        create_pr: Open a pull request instead of committing to the main branch.
        commit_message: Its first line is the summary, what follows the description.
        token: As everywhere in huggingface_hub; None takes the one this machine is logged in with.
        dry_run: Only list the files and their sizes; send nothing.
        include: Patterns of more files of the folder to publish, such as `*.md`.
        trust_remote_code: Run code in the folder that this library did not ship, and publish it.
    """

    private: bool | None = None
    revision: str | None = option(None, metavar="BRANCH")
    create_pr: bool = False
    commit_message: str | None = option(None, metavar="TEXT")
    token: str | bool | None = None
    dry_run: bool = False
    include: Sequence[str] = option((), metavar="PATTERN")
    trust_remote_code: bool = False
