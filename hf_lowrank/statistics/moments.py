"""The statistics of one model on one text: what is kept, in which shapes, and how it is read from its file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from hf_lowrank.errors import InputError
from hf_lowrank.statistics.panels import from_panels

FORMAT = "hf_lowrank statistics 5"


@dataclass(frozen=True)
class MatrixStatistics:
    """What one matrix saw, averaged over the tokens it saw, in float64; None where it was not asked for.

    Args:
        num_tokens: How many those are: of an encoder-decoder those that are read, or those that are written; patches
            of an image, frames of a sound.
        input_moment: `E[x x^T]` of its inputs, (I, I).
        input_mean: `E[x]` of its inputs, (I); there wherever `input_moment` is one of inputs. An embedding table's is
            of gradients and, where a head is tied to it, of that head's inputs, and has none.
        output_moment: `E[g g^T]` of the gradients at its outputs, (O, O).
        fisher: `E[(dL/dW)^2]` per sample, (O, I).
        row_weights: How often each row of an embedding table is used, as a fraction, (V); of an untied head, how much
            the loss feels it, `E[p (1 - p)]` of its token's probability.
        head_weights: What the rows of a tied table carry of `tr(input_moment)` as a head, `E[p (1 - p) ||h||^2]`, (V).
    """

    num_tokens: int
    input_moment: torch.Tensor | None = None
    input_mean: torch.Tensor | None = None
    output_moment: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None
    head_weights: torch.Tensor | None = None

    def to(self, device: torch.device) -> "MatrixStatistics":
        """The same on another device."""
        here: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in here.items() if isinstance(v, torch.Tensor)}
        return MatrixStatistics(**here | moved)


@dataclass(frozen=True)
class Statistics(Mapping[str, MatrixStatistics]):
    """Statistics by matrix name (as in a plan); modules that share an input share its moment and mean.

    They stay in their file: those of a matrix are read each time it is asked for, and held by who asked.

    Args:
        path: A safetensors file of float64 sums over tokens: `"<kind>/<matrix name>"`, and
            `"<kind>/<matrix name>/<first row>"` for each panel of a moment; see `hf_lowrank.statistics.panels`. How
            many tokens they are over is `"count/<matrix name>"`.
        inputs: Matrix name -> name of the matrix under which the moment and mean of their common input are kept.
        fingerprint: What model, text and settings they were made with.
    """

    path: Path
    names: tuple[str, ...]
    inputs: Mapping[str, str]
    fingerprint: str

    def __getitem__(self, name: str) -> MatrixStatistics:
        if name not in self.names:
            raise KeyError(name)
        source = self.inputs.get(name, name)
        with safe_open(self.path, framework="pt") as file:
            if f"routed/{names_of_expert(name)[1]}" in file.keys():  # noqa: SIM118  # no mapping
                return _of_expert(file, name)
            read = _Reader(file, name)
            return MatrixStatistics(
                num_tokens=read.count,
                input_moment=read.moment(f"input_moment/{source}"),
                input_mean=read.mean(f"input_mean/{source}"),
                output_moment=read.moment(f"output_moment/{name}"),
                fisher=read.mean(f"fisher/{name}"),
                row_weights=read.mean(f"row_weights/{name}"),
                head_weights=read.mean(f"head_weights/{name}"),
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def count(self, name: str) -> int:
        """How many tokens one expert saw."""
        with safe_open(self.path, framework="pt") as file:
            return _Reader(file, name).count

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Those in a file that `collect_statistics` wrote.

        Raises:
            InputError: If the file is something else.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} holds no statistics of this library. Collect them again.")
        return cls(
            path=path,
            names=tuple(json.loads(metadata["names"])),
            inputs=json.loads(metadata["inputs"]),
            fingerprint=metadata["fingerprint"],
        )


def make_metadata(names: Sequence[str], inputs: Mapping[str, str], fingerprint: str) -> dict[str, str]:
    """What a file of sums says about itself; see `Statistics`."""
    return {
        "format": FORMAT,
        "names": json.dumps(names),
        "inputs": json.dumps(inputs),
        "fingerprint": fingerprint,
    }


def names_of_expert(name: str) -> tuple[str, str]:
    """The names under which sums of one expert are kept: its own, and that of all the experts it is one of."""
    return name, name.rpartition(".")[0]


def _of_expert(file: Any, name: str) -> MatrixStatistics:
    """Of the tokens one expert saw, each error weighted by their share of all tokens.

    An expert that saw fewer tokens than it has inputs, whose moments would say little, has those of all experts.
    """
    together = names_of_expert(name)[1]
    own, everyone = _Reader(file, name), _Reader(file, together)
    moment, common = own.moment(f"input_moment/{name}"), everyone.moment(f"input_moment/{together}")
    source, read = name, own
    if common is not None and own.count < len(common):
        source, read, moment = together, everyone, common
    share = max(own.count, 1) / int(file.get_tensor(f"routed/{together}"))
    fisher = own.mean(f"fisher/{name}")
    return MatrixStatistics(
        num_tokens=read.count,
        input_moment=None if moment is None else moment * share,
        output_moment=read.moment(f"output_moment/{source}"),
        fisher=None if fisher is None else fisher * share,
    )


class _Reader:
    """Reads the averages of one matrix from an open file of sums."""

    def __init__(self, file: Any, name: str) -> None:
        self._file = file
        self._keys = set(file.keys())
        # A matrix that was never reached has no sums.
        self.count = int(file.get_tensor(f"count/{name}")) if f"count/{name}" in self._keys else 0

    def mean(self, key: str) -> torch.Tensor | None:
        mean: torch.Tensor | None = self._file.get_tensor(key) / max(self.count, 1) if key in self._keys else None
        return mean

    def moment(self, key: str) -> torch.Tensor | None:
        starts = [int(name.rpartition("/")[2]) for name in self._keys if name.rpartition("/")[0] == key]
        panels = {start: self._file.get_tensor(f"{key}/{start}") for start in starts}
        return from_panels(panels).div_(max(self.count, 1)) if panels else None
