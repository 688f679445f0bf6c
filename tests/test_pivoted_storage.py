"""Pivoted storage is lossless, smaller than two factors, and its numbers stay small."""

import copy

import pytest
import torch
from tiny_models import build

from hf_lowrank import InputError, compress, decompress
from hf_lowrank.compression.conversion import as_two_factors, convert_storage_
from hf_lowrank.methods.encoding import DECODERS, ENCODERS, sizes_beside_rank
from hf_lowrank.methods.factors import Factors
from hf_lowrank.remote_code.lowrank_pivoted import PivotedLinear

SHAPES = [(12, 7, 3), (7, 12, 3), (9, 9, 1), (40, 9, 9), (9, 40, 9), (5, 5, 4)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}


def factors_of(shape):
    rows, columns, rank = shape
    return Factors(torch.randn(rows, rank).double(), torch.randn(rank, columns).double())


def dependent_at_first():
    """Factors whose first rows cannot all be kept."""
    factors = factors_of((90, 80, 40))
    factors.up[3] = factors.up[7]
    return factors


def stored(factors, dtype, bias=None):
    rank, columns = factors.down.shape
    state = ENCODERS["pivoted"](factors, bias, dtype)
    shape = (columns, len(factors.up), rank, bias is not None)
    layer = PivotedLinear(*shape, dtype=dtype, **sizes_beside_rank(state))
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@each_shape
def test_it_reproduces_its_matrix(shape, dtype):
    factors = factors_of(shape)

    found = stored(factors, dtype).to_dense().double()

    assert torch.norm(found - factors.product) <= EXACT[dtype] * torch.norm(factors.product)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 8), (torch.float32, 8), (torch.bfloat16, 2)], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (90, 80, 40), (200, 60, 50)], ids=str)
def test_no_coefficient_is_large(shape, dtype, bound):
    coefficients = ENCODERS["pivoted"](factors_of(shape), None, dtype)["coefficients.weight"]

    assert not coefficients.numel() or coefficients.abs().max() <= bound * (1 + 1e-2)


def test_only_exchanged_rows_are_not_among_the_first():
    factors = dependent_at_first()
    state = ENCODERS["pivoted"](factors, None, torch.float64)

    stay = [row for row in range(40) if row not in state["moved_from"]]

    assert 0 < len(state["moved_from"]) < 40
    assert torch.equal(state["moved_from"].sort().values, state["moved_to"].sort().values)
    assert torch.allclose(state["pivots.weight"][stay], factors.product[stay], atol=1e-10)


def test_well_chosen_first_rows_move_nothing():
    factors = Factors(torch.cat([torch.eye(4), torch.randn(6, 4)]).double(), torch.randn(4, 8).double())

    assert set(ENCODERS["pivoted"](factors, None, torch.float64)) == {"pivots.weight", "coefficients.weight"}


@pytest.mark.parametrize(
    "spoil", [lambda up: up[:20].zero_(), lambda up: up[:20].copy_(up[20:40])], ids=["zero", "twice"]
)
def test_first_rows_that_span_too_little_are_exchanged(spoil):
    factors = factors_of((60, 40, 30))
    spoil(factors.up)

    layer = stored(factors, torch.float64)

    assert torch.allclose(layer.to_dense(), factors.product, atol=1e-10)
    assert layer.moved


def exchanging_layer(bias=True, dtype=torch.float32):
    return stored(dependent_at_first(), dtype, torch.randn(90).double() if bias else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(80,), (5, 80), (2, 3, 80), (0, 80)], ids=str)
def test_with_and_without_gradients_it_is_one_function(shape, bias, dtype):
    layer, inputs = exchanging_layer(bias, dtype), torch.randn(shape, dtype=dtype)

    with_gradient = layer(inputs)
    with torch.no_grad():
        without = layer(inputs)

    assert with_gradient.requires_grad
    assert not without.requires_grad
    assert with_gradient.shape == without.shape
    assert torch.allclose(with_gradient, without, rtol=EXACT.get(dtype, 0.05), atol=EXACT.get(dtype, 0.05) * 20)


