"""Publishing a compressed model on the Hub: verified first, then everything that belongs to it in one commit."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.files.redaction import config_without_tokens, without_tokens
from hf_lowrank.files.scratch import temporary_folder
from hf_lowrank.hosts.folder_contents import file_digest
from hf_lowrank.hosts.loading import held_compressed_model
from hf_lowrank.options import checked, settle
from hf_lowrank.records.report import CompressionReport
from hf_lowrank.sharing.inspection import saved_report
from hf_lowrank.sharing.push_options import PushOptions
from hf_lowrank.sharing.record import CARD_FILE, card_text, has_own_card
from hf_lowrank.sharing.saving import folder_files, save_folder
from hf_lowrank.sharing.verification import verify

# What the transport of the installed huggingface_hub raises where no answer came.
_TRANSPORT: type[Exception] = HfHubHTTPError.__mro__[1]
_WAITS = (1.0, 2.0, 4.0)  # seconds before the second, third and fourth try
_PULL_REQUEST = re.compile(r"refs/pr/\d+")
_MAIN = "main"
_WEIGHTS = ".safetensors"
_MESSAGE = "Upload compressed model with hf_lowrank"
_REASONS = {
    401: "knows no valid token. Log in with `hf auth login`, or set HF_TOKEN",
    403: "does not let this token write there. Use one with write permission, or open a pull request (create_pr)",
    404: "has no such repository for this token. Check the name, and that the token may see it",
    409: "says that the repository was changed meanwhile. Run it again",
    412: "says that the repository was changed meanwhile. Run it again",
    429: "has had too many requests. Wait, and run it again",
}
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Push:
    """What was published, or would be.

    Args:
        repo_id: With its owner.
        files: Path in the repository -> bytes.
        left_out: What else lies in the folder.
        commit: None after a dry run.
    """

    repo_id: str
    files: dict[str, int]
    left_out: tuple[str, ...]
    commit: CommitInfo | None

    @property
    def url(self) -> str | None:
        """Of the pull request or, without one, of the commit."""
        return None if self.commit is None else self.commit.pr_url or self.commit.commit_url


@checked
def push_to_hub(model: PreTrainedModel | str | Path, repo_id: str, **options: Any) -> Push:
    """Publish a compressed model: weights, shipped code, tokenizer and other side files, and card, in one commit.

    The folder is verified first (see `verify`), and the bytes that were verified are those that are published. Nothing
    is visible until the commit, and a push that was interrupted goes on when it is run again: what is uploaded already
    is not sent twice. Files that a model is not made of are left out, and named.

    Args:
        model: The folder of a saved compressed model, or such a model in memory.
        repo_id: `owner/name`, or a name under the account of the token; made if it does not exist.
        options: Those of `PushOptions`: `private`, `revision`, `create_pr`, `commit_message`, `token`, `dry_run`,
            `include` and `trust_remote_code`.

    Raises:
        InputError: If the model does not pass `verify`, or the Hub refuses or cannot be reached: one line that says
            why, without any token.
    """
    told = settle(PushOptions, options, "push")
    _check(repo_id, told)
    if not isinstance(model, (str, Path)):
        model = held_compressed_model(model, "push")
    with _folder_of(model) as folder:
        report = saved_report(folder)  # complains where there is none
        files, left_out = folder_files(folder, told.include)
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if told.dry_run:
            return Push(repo_id, sizes, tuple(left_out), None)
        digests = {name: file_digest(path) for name, path in files.items()}
        verification = verify(folder, model if isinstance(model, PreTrainedModel) else None, told.trust_remote_code)
        if not verification.ok:
            raise InputError(f"{folder.name} is not pushed, because it does not pass `verify`: {verification.message}")
        with _errors_in_one_line(repo_id, told.token):
            api = HfApi(token=told.token)
            repo_id = _patiently(lambda: api.create_repo(repo_id, private=told.private, exist_ok=True)).repo_id
            if told.revision is not None and not _PULL_REQUEST.fullmatch(told.revision):
                _patiently(lambda: api.create_branch(repo_id, branch=str(told.revision), exist_ok=True))
            contents = {name: path if name.endswith(_WEIGHTS) else path.read_bytes() for name, path in files.items()}
            commit = _commit(api, repo_id, contents, digests, _rewritten(folder, repo_id, report), told)
    return Push(repo_id, sizes, tuple(left_out), commit)


def _rewritten(folder: Path, repo_id: str, report: CompressionReport) -> dict[str, bytes]:
    """The files that are published otherwise than they lie there: a card of ours names the repository."""
    found = {} if has_own_card(folder) else {CARD_FILE: card_text(folder, report, repo_id).encode()}
    config = (folder / "config.json").read_text(encoding="utf-8")
    hidden = config_without_tokens(config)
    return found if hidden == config else found | {"config.json": hidden.encode()}


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    tags: list[str] | None = None,
    **options: Any,
) -> CommitInfo | None:
    """`model.push_to_hub` of a compressed model: `push_to_hub` with the host's words.

    Args:
        tags: Put on the card, and kept by the model.
        options: Of `push_to_hub`.

    Raises:
        InputError: As `push_to_hub`; also for `max_shard_size`, which a folder is saved with.
    """
    if "max_shard_size" in options:
        raise InputError("max_shard_size is an option of save_pretrained. Save a folder with it, and push that.")
    if tags:
        model.add_model_tags(tags)
    if commit_description is not None:
        commit_message = f"{commit_message or _MESSAGE}\n\n{commit_description}"
    return push_to_hub(model, repo_id, commit_message=commit_message, **options).commit


def _check(repo_id: str, told: PushOptions) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise InputError(f"{repo_id!r} cannot name a repository: {one_line(error)}") from error
    if told.create_pr and told.revision not in (None, _MAIN):
        given = f"got revision {told.revision!r}"
        raise InputError(f"A pull request is opened against {_MAIN}, {given}. Give one of the two.")


@contextmanager
def _folder_of(model: PreTrainedModel | str | Path) -> Iterator[Path]:
    """The folder, or a temporary one that the model is saved to, with the side files of where it came from."""
    if isinstance(model, (str, Path)):
        if not Path(model).is_dir():
            raise InputError(f"{model} is not a folder. Give the folder of a saved compressed model.")
        yield Path(model)
        return
    with temporary_folder() as scratch:
        source = getattr(model.config, "_name_or_path", "") or None
        yield save_folder(model, scratch / "model", source)


def _commit(
    api: HfApi,
    repo_id: str,
    contents: dict[str, Any],
    digests: dict[str, str],
    rewritten: dict[str, bytes],
    told: PushOptions,
) -> CommitInfo:
    """One commit of all files.

    Args:
        digests: Of each file when it was verified; `rewritten` take the place of some.

    Raises:
        InputError: If a file has changed since it was verified.
    """
    summary, _, description = (told.commit_message or _MESSAGE).partition("\n")

    def once() -> CommitInfo:
        # An operation serves one commit; files that are there already are left out of the next try. Weights are read
        # again for the upload, and the Hub refuses those that are no longer what was hashed here.
        added = {name: CommitOperationAdd(name, content) for name, content in contents.items()}
        for name, one in added.items():
            if one.upload_info.sha256.hex() != digests[name]:
                raise InputError(f"{name} changed while it was verified. Run it again when nobody writes there.")
        added |= {name: CommitOperationAdd(name, content) for name, content in rewritten.items()}
        return api.create_commit(
            repo_id,
            list(added.values()),
            commit_message=summary,
            commit_description=description.strip(),
            revision=told.revision,
            create_pr=told.create_pr,
        )

    # A second try could open a second pull request.
    return once() if told.create_pr else _patiently(once)


def _patiently(call: Callable[[], _Answer]) -> _Answer:
    """The answer to a call that may be repeated, tried again where the Hub is in trouble for the moment."""
    for wait in _WAITS:
        try:
            return call()
        except _TRANSPORT as error:
            status = _status(error)
            is_unreachable = status is None and type(error).__name__ == "ConnectError"
            if is_unreachable or (status is not None and status < 500):
                raise
        time.sleep(wait)
    return call()


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _errors_in_one_line(repo_id: str, token: str | bool | None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one line that says what to do and holds no token."""
    try:
        yield
    except (_TRANSPORT, OSError, ValueError, RuntimeError) as error:
        # An upload's own error is the cause of a general one.
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ is not None else error
        message = f"{repo_id} was not pushed, and nothing was published: {_reason(cause)}"
        raise InputError(without_tokens(message, token)) from None


def _reason(error: BaseException) -> str:
    status, detail = _status(error), one_line(error)
    if isinstance(error, RevisionNotFoundError):
        return f"it has no such revision ({detail})"
    if status is not None and status >= 500:
        return f"the Hub is in trouble (status {status}). Run it again later; what is uploaded is not sent twice."
    if status is not None:
        server = getattr(error, "server_message", None) or detail
        reason = _REASONS.get(status, f"answers with status {status}")
        return f"the Hub {reason}. ({status}: {one_line(Exception(server))})"
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off here (HF_HUB_OFFLINE). Set HF_HUB_OFFLINE=0."
    if isinstance(error, _TRANSPORT):
        return f"the Hub cannot be reached, or the connection broke ({detail}). Run it again."
    return detail
