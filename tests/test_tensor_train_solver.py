"""Laws of tensor trains, in float64."""

import pytest
import torch

from hf_lowrank.errors import InputError
from hf_lowrank.methods.tensor_ranks import ranks_for
from hf_lowrank.methods.trains.tensor_train import cut_spectra, modes, shared_tensor_trains, tensor_train
from hf_lowrank.remote_code.lowrank_tensor_train import factor_shape

SHAPES = [(12, 12), (36, 70), (9, 13), (24, 5), (1, 7)]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def full_ranks(shape):
    first, central, last = (o * i for o, i in zip(factor_shape(shape[0]), factor_shape(shape[1]), strict=True))
    return min(first, central * last), min(last, first * central)


def error(weight, train):
    return float((weight - train.matrix()).norm())


@pytest.mark.parametrize("size", range(1, 400))
def test_factors_hold_the_size_with_little_filling_and_are_alike(size):
    factors = factor_shape(size)
    product = factors[0] * factors[1] * factors[2]

    assert product >= size
    assert product <= 1.5 * size + 5
    assert max(factors) <= 2 * min(factors)


def test_common_sizes_are_not_filled_up():
    assert [factor_shape(size) for size in (384, 768, 3072)] == [(8, 6, 8), (8, 12, 8), (16, 12, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_full_ranks_are_exact(shape):
    weight = draw(*shape)

    torch.testing.assert_close(tensor_train(weight, full_ranks(shape)).matrix(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 4), (4, 3)])
def test_the_squared_error_is_at_most_what_the_cuts_discard(shape, ranks):
    weight = draw(*shape)
    lost = sum(float(s[rank:].square().sum()) for s, rank in zip(cut_spectra(weight), ranks, strict=True))

    train = tensor_train(weight, ranks)

    assert train.ranks == ranks
    assert error(weight, train) ** 2 <= lost + 1e-12


@pytest.mark.parametrize("tolerance", [0.05, 0.3, 0.7])
def test_ranks_for_a_tolerance_keep_it_and_no_smaller_ones_would_by_the_bound(tolerance):
    weight = draw(36, 70) * torch.logspace(0, -3, 70, dtype=torch.float64)
    spectra = cut_spectra(weight)
    ranks = ranks_for(spectra, tolerance)

    assert error(weight, tensor_train(weight, ranks)) <= tolerance * float(weight.norm())
    for values, rank in zip(spectra, ranks, strict=True):
        assert rank == 1 or float(values[rank - 1 :].norm()) > tolerance / 2**0.5 * float(values.norm())


def test_modes_keep_every_number():
    weight = draw(36, 70)

    assert float(modes(weight).norm()) == pytest.approx(float(weight.norm()))
    assert modes(weight).shape == tuple(o * i for o, i in zip(factor_shape(36), factor_shape(70), strict=True))


def test_a_train_fitted_to_inputs_loses_less_of_the_outputs():
    weight = draw(36, 36)
    inputs = draw(200, 36, seed=1) * torch.logspace(0, -2, 36, dtype=torch.float64)
    moment = inputs.T @ inputs / len(inputs)
    plain, fitted = tensor_train(weight, (4, 4)), tensor_train(weight, (4, 4), (None, moment))

    def lost(train):
        return float((inputs @ (weight - train.matrix()).T).norm())

    assert lost(fitted) < 0.85 * lost(plain)
    assert fitted.ranks == plain.ranks


def test_a_metric_of_nothing_does_no_harm():
    weight = draw(36, 36)
    same = tensor_train(weight, (4, 4), (torch.eye(36, dtype=torch.float64), None))

    assert error(weight, same) <= error(weight, tensor_train(weight, (4, 4))) + 1e-12


def test_trains_that_share_a_core_are_found():
    start = tensor_train(draw(36, 36), (3, 4))
    planted = [
        type(start)(draw(*start.first.shape, seed=s), start.central, draw(*start.last.shape, seed=s + 9), (36, 36))
        for s in range(1, 5)
    ]
    weights = [train.matrix() for train in planted]

    found = shared_tensor_trains(weights, (3, 4))

    assert all(torch.equal(train.central, found[0].central) for train in found)
    total = sum(float(w.norm()) ** 2 for w in weights)
    assert sum(error(w, t) ** 2 for w, t in zip(weights, found, strict=True)) < 0.02 * total


def test_a_core_for_one_matrix_is_at_least_as_good_as_its_train():
    weight = draw(36, 36)

    assert (
        error(weight, shared_tensor_trains([weight], (4, 5))[0]) <= error(weight, tensor_train(weight, (4, 5))) + 1e-9
    )


@pytest.mark.parametrize(
    ("ranks", "message"),
    [((0, 1), "left rank must be between 1"), ((1, 99), "right rank must be"), ((1, 2, 3), "are two")],
)
def test_ranks_out_of_bounds_are_named(ranks, message):
    with pytest.raises(InputError, match=message):
        tensor_train(draw(12, 12), ranks)
