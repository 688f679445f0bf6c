"""Laws of the alternating least squares behind `element_weighted_svd`, in float64."""

import itertools

import pytest
import torch
from every_method import SOLVERS
from tiny_models import VOCABULARY, build

from hf_lowrank import compress
from hf_lowrank.methods.factors import Factors
from hf_lowrank.methods.matrix.element_weighted_svd import (
    MOST_SWEEPS,
    TOLERANCE,
    regular_weights,
    sweep,
    weighted_error,
)
from hf_lowrank.statistics.moments import MatrixStatistics

SHAPES = [(12, 8), (8, 12), (9, 9), (1, 5), (5, 1)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def problem(shape, spread=4.0):
    weight = torch.randn(shape, dtype=torch.float64)
    return weight, (spread * torch.randn(shape, dtype=torch.float64)).exp()


def solve(name, weight, fisher, rank):
    return truncations(name, weight, fisher).factors(rank)


def truncations(name, weight, fisher):
    solver, statistics = SOLVERS[name], MatrixStatistics(1000, fisher=fisher)
    return solver.fitted(solver.decompose(weight, statistics), weight, statistics)


@each_shape
def test_no_sweep_ever_raises_the_error(shape):
    weight, fisher = problem(shape)
    rank = max(1, min(shape) // 2)
    factors = Factors(torch.randn(shape[0], rank).double(), torch.randn(rank, shape[1]).double())

    errors = []
    for _ in range(60):
        errors.append(weighted_error(weight, fisher, factors))
        factors = sweep(weight, fisher, factors)

    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))


@each_shape
def test_its_error_is_no_larger_than_that_of_weights_for_rows_alone(shape):
    weight, fisher = problem(shape)

    for rank in range(1, min(shape) + 1):
        rows, entries = (
            weighted_error(weight, regular_weights(fisher), solve(name, weight, fisher, rank))
            for name in ("weighted_svd", "element_weighted_svd")
        )
        assert entries <= rows * (1 + 1e-9) + 1e-18


def test_many_sweeps_end_where_the_gradient_is_zero():
    weight, fisher = problem((10, 7), spread=1.0)
    factors = solve("weighted_svd", weight, fisher, 3)
    for _ in range(3000):
        factors = sweep(weight, regular_weights(fisher), factors)

    slope = regular_weights(fisher) * (weight - factors.product)

    assert (slope @ factors.down.T).abs().max() < 1e-6
    assert (factors.up.T @ slope).abs().max() < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_a_search_from_many_places_finds_nothing_better_on_small_matrices(seed):
    torch.manual_seed(seed)
    weight, fisher = problem((4, 3), spread=0.5)
    factors = solve("element_weighted_svd", weight, fisher, 1)
    for _ in range(300):
        factors = sweep(weight, regular_weights(fisher), factors)
    error = weighted_error(weight, regular_weights(fisher), factors)

    angles = torch.linspace(0, torch.pi, 200, dtype=torch.float64)
    first, second = torch.meshgrid(angles, angles, indexing="ij")
    downs = torch.stack([first.cos(), first.sin() * second.cos(), first.sin() * second.sin()], -1).view(-1, 1, 3)
    # The best `up` of each direction in closed form, entry by entry.
    ups = (regular_weights(fisher) * weight * downs).sum(-1) / (regular_weights(fisher) * downs.square()).sum(
        -1
    )  # (N, 4)
    errors = (regular_weights(fisher) * (weight - ups[..., None] * downs).square()).sum(dim=(1, 2))

    assert error <= float(errors.min()) * (1 + 1e-9)
    assert error == pytest.approx(float(errors.min()), rel=1e-2)


@each_shape
def test_weights_that_are_alike_in_each_row_need_no_sweep(shape):
    weight, fisher = problem(shape)
    fisher = fisher[:, :1].expand(shape).contiguous()
    rank = max(1, min(shape) // 2)

    rows, entries = (solve(name, weight, fisher, rank) for name in ("weighted_svd", "element_weighted_svd"))

    assert torch.allclose(rows.product, entries.product, atol=1e-7)


def test_it_stops_when_a_sweep_gains_less_than_the_tolerance():
    weight, fisher = problem((20, 15))
    found = solve("element_weighted_svd", weight, fisher, 5)
    error = weighted_error(weight, regular_weights(fisher), found)

    start, sweeps = solve("weighted_svd", weight, fisher, 5), 0
    errors = [weighted_error(weight, regular_weights(fisher), start)]
    while len(errors) == 1 or (errors[-1] < (1 - TOLERANCE) * errors[-2] and sweeps < MOST_SWEEPS):
        start, sweeps = sweep(weight, regular_weights(fisher), start), sweeps + 1
        errors.append(weighted_error(weight, regular_weights(fisher), start))

    assert sweeps > 1
    assert error == pytest.approx(errors[-1], rel=1e-9)


@pytest.mark.parametrize("scale", [1e-150, 1e150])
def test_a_scaled_matrix_and_scaled_weights_have_scaled_factors(scale):
    weight, fisher = problem((8, 6))

    plain, large = (solve("element_weighted_svd", weight * k, fisher * k, 3).product for k in (1.0, scale))

    assert torch.allclose(large / scale, plain, rtol=1e-6, atol=1e-9)


def test_no_entry_is_without_weight():
    fisher = torch.zeros(4, 3).double()
    fisher[0, 0] = 12.0

    assert regular_weights(fisher).min() == pytest.approx(0.01)
    assert regular_weights(fisher).mean() == pytest.approx(1)


def test_error_does_not_grow_with_rank_beyond_the_tolerance():
    weight, fisher = problem((9, 6))
    found = truncations("element_weighted_svd", weight, fisher)

    errors = [weighted_error(weight, regular_weights(fisher), found.factors(rank)) for rank in range(1, 7)]

    assert all(later <= earlier * (1 + 1e-3) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] == pytest.approx(0, abs=1e-12)


def test_a_compressed_model_holds_what_was_fitted():
    ids = torch.randint(3, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))
    text = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}] * 3
    options = {"rank": 6, "calibration": text, "refine_passes": 0, "anchored": False}

    rows, entries = (
        compress(build("BertModel"), method=name, **options) for name in ("weighted_svd", "element_weighted_svd")
    )

    layers = [small.encoder.layer[0].intermediate.dense.to_dense() for small in (rows, entries)]
    assert not torch.allclose(*layers, rtol=1e-3)
