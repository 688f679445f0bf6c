"""What the model says of itself that a compressed one came from. What it does not say stays unknown."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from yaml import YAMLError

from hf_lowrank.files.redaction import without_tokens

# A snapshot in the Hub's cache, whose path tells which model it is.
_CACHED = re.compile(r"models--(?P<id>[^/]+)/snapshots/(?P<revision>\w+)$")


@dataclass(frozen=True)
class Origin:
    """The dense model, from its name and its card.

    Args:
        name: What to call it: its Hub id, or the name of its folder.
        base_model: Hub id of the model itself or, for a folder, of what its card says it came from.
        is_base: Whether `base_model` is the model itself.
        revision: Commit on the Hub.
        license: As the card gives it; `license_name` and `license_link` where that is `other`.
    """

    name: str = ""
    base_model: str | None = None
    is_base: bool = False
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    pipeline_tag: str | None = None
    library_name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {**asdict(self), "language": list(self.language)}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Origin":
        """The origin that `to_dict` gave; nothing gives one of which nothing is known."""
        return cls(**{**stored, "language": tuple(stored.get("language", ()))})


def find_origin(source: str, revision: str | None = None) -> Origin:
    """What can be known of the model at a folder or Hub id; only its name, where its card cannot be had.

    Args:
        source: Empty for a model that was built in memory.
        revision: Commit it was loaded at.
    """
    if not source:
        return Origin()
    card = _card_data(source)
    cached = _CACHED.search(Path(source).as_posix())
    if cached is not None:
        source, revision = cached["id"].replace("--", "/"), cached["revision"]
    is_base = cached is not None or not Path(source).is_dir()
    said = card.get("base_model")
    return Origin(
        name=without_tokens(source if is_base else Path(source).resolve().name),
        base_model=source if is_base else said if isinstance(said, str) else None,
        is_base=is_base,
        revision=revision if is_base else None,
        language=_words(card.get("language")),
        **{name: _word(card.get(name)) for name in _TEXTS},
    )


_TEXTS = ("license", "license_name", "license_link", "pipeline_tag", "library_name")


def _card_data(source: str) -> dict[str, Any]:
    card = Path(source) / "README.md"
    if Path(source).is_dir() and not card.is_file():
        return {}
    try:
        loaded = ModelCard.load(card if card.is_file() else source, ignore_metadata_errors=True)
    except (OSError, ValueError, HFValidationError, YAMLError):
        return {}  # out of reach, none there, or not to be read
    return dict(loaded.data.to_dict())


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _words(value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return tuple(word for word in listed if isinstance(word, str))
