"""How long a forward pass takes, dense and compressed, for the record."""

from dataclasses import dataclass
from typing import Any

from hf_lowrank.hosts.latency import Latency, measure_latency, typical_length
from hf_lowrank.records.machine import machine_name


@dataclass(frozen=True)
class LatencyReport:
    """How long one forward pass took, both models measured side by side.

    Args:
        machine: What it was measured on.
    """

    batch_size: int
    sequence_length: int
    machine: str
    dense: Latency
    compressed: Latency

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "LatencyReport":
        """The report that `dataclasses.asdict` gave."""
        return cls(**{**stored, **{name: Latency(**stored[name]) for name in ("dense", "compressed")}})


def compare_latency(dense: Any, compressed: Any, batch_size: int = 8) -> LatencyReport:
    """Time two models against each other on this machine."""
    shape = (batch_size, typical_length(dense))
    times = measure_latency({"dense": dense, "compressed": compressed}, *shape)
    return LatencyReport(*shape, machine_name(dense.device), times["dense"], times["compressed"])
