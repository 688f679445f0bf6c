"""The size a user asks for, in exactly one of four units."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_lowrank.errors import InputError

BUDGETS = ("keep_params", "keep_targets", "target_size", "keep_latency", "rank", "ranks", "bits")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Budget:
    """A validated budget.

    Args:
        kind: `keep_params` (fraction of the whole model's parameters that stay), `keep_targets` (fraction of the
            parameters of the replaced matrices), `target_size` (bytes on disk), `keep_latency` (fraction of the whole
            model's measured latency that stays), `rank`, `ranks` of a tensor method, or `bits` (what a number takes in
            the mean while no rank is cut).
        value: The fraction, the bytes, the rank or the bits; of several ranks the largest.
        ranks: Those of a tensor method, where they and not a size were given.
    """

    kind: str
    value: float
    ranks: tuple[int, ...] | None = None

    @property
    def is_whole_model(self) -> bool:
        """Whether the budget speaks of the whole model rather than of the replaced matrices."""
        return self.kind in ("keep_params", "target_size", "bits")


def make_budget(
    keep_params: float | None = None,
    keep_targets: float | None = None,
    target_size: str | float | None = None,
    keep_latency: float | None = None,
    rank: int | None = None,
    ranks: Sequence[int] | None = None,
    bits: float | None = None,
) -> Budget:
    """The one budget that was given; bits are one where they stand alone.

    Raises:
        InputError: If none or several are given, or the value is out of bounds.
    """
    given = {
        kind: value
        for kind, value in zip(
            BUDGETS, (keep_params, keep_targets, target_size, keep_latency, rank, ranks, bits), strict=True
        )
        if value is not None
    }
    if len(given) > 1:
        given.pop("bits", None)
    if len(given) != 1:
        found = ", ".join(given) or "none"
        raise InputError(f"Exactly one budget is needed out of {', '.join(BUDGETS)}; got {found}.")
    ((kind, value),) = given.items()
    if kind == "target_size":
        return Budget(kind, parse_size(value))  # type: ignore[arg-type]  # ranks are not sizes
    if kind == "bits":
        return Budget(kind, value)  # type: ignore[arg-type]  # checked where options are
    if kind == "ranks":
        return Budget(kind, max(checked := _checked_ranks(value)), checked)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{kind} must be a number, got {value!r}.")
    if kind == "rank":
        if not isinstance(value, int) or value < 1:
            raise InputError(f"rank must be a whole number of at least 1, got {value}.")
    elif not 0 < value <= 1:
        raise InputError(f"{kind} must be a fraction above 0 and at most 1 (what stays, not what goes), got {value}.")
    return Budget(kind, value, (int(value), int(value)) if kind == "rank" else None)


def _checked_ranks(ranks: Any) -> tuple[int, ...]:
    is_sequence = isinstance(ranks, Sequence) and not isinstance(ranks, str) and len(ranks) > 0
    if not is_sequence or any(isinstance(r, bool) or not isinstance(r, int) or r < 1 for r in ranks):
        raise InputError(f"ranks must be whole numbers of at least 1, got {ranks!r}.")
    return tuple(ranks)


def parse_size(size: str | int | float) -> int:
    """Bytes of `"100MB"` (10**6 each), `"95 MiB"` (2**20 each) or a plain number of bytes.

    Raises:
        InputError: If it is not such a size.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMG]?i?B)?\s*", str(size), flags=re.IGNORECASE)
    num_bytes = round(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if num_bytes < 1:
        raise InputError(f'target_size must be a size such as "100MB" or "95MiB", got {size!r}.')
    return num_bytes
