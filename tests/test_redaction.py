"""What looks like a token, or is the one of this machine, is in no text that leaves."""

import pytest

from hf_lowrank.files.redaction import without_tokens, without_tokens_inside

TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"refused for {TOKEN}.", "refused for hf_***"),
        (f"https://user:{TOKEN}@hub/x", "https://***@hub/x"),
        ("https://user:pass@hub/x", "https://***@hub/x"),
        ("hf_lowrank compressed hf_x", "hf_lowrank compressed hf_x"),
        ("mail a@b.org about https://hub/x@main", "mail a@b.org about https://hub/x@main"),
    ],
)
def test_what_looks_like_a_token_is_hidden(text, expected):
    assert without_tokens(text) == expected


def test_the_given_token_is_hidden_whatever_it_looks_like():
    assert without_tokens("refused: secret", "secret") == "refused: ***"


def test_the_token_of_this_machine_is_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "company-token")

    assert without_tokens("refused: company-token") == "refused: ***"


def test_every_text_in_a_report_is_looked_at():
    report = {"a": [TOKEN, 1, None], "b": {"c": (TOKEN, True)}}

    assert without_tokens_inside(report) == {"a": ["hf_***", 1, None], "b": {"c": ["hf_***", True]}}
