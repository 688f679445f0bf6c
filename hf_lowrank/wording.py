"""How numbers are said, on the terminal and on cards alike."""

from hf_lowrank.evaluation import Latency

# Below this a difference in speed drowns in the noise of two medians.
_WORTH_SAYING = 1.05


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
