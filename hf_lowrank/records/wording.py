"""How numbers are said, on the terminal and on cards alike."""

from collections.abc import Mapping, Sequence
from typing import Any

from hf_lowrank.hosts.latency import Latency

# Below this a difference in speed drowns in the noise of two medians.
_WORTH_SAYING = 1.05
# Of fewer examples the bootstrap's interval is too narrow to be believed.
_FEWEST = 20
# Of running text, the share that rows no text spoke for may make up without a word.
MUCH_LACKING = 0.01


def megabytes(num_bytes: int) -> str:
    """Bytes in the unit of `--target-size`."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 1e5 else f"{num_bytes / 1e3:.1f} KB"


def speed_in_words(compressed: Latency) -> str:
    """How much faster it is, or that it is not."""
    if compressed.speed_up >= _WORTH_SAYING:
        return f"{compressed.speed_up:.2f}x as fast"
    if compressed.speed_up > 1 / _WORTH_SAYING:
        return f"memory only: no faster here ({compressed.speed_up:.2f}x)"
    return f"memory only: slower here ({compressed.speed_up:.2f}x)"


def milliseconds(latency: Latency) -> str:
    """The median of a forward pass."""
    return f"{latency.median * 1e3:.1f} ms"


def share(now: float, before: float) -> str:
    """A fraction in percent; empty where there was nothing before."""
    return f"{now / before:.1%}" if before else ""


def few_tokens_in_words(few: int, shape: Sequence[int]) -> str:
    """How many of the experts (E, O, I) saw too little text, and what that meant; empty where none did."""
    return f"{few} of {shape[0]} experts saw too few tokens: solved for by what all saw" if few else ""


def vocabulary_in_words(seen: Mapping[str, float]) -> str:
    """How much of a vocabulary the text held, and what that means where running text has many others."""
    said = f"{seen['tokens']:,} of {seen['of']:,} tokens seen"
    if seen["lacking"] < MUCH_LACKING:
        return said
    return f"{said}, and {seen['lacking']:.1%} of like text are others: more text would keep those better"


def verdict(scores: Mapping[str, float], higher_is_better: bool) -> str:
    """Whether a model's metric is `better` or `worse` than the dense one's, or `unclear`; empty without an interval.

    Unclear are an interval of the change that holds none at all, and too few examples.
    """
    if "change_low" not in scores:
        return ""
    low, high = scores["change_low"], scores["change_high"]
    if scores["examples"] < _FEWEST or not (low > 0 or high < 0):
        return "unclear"
    return "better" if (low > 0) is higher_is_better else "worse"


def change_in_words(
    scores: Mapping[str, float], dense: Mapping[str, float], metric: str, higher_is_better: bool
) -> str:
    """The change of a metric from the dense model's, its interval and the verdict: `+7.3% (+6.1% to +8.4%), worse`."""
    if metric not in dense:
        return ""
    relative = metric == "perplexity"
    change = scores[metric] / dense[metric] - 1 if relative else scores[metric] - dense[metric]
    if not (said := verdict(scores, higher_is_better)):
        return _signed(change, relative)
    low, high = (_signed(scores[name], relative) for name in ("change_low", "change_high"))
    return f"{_signed(change, relative)} ({low} to {high}), {said}"


def shape_in_words(batch_size: int, sequence_length: int) -> str:
    """What a forward pass was measured on: `8 x 128 tokens`, or `8 images or sounds`, which have no length."""
    return f"{batch_size} x {sequence_length} tokens" if sequence_length else f"{batch_size} images or sounds"


def amount_in_words(text: Mapping[str, Any]) -> str:
    """How much a model was watched on: `1,500 tokens`, or `144 images or sounds`, which have no tokens."""
    tokens = text["num_tokens"]
    return f"{tokens:,} tokens" if tokens else f"{text['num_samples']:,} images or sounds"


def examples_in_words(scores: Mapping[str, float]) -> str:
    """How many examples scores stand on, `1,500 examples`; empty where that was not written down."""
    return f"{scores['examples']:,.0f} examples" if "examples" in scores else ""


def _signed(change: float, is_relative: bool) -> str:
    return f"{change:+.1%}" if is_relative else f"{change:+.4f}"
