"""The record of a saved model: one report beside its weights, and the card that is written from it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.files.redaction import without_tokens_inside
from hf_lowrank.files.scratch import write_text
from hf_lowrank.hosts.config_file import read_config
from hf_lowrank.hosts.folder_contents import update_with_file
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.records.report import CompressionReport
from hf_lowrank.sharing.cards.card import KEPT_LINE, REPORT_FILE, make_card
from hf_lowrank.sharing.cards.metadata import RESULTS_FILE, results_file

CARD_FILE = "README.md"
RECORD_FILES = (REPORT_FILE, CARD_FILE)
_FORMAT_VERSION = 1
# A matrix in the report without its name, and the card with everything else.
_MODULE_BYTES, _OTHER_BYTES = 330, 8000


def write_record(folder: Path, report: CompressionReport, name: str | None = None) -> None:
    """Write a model's report, and from it the card and the evaluation results; a card of the user's stays.

    Args:
        folder: Of the saved model.
        name: What the card calls it; None for the name of the folder.
    """
    stored = {"format_version": _FORMAT_VERSION, **_digests(folder), **report.to_dict()}
    text = json.dumps(without_tokens_inside(stored), ensure_ascii=False)
    card = None if has_own_card(folder) else card_text(folder, report, name or folder.name)
    write_text(folder / REPORT_FILE, text + "\n")
    if card is not None:
        write_text(folder / CARD_FILE, card)
    results = results_file(report.quality)
    if results is None:
        (folder / RESULTS_FILE).unlink(missing_ok=True)
    else:
        write_text(folder / RESULTS_FILE, results)


def read_record(folder: Path) -> CompressionReport | None:
    """The report beside a model's weights; None if there is none, or the weights or the plan have changed since.

    Raises:
        InputError: If it is damaged.
    """
    file = folder / REPORT_FILE
    if not file.is_file():
        return None
    try:
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        report = CompressionReport.from_dict(stored)
    except (RecursionError, OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}: {error}). Remove it, or save again.") from error
    # Earlier versions kept no digest of the plan.
    return report if all(stored.get(name, now) == now for name, now in _digests(folder).items()) else None


def card_text(folder: Path, report: CompressionReport, repo: str) -> str:
    """The card of the model in a folder, with what the user wrote below its last line."""
    file = folder / CARD_FILE
    try:
        written = file.read_text(encoding="utf-8") if file.is_file() else ""
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8, so its notes cannot be kept. Save it as UTF-8.") from error
    try:
        return str(make_card(report, repo, notes=written.partition(KEPT_LINE)[2]))
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise InputError(
            f"What {folder} says of how it was made is damaged ({error!r}). Compress it again."
        ) from error


def has_own_card(folder: Path) -> bool:
    """Whether the folder has a card that this library did not write."""
    file = folder / CARD_FILE
    return file.is_file() and KEPT_LINE.encode() not in file.read_bytes()


def record_bytes(model: PreTrainedModel) -> int:
    """Bytes the record of a model will take, at most."""
    return _OTHER_BYTES + sum(2 * len(matrix.name) + _MODULE_BYTES for matrix in find_matrices(model))


def _digests(folder: Path) -> dict[str, str]:
    """Of the weights and of the plan: what was measured with them says nothing of others."""
    weights = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        update_with_file(weights, path)
    plan = read_config(folder).get("compression")
    built = {name: part for name, part in plan.items() if name != "provenance"} if isinstance(plan, dict) else plan
    text = json.dumps(built, sort_keys=True)
    return {"weights": weights.hexdigest(), "plan": hashlib.sha256(text.encode()).hexdigest()}
