"""The statistics of one model on one text: what is kept, in which shapes, and how it is read from its file."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_lowrank.errors import InputError
from hf_lowrank.files.scratch import write_file
from hf_lowrank.files.tensors import stored_tensors
from hf_lowrank.statistics.panels import from_panels

FORMAT = "hf_lowrank statistics 5"
_MOMENTS = ("input_moment", "output_moment")


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
        paths: Safetensors files of float64 sums over tokens: `"<kind>/<matrix name>"`, and
            `"<kind>/<matrix name>/<first row>"` for each panel of a moment; see `hf_lowrank.statistics.panels`. How
            many tokens they are over is `"count/<matrix name>"`. Sums of one name are parts of one sum.
        inputs: Matrix name -> name of the matrix under which the moment and mean of their common input are kept.
        fingerprint: What model, text and settings they were made with.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    inputs: Mapping[str, str]
    fingerprint: str

    def __getitem__(self, name: str) -> MatrixStatistics:
        if name not in self.names:
            raise KeyError(name)
        source = self.inputs.get(name, name)
        sums = _Sums(self.paths)
        if f"routed/{names_of_expert(name)[1]}" in sums.keys:
            return _of_expert(sums, name)
        read = _Reader(sums, name)
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
        return _Reader(_Sums(self.paths), name).count

    @classmethod
    def load(cls, *paths: Path) -> "Statistics":
        """Those in files that `collect_statistics` wrote, all of one model on one text.

        Raises:
            InputError: If a file is something else.
        """
        names: dict[str, None] = {}
        inputs: dict[str, str] = {}
        for path in paths:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path} holds no statistics of this library. Collect them again.")
            names |= dict.fromkeys(json.loads(metadata["names"]))
            inputs |= json.loads(metadata["inputs"])
        return cls(paths, tuple(names), inputs, metadata["fingerprint"])

    def forget_moments(self) -> None:
        """Remove from the files what decompositions alone are made of, which is nearly all."""
        for path in self.paths:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()
            tensors = stored_tensors(path).items()
            kept = {key: tensor.read() for key, tensor in tensors if key.partition("/")[0] not in _MOMENTS}
            if len(kept) < len(tensors):
                write_file(path, partial(save_file, kept, metadata=about))


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


def _of_expert(sums: "_Sums", name: str) -> MatrixStatistics:
    """Of the tokens one expert saw, each error weighted by their share of all tokens.

    An expert that saw fewer tokens than it has inputs, whose moments would say little, has those of all experts.
    """
    together = names_of_expert(name)[1]
    own, everyone = _Reader(sums, name), _Reader(sums, together)
    moment, common = own.moment(f"input_moment/{name}"), everyone.moment(f"input_moment/{together}")
    source, read = name, own
    if common is not None and own.count < len(common):
        source, read, moment = together, everyone, common
    share = max(own.count, 1) / int(sums.get(f"routed/{together}"))
    fisher = own.mean(f"fisher/{name}")
    return MatrixStatistics(
        num_tokens=read.count,
        input_moment=None if moment is None else moment * share,
        output_moment=read.moment(f"output_moment/{source}"),
        fisher=None if fisher is None else fisher * share,
    )


class _Sums:
    """Files of sums, read as one."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [stored_tensors(path) for path in paths]
        self.keys = set[str]().union(*self._files)

    def get(self, key: str) -> torch.Tensor:
        """The sum of that name, which is the caller's own."""
        first, *others = [file[key].read() for file in self._files if key in file]
        for other in others:
            first += other
        return first


class _Reader:
    """Reads the averages of one matrix."""

    def __init__(self, sums: _Sums, name: str) -> None:
        self._sums = sums
        # A matrix that was never reached has no sums.
        self.count = int(sums.get(f"count/{name}")) if f"count/{name}" in sums.keys else 0

    def mean(self, key: str) -> torch.Tensor | None:
        mean: torch.Tensor | None = self._sums.get(key) / max(self.count, 1) if key in self._sums.keys else None
        return mean

    def moment(self, key: str) -> torch.Tensor | None:
        starts = [int(name.rpartition("/")[2]) for name in self._sums.keys if name.rpartition("/")[0] == key]
        panels = {start: self._sums.get(f"{key}/{start}") for start in starts}
        return from_panels(panels).div_(max(self.count, 1)) if panels else None
