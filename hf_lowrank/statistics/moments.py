"""The statistics of one model on one text: what is kept, in which shapes, and how it is saved."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_lowrank.errors import InputError

FORMAT = "hf_lowrank statistics 2"


@dataclass(frozen=True)
class MatrixStatistics:
    """What one matrix saw, averaged over tokens, in float64; None where it was not asked for.

    Args:
        num_tokens: How many tokens the averages are over.
        input_moment: `E[x x^T]` of its inputs, (I, I).
        input_mean: `E[x]` of its inputs, (I); there wherever `input_moment` is one of inputs. An embedding table's is
            of gradients, and has none.
        output_moment: `E[g g^T]` of the gradients at its outputs, (O, O).
        fisher: `E[(dL/dW)^2]` per sample, (O, I).
        row_weights: How often each row of an embedding table is used, as a fraction, (V).
    """

    num_tokens: int
    input_moment: torch.Tensor | None = None
    input_mean: torch.Tensor | None = None
    output_moment: torch.Tensor | None = None
    fisher: torch.Tensor | None = None
    row_weights: torch.Tensor | None = None

    def to(self, device: torch.device) -> "MatrixStatistics":
        """The same on another device."""
        here: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: v.to(device) for name, v in here.items() if isinstance(v, torch.Tensor)}
        return MatrixStatistics(**here | moved)


@dataclass
class Statistics(Mapping[str, MatrixStatistics]):
    """Statistics by matrix name (as in a plan); modules that share an input share its moment and mean.

    Args:
        inputs: Matrix name -> name of the matrix under which the moment and mean of their common input are kept.
        tensors: `"<kind>/<matrix name>"` -> tensor.
        fingerprint: What model, text and settings they were made with.
    """

    num_tokens: int
    names: tuple[str, ...]
    inputs: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    fingerprint: str = ""

    def __getitem__(self, name: str) -> MatrixStatistics:
        if name not in self.names:
            raise KeyError(name)
        source = self.inputs.get(name, name)
        return MatrixStatistics(
            num_tokens=self.num_tokens,
            input_moment=self.tensors.get(f"input_moment/{source}"),
            input_mean=self.tensors.get(f"input_mean/{source}"),
            output_moment=self.tensors.get(f"output_moment/{name}"),
            fisher=self.tensors.get(f"fisher/{name}"),
            row_weights=self.tensors.get(f"row_weights/{name}"),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        metadata = {
            "format": FORMAT,
            "num_tokens": str(self.num_tokens),
            "names": json.dumps(self.names),
            "inputs": json.dumps(self.inputs),
            "fingerprint": self.fingerprint,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, partial, metadata)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """Read what `save` wrote.

        Raises:
            InputError: If the file is something else.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise InputError(f"{path} holds no statistics of this library. Collect them again.")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return cls(
            num_tokens=int(metadata["num_tokens"]),
            names=tuple(json.loads(metadata["names"])),
            inputs=json.loads(metadata["inputs"]),
            tensors=tensors,
            fingerprint=metadata["fingerprint"],
        )
