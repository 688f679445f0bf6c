"""Matrices of many layers cut into blocks of one shape and stacked: what tensor decompositions work on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix

GROUPS = ("attention", "feed_forward", "both")
INPUT_SIDES = ("left", "right")


@dataclass(frozen=True)
class BlockLayout:
    """How one matrix (O, I) is a grid of blocks (m, n), as Ren et al. (ICLR 2022) orient them.

    With the inputs on the left a block is a piece of `W^T`, with the inputs on the right a piece of `W`. What does not
    fill the last block of a row or column of the grid is filled with zeros, which `join_blocks` drops again.

    Args:
        input_side: `left` or `right`.
        left: Rows of a block, m.
        right: Columns of a block, n.
        shape: `(O, I)`.
    """

    input_side: str
    left: int
    right: int
    shape: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along the left and the right axis."""
        rows, columns = self.shape if self.input_side == "right" else self.shape[::-1]
        return -(-rows // self.left), -(-columns // self.right)

    @property
    def num_blocks(self) -> int:
        """Blocks in all."""
        rows, columns = self.grid
        return rows * columns

    def of_blocks(self, left: int, right: int) -> "BlockLayout":
        """The same grid of blocks of another size, all of them full."""
        rows, columns = self.grid[0] * left, self.grid[1] * right
        shape = (rows, columns) if self.input_side == "right" else (columns, rows)
        return BlockLayout(self.input_side, left, right, shape)


def group_of(matrix: DenseMatrix) -> str:
    """`attention` for a matrix inside a module so called, `feed_forward` for any other of a block."""
    return "attention" if any(word in matrix.name.lower() for word in ("attention", "attn")) else "feed_forward"


def in_group(matrices: Iterable[DenseMatrix], group: str) -> list[DenseMatrix]:
    """The matrices of the repeated blocks that belong to a group.

    Raises:
        InputError: If there is no such group, or nothing in it.
    """
    if group not in GROUPS:
        raise InputError(f"group must be one of {', '.join(GROUPS)}, got {group!r}.")
    found = [m for m in matrices if m.role == "block" and group in ("both", group_of(m))]
    if not found:
        raise InputError(f"No matrix belongs to the group {group!r}. Choose another of {', '.join(GROUPS)}.")
    return found


def by_kind(matrices: Iterable[DenseMatrix]) -> dict[str, list[DenseMatrix]]:
    """The matrices by what they are in their layers, such as `attention_self_query`: alike in name and in shape."""
    groups: dict[tuple[str, tuple[int, int]], list[DenseMatrix]] = {}
    for matrix in matrices:
        parts = matrix.name.split(".")
        layer = next(index for index, part in enumerate(parts) if part.isdigit())
        groups.setdefault(("_".join(parts[layer + 1 :]), matrix.shape), []).append(matrix)
    kinds = [kind for kind, _ in groups]
    return {
        kind if kinds.count(kind) == 1 else f"{kind}_{shape[0]}_{shape[1]}": members
        for (kind, shape), members in groups.items()
    }


def block_layout(matrix: DenseMatrix, width: int) -> BlockLayout:
    """The layout of one matrix in blocks of the model's width squared.

    Attention has its inputs on the left: a fused projection of queries, keys and values is cut in three. Feed-forward
    matrices have the intermediate neurons on the left and the model's axis on the right, whichever of the two is the
    input; their `W` neurons are cut into `ceil(W / width)` pieces, so that any number of them will do.
    """
    outputs_are_wide = matrix.shape[1] == width
    on_right = group_of(matrix) == "feed_forward" and outputs_are_wide
    return BlockLayout("right" if on_right else "left", width, width, matrix.shape)


def cut_blocks(weight: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The blocks of `weight` (O, I), one after the other along the left axis, then the right one, (p, m, n)."""
    turned = weight if layout.input_side == "right" else weight.T
    rows, columns = layout.grid
    missing = rows * layout.left - turned.shape[0], columns * layout.right - turned.shape[1]
    whole = F.pad(turned, (0, missing[1], 0, missing[0]))
    cut = whole.reshape(rows, layout.left, columns, layout.right).transpose(1, 2)
    return cut.reshape(layout.num_blocks, layout.left, layout.right)


def join_blocks(blocks: torch.Tensor, layout: BlockLayout) -> torch.Tensor:
    """The weight (O, I) whose blocks (p, m, n) these are."""
    rows, columns = layout.grid
    whole = blocks.reshape(rows, columns, layout.left, layout.right).transpose(1, 2)
    whole = whole.reshape(rows * layout.left, columns * layout.right)
    turned = whole if layout.input_side == "right" else whole.T
    return turned[: layout.shape[0], : layout.shape[1]]


def stack_blocks(weights: Sequence[torch.Tensor], layouts: Sequence[BlockLayout]) -> torch.Tensor:
    """The blocks of several weights, (B, m, n), in float32 or a wider type; one copy and no more."""
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    total = sum(layout.num_blocks for layout in layouts)
    stack = torch.empty(total, layouts[0].left, layouts[0].right, dtype=dtype, device=weights[0].device)
    start = 0
    for weight, layout in zip(weights, layouts, strict=True):
        stack[start : start + layout.num_blocks] = cut_blocks(weight, layout)
        start += layout.num_blocks
    return stack
