"""The rounded numbers of a compressed model, as matrices that a graph can hold."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_lowrank.errors import InputError
from hf_lowrank.remote_code.lowrank_codes import Grid, unpack
from hf_lowrank.remote_code.lowrank_packed import as_matrix, packed_bytes
from hf_lowrank.remote_code.lowrank_pivoted import PivotedLinear


@dataclass(frozen=True)
class StoredGrid:
    """A matrix `rows[i] * codes[i, j] * columns[j]`, (O, I), and these numbers."""

    matrix: NDArray[np.float32]
    codes: NDArray[np.int32]
    rows: NDArray[np.float32]
    columns: NDArray[np.float32]


def stored_grids(model: Any) -> list[StoredGrid]:
    """What the matrices of a model were rounded to; of pivoted rows what the second factor is.

    Raises:
        InputError: If nothing is rounded.
    """
    places = [key.rpartition(".") for key in packed_bytes(model)]
    found: dict[str, tuple[Any, Any]] = {}
    for path, _, name in places:
        module = model.get_submodule(path)
        note = vars(module)["rounded_parameters"][name]
        found[f"{path}.{name}"] = module, (note.content, note.matrix)
    if not found:
        raise InputError("This model's weights are not rounded. Compress with bits or target_size, or choose int8.")
    grids = dict(zip(found, unpack([packed for _, packed in found.values()]), strict=True))
    made = []
    for key, grid in grids.items():
        path, _, name = key.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        holder = model.get_submodule(parent)
        if isinstance(holder, PivotedLinear) and leaf == "coefficients":
            made.append(_below_identity(holder, grid))
        else:
            module = found[key][0]
            made.append(_of(as_matrix(module, getattr(module, name)).detach().cpu().float(), grid))
    return made


def _of(matrix: torch.Tensor, grid: Grid) -> StoredGrid:
    parts = (grid.codes.int(), grid.rows, grid.columns)
    return StoredGrid(matrix.contiguous().numpy(), *(part.numpy() for part in parts))


def _below_identity(pivoted: Any, grid: Grid) -> StoredGrid:
    """The coefficients below an identity, in the rows' order: row `i` of that has the code 1 and the step 1 / c_i."""
    codes = torch.cat([torch.eye(pivoted.rank, dtype=torch.int32), grid.codes.int()])
    rows = torch.cat([1 / grid.columns, grid.rows])
    matrix = torch.cat([torch.eye(pivoted.rank), pivoted.coefficients.weight.detach().cpu().float()])
    ordered = [pivoted.put_in_order_(part, dim=0) for part in (codes, rows, matrix)]
    return _of(ordered[2], Grid(ordered[0], ordered[1], grid.columns))
