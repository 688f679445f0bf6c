"""Pivoted storage is lossless, smaller than two factors, and its numbers stay small."""

import copy

import pytest
import torch
from tiny_models import build

from hf_lowrank import InputError, compress, decompress
from hf_lowrank.conversion import convert_storage_
from hf_lowrank.remote_code.lowrank_pivoted import PivotedLinear
from hf_lowrank.solvers.factors import Factors
from hf_lowrank.solvers.storage import DECODERS, ENCODERS

SHAPES = [(12, 7, 3), (7, 12, 3), (9, 9, 1), (40, 9, 9), (9, 40, 9), (5, 5, 4)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


def factors_of(shape):
    rows, columns, rank = shape
    return Factors(torch.randn(rows, rank).double(), torch.randn(rank, columns).double())


def stored(factors, dtype, bias=None):
    rank, columns = factors.down.shape
    layer = PivotedLinear(columns, len(factors.up), rank, bias is not None, dtype=dtype)
    layer.load_state_dict(ENCODERS["pivoted"](factors, bias, dtype))
    return layer


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@each_shape
def test_it_reproduces_its_matrix(shape, dtype):
    factors = factors_of(shape)

    found = stored(factors, dtype).to_dense().double()

    assert torch.norm(found - factors.product) <= EXACT[dtype] * torch.norm(factors.product)


@each_shape
def test_no_coefficient_is_much_larger_than_one(shape):
    state = ENCODERS["pivoted"](factors_of(shape), None, torch.float64)

    assert not state["coefficients.weight"].numel() or state["coefficients.weight"].abs().max() <= 1.1 + 1e-9


@each_shape
def test_decoding_gives_the_matrix_back(shape):
    factors = factors_of(shape)

    decoded = DECODERS["pivoted"](stored(factors, torch.float64))

    assert torch.allclose(decoded.product, factors.product, atol=1e-10)


def test_coefficients_are_fitted_to_the_rounded_rows():
    factors = factors_of((60, 40, 20))
    exact, state = (ENCODERS["pivoted"](factors, None, dtype) for dtype in (torch.float64, torch.bfloat16))

    rows = state["pivots.weight"].double()
    others = factors.product[state["order"][20:]]
    fitted, unfitted = state["coefficients.weight"].double(), exact["coefficients.weight"].bfloat16().double()

    assert torch.norm(others - fitted @ rows) < torch.norm(others - unfitted @ rows)


@pytest.mark.parametrize("up_rank", [0, 1, 2])
def test_a_matrix_of_lower_rank_than_it_is_stored_at_is_no_problem(up_rank):
    factors = Factors(
        torch.randn(8, max(up_rank, 1)).double() @ torch.randn(max(up_rank, 1), 4).double() * bool(up_rank),
        torch.randn(4, 6).double(),
    )

    assert torch.allclose(stored(factors, torch.float64).to_dense(), factors.product, atol=1e-9)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_converting_there_and_back_changes_nothing(name):
    small = compress(build(name), keep_params=0.6, method="svd", storage="pivoted").double().eval()
    inputs = torch.arange(3, 15)[None]
    before, shape = small(inputs).logits, copy.deepcopy(small.config.plan["modules"])

    convert_storage_(small, "low_rank")
    assert torch.allclose(small(inputs).logits, before, atol=1e-10)
    assert {spec["structure"] for spec in small.config.plan["modules"].values()} <= {"low_rank", "low_rank_embedding"}

    convert_storage_(small, "pivoted")
    assert torch.allclose(small(inputs).logits, before, atol=1e-10)
    assert small.config.plan["modules"] == shape


def test_it_holds_more_rank_than_two_factors_at_the_same_size():
    dense = build("BertModel")
    ranks = {}
    for storage in ("low_rank", "pivoted"):
        small = compress(dense, keep_targets=0.6, method="svd", allocation="uniform", storage=storage)
        ranks[storage] = min(spec["rank"] for spec in small.config.plan["modules"].values())

    assert ranks["pivoted"] > ranks["low_rank"]


def test_it_decompresses_to_the_weights_it_stands_for():
    small = compress(build("GPT2LMHeadModel"), keep_targets=0.6, method="svd", storage="pivoted").eval()
    inputs = torch.arange(3, 15)[None]

    assert torch.allclose(decompress(small)(inputs).logits, small(inputs).logits, atol=1e-4)


def test_an_unknown_storage_names_those_there_are():
    with pytest.raises(InputError, match="storage must be one of low_rank, pivoted, got 'zip'"):
        convert_storage_(compress(build("BertModel"), keep_targets=0.6, method="svd"), "zip")
