"""A compressed model as a runtime's graph should show it: of every matrix one product or two, in float32."""

import copy
from typing import Any

import torch
from torch import nn

from hf_lowrank.methods.encoding import DECODERS, encode_pair
from hf_lowrank.methods.factors import Factors, balanced, truncated
from hf_lowrank.methods.rotation import rotate_
from hf_lowrank.remote_code.lowrank_banded import BandedAutoencoder
from hf_lowrank.remote_code.lowrank_linear import LowRankLinear
from hf_lowrank.remote_code.lowrank_packed import GridTensor, decoded
from hf_lowrank.remote_code.lowrank_structures import named_structures, replace_, structure_name

# Singular values below this part of the largest are rounding of float32.
_ROUNDING = 1e-6
# Structures that are plain products already.
_AS_THEY_ARE = ("low_rank", "joint_low_rank", "low_rank_embedding", "low_rank_experts")


@torch.no_grad()
def plain_copy(model: Any, keeps_rounding: bool = False) -> Any:
    """A copy of a compressed model in memory, float32, whose structures are layers that every runtime knows.

    A linear structure becomes two factors of the rank its weight has, turned so that 8 bits do little to them, or one
    dense matrix where that takes fewer multiply-adds: what several share, or no token changes, is formed here once.
    A token table of one band becomes rows of codes in the order of the tokens, and a product.

    Args:
        keeps_rounding: Take pivoted rows as the second factor they are, whatever that costs in multiply-adds, so that
            rounded numbers stay those that were rounded; and tables as they are stored.
    """
    copied = copy.deepcopy(model).cpu()
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if isinstance(parameter, GridTensor):
                module._parameters[name] = nn.Parameter(decoded(parameter.detach()), requires_grad=False)
    copied = copied.float().eval()
    for name, structure in named_structures(copied):
        if (made := _plain(structure, keeps_rounding)) is not None:
            replace_(copied, name, made)
    if not keeps_rounding:
        rotate_(copied)
    return copied


def _plain(structure: Any, keeps_rounding: bool) -> nn.Module | None:
    """What stands for a structure in a graph; None for the structure itself."""
    name = str(structure_name(structure))
    if name in _AS_THEY_ARE:
        return None
    if structure.HOSTS == "linear":
        return plain_linear(structure, keeps_rounding)
    if isinstance(structure, BandedAutoencoder) and len(structure.bands) == 1 and not keeps_rounding:
        codes: Any = structure.codes[0]
        table = nn.Embedding.from_pretrained(codes.weight[structure.places.long()], padding_idx=structure.padding_idx)
        decoder = nn.Linear(*structure.basis.shape)
        decoder.weight, decoder.bias = nn.Parameter(structure.basis.T.contiguous()), nn.Parameter(structure.offset[0])
        return nn.Sequential(table, decoder)
    return None


def plain_linear(structure: Any, keeps_rounding: bool = False) -> nn.Module:
    """A linear structure as two factors of its weight's rank, or as a dense layer where that is cheaper."""
    bias = structure.dense_bias()
    if decode := DECODERS.get(str(structure_name(structure))):
        found = decode(structure)
        factors: Factors | None = found
        if not keeps_rounding:
            factors = truncated(found.up.double(), found.down.double(), structure.rank)
    else:
        factors = _exact_factors(structure.to_dense().double())
    rows, columns = structure.out_features, structure.in_features
    if factors is None:
        dense = nn.Linear(columns, rows, bias=bias is not None)
        state = {"weight": structure.to_dense().float()} | ({} if bias is None else {"bias": bias})
        dense.load_state_dict(state)
        return dense
    pair = LowRankLinear(columns, rows, factors.down.shape[0], bias=bias is not None)
    pair.load_state_dict(encode_pair(factors, bias, torch.float32))
    return pair


def _exact_factors(weight: torch.Tensor) -> Factors | None:
    """Factors of a matrix of the rank it has; None where they would take as many multiply-adds as the matrix."""
    rows, columns = weight.shape
    vectors, values, others = torch.linalg.svd(weight, full_matrices=False)
    rank = max(1, int((values > _ROUNDING * values[0]).sum()))
    if rank * (rows + columns) >= rows * columns:
        return None
    return balanced(vectors[:, :rank] * values[:rank], others[:rank])
