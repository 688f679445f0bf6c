"""Access tokens never leave in a text: not in an error, a log, a card or a report."""

import json
import re
from typing import Any

from huggingface_hub import get_token

_TOKEN = re.compile(r"\b(hf|api_org|hf_jwt|hf_oauth)_[A-Za-z0-9_.-]{8,}")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+(?=@)")  # of an address, such as https://user:password@host
_HIDDEN = "***"


def without_tokens(text: str, token: str | bool | None = None) -> str:
    """A text in which everything that is, or looks like, an access token of the Hub is hidden.

    Args:
        token: One more to hide, whatever it looks like; the one this machine is logged in with is always hidden.
    """
    for known in (token, get_token()):
        if isinstance(known, str) and known.strip():
            text = text.replace(known.strip(), _HIDDEN)
    return _CREDENTIALS.sub(_HIDDEN, _TOKEN.sub(rf"\1_{_HIDDEN}", text))


def config_without_tokens(text: str) -> str:
    """A `config.json` whose texts that nothing is built of hold no token: where the model came from and how."""
    config = json.loads(text)
    plan, name = config.get("compression") or {}, config.get("_name_or_path")
    hidden = config | ({} if name is None else {"_name_or_path": without_tokens(str(name))})
    if "provenance" in plan:
        hidden["compression"] = plan | {"provenance": without_tokens_inside(plan["provenance"])}
    return text if hidden == config else json.dumps(hidden, indent=2, sort_keys=True) + "\n"


def without_tokens_inside(value: Any) -> Any:
    """The same for every text inside plain JSON."""
    if isinstance(value, str):
        return without_tokens(value)
    if isinstance(value, dict):
        return {key: without_tokens_inside(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_tokens_inside(item) for item in value]
    return value
