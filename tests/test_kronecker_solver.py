"""Laws of sums of Kronecker products, in float64."""

import pytest
import torch

from hf_lowrank.errors import InputError
from hf_lowrank.methods.kronecker import kronecker_spectrum, kronecker_sum, rearranged
from hf_lowrank.remote_code.lowrank_kronecker import KroneckerLinear, factor_pairs, largest_kronecker_rank

WHOLE = [(12, 12), (36, 70), (24, 6), (1, 6)]
FILLED = [(13, 11), (7, 36), (5, 1)]


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(shape, rank):
    """A sum of so many products, formed by torch."""
    (o1, o2), (i1, i2) = factor_pairs(*shape)
    products = [torch.kron(draw(o1, i1, seed=seed), draw(o2, i2, seed=~seed)) for seed in range(rank)]
    return sum(products)[: shape[0], : shape[1]]


def error(weight, found):
    return float((weight - found.matrix()).norm())


@pytest.mark.parametrize("size", range(1, 400))
def test_factors_hold_the_size_with_little_filling_and_are_alike(size):
    (large_out, small_out), (small_in, large_in) = factor_pairs(size, size)

    assert (large_out, small_out) == (large_in, small_in)
    assert size <= large_out * small_out <= 1.2 * size + 2
    assert small_out <= large_out <= 2 * small_out


def test_common_sizes_are_not_filled_up_and_both_sides_are_of_one_size():
    assert factor_pairs(768, 3072) == ((32, 24), (48, 64))
    assert factor_pairs(384, 384) == ((24, 16), (16, 24))
    assert KroneckerLinear.num_weights(768, 3072, rank=5) == 5 * 2 * 32 * 48


@pytest.mark.parametrize("shape", WHOLE + FILLED)
def test_the_full_rank_is_exact(shape):
    weight = draw(*shape)
    found = kronecker_sum(weight, largest_kronecker_rank(*shape))

    torch.testing.assert_close(found.matrix(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", WHOLE[:3])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_error_is_the_norm_of_the_discarded_singular_values(shape, rank):
    weight = draw(*shape)
    lost = float(kronecker_spectrum(weight)[rank:].norm())

    found = kronecker_sum(weight, rank)

    assert len(found.left) == len(found.right) == rank
    assert error(weight, found) == pytest.approx(lost, rel=1e-9)


@pytest.mark.parametrize("shape", FILLED[:2])
def test_where_a_size_is_filled_up_the_error_is_at_most_that(shape):
    weight = draw(*shape)

    assert error(weight, kronecker_sum(weight, 2)) <= float(kronecker_spectrum(weight)[2:].norm()) + 1e-12


@pytest.mark.parametrize("shape", WHOLE[:3])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_planted_sum_is_found(shape, rank):
    weight = planted(shape, rank)

    assert float(kronecker_spectrum(weight)[rank:].norm()) < 1e-12 * float(weight.norm())
    assert error(weight, kronecker_sum(weight, rank)) < 1e-12 * float(weight.norm())


def test_rearranging_keeps_every_number():
    assert rearranged(draw(13, 11), *factor_pairs(13, 11)).shape == (15, 12)
    assert float(rearranged(draw(13, 11), *factor_pairs(13, 11)).norm()) == pytest.approx(float(draw(13, 11).norm()))


def test_other_factors_can_be_asked_for():
    weight = torch.kron(draw(3, 5), draw(4, 2, seed=1))

    found = kronecker_sum(weight, 1, ((3, 4), (5, 2)))

    assert (found.left.shape, found.right.shape) == ((1, 3, 5), (1, 4, 2))
    assert error(weight, found) < 1e-12


@pytest.mark.parametrize("rank", [0, 145])
def test_a_rank_out_of_bounds_is_named(rank):
    with pytest.raises(InputError, match=rf"rank must be between 1 and 12 for factors .* got {rank}\."):
        kronecker_sum(draw(12, 12), rank)
