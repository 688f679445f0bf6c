"""What compressing a model block by block will take on this machine, before it is begun; see docs/scale.md."""

import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hf_lowrank.errors import InputError, Note
from hf_lowrank.files.processes import rank_and_count
from hf_lowrank.hosts.blocks import block_name
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.hosts.targets import BLOCK_ROLES
from hf_lowrank.records.wording import megabytes
from hf_lowrank.statistics.collection import needs_gradients
from hf_lowrank.statistics.staged import StagedEvidence

_SIZE = 512  # of the matrices of the timed sample
_LIBRARIES = 500_000_000  # bytes
_NARROW, _WIDE = 4, 8  # bytes of a number in float32 and float64
# A joint decomposition of matrices of one input is kept beside their own.
_JOINT = 2
# Of a gradient run, products by the weights of a block: two forward, one back.
_PRODUCTS = 3


@dataclass(frozen=True)
class Cost:
    """What a run is expected to take.

    Args:
        seconds: Of this machine as it is now.
        memory: Bytes at the peak.
        disk: Bytes of hidden states, moments and decompositions at the peak, and of what is made.
    """

    seconds: float
    memory: int
    disk: int


def expected_cost(evidence: StagedEvidence) -> Cost:
    """The cost of a run, from its sizes and two small timed samples.

    With `P` weights in `n` blocks, `T` tokens of `D` numbers, and matrices (O, I): products take `6 P T` operations
    and moments `(O^2 + I^2) T` each; a decomposition takes the time of that of 512 x 512 times `(min(O, I) / 512)^3`
    and, for its metrics, `O^3 + I^3` operations. Hidden states of all blocks are on disk at once, `4 n T D` bytes, the
    moments of one block three times, `4 (O^2 + I^2)` bytes each, and all decompositions, `4 min(O, I) (O + I)` each.
    """
    shapes = [part.shape for matrix in evidence.matrices for part in matrix.parts]
    blocks: dict[str, list[DenseMatrix]] = {}
    for matrix in evidence.matrices:
        if matrix.role in BLOCK_ROLES:
            blocks.setdefault(block_name(matrix.path), []).append(matrix)
    moments = [_moments([p.shape for m in members for p in m.parts]) for members in blocks.values()] or [0]
    decompositions = _JOINT * sum(_NARROW * min(shape) * sum(shape) for shape in shapes)
    largest = max((max(matrix.shape) for members in blocks.values() for matrix in members), default=0)
    weights = max((sum(m.num_weights for m in members) for members in blocks.values()), default=0)
    table = max((matrix.num_weights for matrix in evidence.matrices), default=0)
    memory = _LIBRARIES + max(_NARROW * weights + 3 * _WIDE * largest**2, 3 * _NARROW * table)
    seconds, disk = _decomposing_seconds(shapes), decompositions
    if evidence.kinds:
        tokens = sum(next(iter(batch.values())).shape[:2].numel() for batch in evidence.stages.batches)
        width = min(evidence.matrices[0].shape)
        kept = len(blocks) if needs_gradients(evidence.kinds) else 2
        disk += _NARROW * kept * tokens * width + 3 * _NARROW * max(moments)
        work = 2 * _PRODUCTS * sum(o * i for o, i in shapes) * tokens + sum(moments) * tokens
        metrics = _JOINT * sum(o**3 + i**3 for o, i in shapes) * _WIDE / _NARROW
        seconds += (work + metrics) / _operations_a_second()
    return Cost(seconds, memory, disk)


def announce(evidence: StagedEvidence) -> None:
    """Say what a run is expected to take, once for all processes.

    Raises:
        InputError: If the disk has no room for it.
    """
    cost, folder = expected_cost(evidence), evidence.folder
    free = shutil.disk_usage(folder).free
    if cost.disk > free:
        raise InputError(
            f"Compressing block by block needs {megabytes(cost.disk)} on disk, and {folder} has {megabytes(free)}. "
            "Give a cache_dir elsewhere."
        )
    minutes = f"{cost.seconds / 60:.0f} minutes" if cost.seconds >= 90 else f"{cost.seconds:.0f} seconds"
    where = f"{megabytes(cost.disk)} on disk in {folder} ({megabytes(free)} free)"
    if rank_and_count()[0]:
        return
    warnings.warn(
        Note(f"block by block, in about {minutes}, {megabytes(cost.memory)} of memory and {where}"), stacklevel=2
    )


def _moments(shapes: Sequence[tuple[int, int]]) -> int:
    return sum(o * o + i * i for o, i in shapes)


def _decomposing_seconds(shapes: Sequence[tuple[int, int]]) -> float:
    sample = torch.arange(_SIZE**2, dtype=torch.float64).sin().view(_SIZE, _SIZE)
    unit = _seconds_of(lambda: torch.linalg.eigh(sample + sample.T))
    return _JOINT * unit * sum((min(shape) / _SIZE) ** 3 for shape in shapes)


def _operations_a_second() -> float:
    sample = torch.ones(_SIZE, _SIZE)
    return 2 * _SIZE**3 / _seconds_of(lambda: sample @ sample)


def _seconds_of(work: Callable[[], object]) -> float:
    work()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