def test_gradients_are_those_of_the_dense_layer():
    layer = exchanging_layer(dtype=torch.float64)
    inputs = torch.randn(5, 80, dtype=torch.float64)

    assert torch.autograd.gradcheck(layer, inputs.requires_grad_())


def test_hooks_of_its_parts_run_without_gradients_too():
    layer, seen = exchanging_layer(), []
    layer.pivots.register_forward_hook(lambda *_: seen.append("after"))
    layer.coefficients.register_forward_pre_hook(lambda *_: seen.append("before"))

    with torch.no_grad():
        layer(torch.randn(3, 80))

    assert seen == ["after", "before"]


def test_a_part_that_is_replaced_is_called_without_gradients_too():
    layer = exchanging_layer()
    layer.coefficients = torch.nn.Sequential(layer.coefficients, torch.nn.ReLU())

    with torch.no_grad():
        output = layer(torch.randn(30, 80))

    assert (output < 0).any(dim=0).sum() <= 40


def test_autocast_reaches_it_without_gradients_too():
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert exchanging_layer()(torch.randn(3, 80)).dtype == torch.bfloat16


def test_more_moved_outputs_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"moved must be between 0 and 7 .*got 8"):
        PivotedLinear(5, 7, 3, moved=8)


@each_shape
def test_decoding_gives_the_matrix_back(shape):
    factors = factors_of(shape)

    decoded = DECODERS["pivoted"](stored(factors, torch.float64))

    assert torch.allclose(decoded.product, factors.product, atol=1e-10)


def test_coefficients_are_fitted_to_the_rounded_rows():
    factors = factors_of((60, 40, 20))
    exact, state = (ENCODERS["pivoted"](factors, None, dtype) for dtype in (torch.float64, torch.bfloat16))

    rows = state["pivots.weight"].double()
    places = torch.arange(60)
    places[state["moved_from"]] = state["moved_to"]
    others = factors.product[places[20:]]
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


@pytest.mark.parametrize("storage", ["low_rank", "pivoted"])
def test_trained_as_orthogonal_factors_it_is_stored_as_before(storage):
    small = compress(build("BertModel"), keep_targets=0.6, method="two_sided_svd", storage=storage).eval()
    kept, trained = "encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"
    before, first = small.get_submodule(kept), small.get_submodule(trained)

    with as_two_factors(small):
        assert {spec["structure"] for spec in small.config.plan["modules"].values()} == {"low_rank"}
        pair = small.get_submodule(trained)
        left, right = pair.up.weight.T @ pair.up.weight, pair.down.weight @ pair.down.weight.T
        assert pair.rank == first.rank
        torch.testing.assert_close(left, left.diagonal().diag(), atol=1e-5, rtol=0)
        torch.testing.assert_close(right, left, atol=1e-5, rtol=0)
        torch.testing.assert_close(pair.to_dense(), first.to_dense())
        small.get_submodule(trained).up.weight.data.mul_(2)

    assert small.get_submodule(kept) is before
    assert {spec["structure"] for spec in small.config.plan["modules"].values()} == {storage}
    torch.testing.assert_close(small.get_submodule(trained).to_dense(), 2 * first.to_dense())


def test_an_error_within_a_training_is_the_error_that_is_seen():
    small = compress(build("BertModel"), keep_targets=0.5, method="svd", storage="pivoted")
    name = next(iter(small.config.plan["modules"]))

    def fail_with_a_layer_wrapped():
        with as_two_factors(small):
            small.set_submodule(name, torch.nn.Sequential(small.get_submodule(name)))
            raise KeyError("of the training")

    with pytest.raises(KeyError, match="of the training"):
        fail_with_a_layer_wrapped()

    others = [spec["structure"] for other, spec in small.config.plan["modules"].items() if other != name]
    assert set(others) == {"pivoted"}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [4, 5, 7, 11])
def test_no_memory_is_read_that_was_not_written(rank, dtype, monkeypatch):
    layer = PivotedLinear(16, rank + 13, rank, bias=False, dtype=dtype)
    layer.reset_parameters(std=0.1)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *size: self.new_full(size, float("nan")))

    with torch.no_grad():
        found = layer(torch.randn(64, 16, dtype=dtype))

    assert torch.isfinite(found).all()
