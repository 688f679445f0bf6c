"""Laws of the solvers that look at statistics: they are optimal in the metric they claim, and never break."""

import pytest
import torch
from every_method import SOLVERS

from hf_lowrank.methods.matrix.svd import decompose
from hf_lowrank.methods.metric import FullMetric, identity, moment_metric
from hf_lowrank.statistics.moments import MatrixStatistics

SHAPES = [(9, 6), (6, 9), (7, 7)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def moment(size, rank=None, dtype=torch.float64):
    root = torch.randn(size, rank or size, dtype=dtype)
    return root @ root.T / size


def metric_of(matrix):
    return FullMetric(torch.linalg.cholesky(matrix))


def weighted_error(difference, output_moment, input_moment):
    return torch.trace(output_moment @ difference @ input_moment @ difference.T).item()


@each_shape
def test_identity_moments_give_the_plain_svd(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    eyes = [metric_of(torch.eye(size, dtype=torch.float64)) for size in shape]

    plain, metric = decompose(weight, identity(), identity()), decompose(weight, *eyes)

    assert torch.allclose(plain.factors(3).product, metric.factors(3).product, atol=1e-10)
    assert torch.allclose(plain.singular_values, metric.singular_values)


@each_shape
def test_without_gradients_two_sided_is_whitened(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    statistics = MatrixStatistics(10_000, input_moment=moment(shape[1]))

    products = [SOLVERS[name].decompose(weight, statistics).factors(2).product for name in SOLVERS if "sided" in name]
    products.append(SOLVERS["whitened_svd"].decompose(weight, statistics).factors(2).product)

    assert torch.allclose(products[0], products[1], atol=1e-10)


@each_shape
def test_the_discarded_singular_values_are_the_weighted_error(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    outputs, inputs = moment(shape[0]), moment(shape[1])
    found = decompose(weight, metric_of(outputs), metric_of(inputs))

    for rank in range(1, min(shape) + 1):
        error = weighted_error(weight - found.factors(rank).product, outputs, inputs)
        assert error == pytest.approx(found.singular_values[rank:].square().sum().item(), rel=1e-8, abs=1e-10)


@each_shape
def test_no_other_factors_have_a_smaller_weighted_error(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    outputs, inputs = moment(shape[0]), moment(shape[1])
    best = decompose(weight, metric_of(outputs), metric_of(inputs)).factors(2)
    least = weighted_error(weight - best.product, outputs, inputs)

    up = best.up + 0.3 * torch.randn_like(best.up)
    down = best.down.clone()
    for _ in range(200):  # alternating exact minimization from elsewhere: a brute-force search
        up = torch.linalg.solve(down @ inputs @ down.T, down @ inputs @ weight.T).T
        down = torch.linalg.solve(up.T @ outputs @ up, up.T @ outputs @ weight)

    assert weighted_error(weight - up @ down, outputs, inputs) >= least - 1e-9


@each_shape
def test_full_rank_is_exact_in_any_metric(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    found = decompose(weight, metric_of(moment(shape[0])), metric_of(moment(shape[1])))

    assert torch.allclose(found.factors(min(shape)).product, weight, atol=1e-9)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("num_tokens", [1, 7, 100_000])
def test_singular_moments_never_break_a_solver(rank, num_tokens):
    weight = torch.randn(8, 6)
    statistics = MatrixStatistics(
        num_tokens,
        input_moment=moment(6, rank) if rank else torch.zeros(6, 6).double(),
        output_moment=moment(8, rank) if rank else torch.zeros(8, 8).double(),
        fisher=torch.zeros(8, 6).double(),
    )

    for name in SOLVERS:
        assert torch.isfinite(SOLVERS[name].decompose(weight, statistics).factors(3).product).all()


def test_a_moment_that_is_not_positive_is_repaired():
    broken = torch.diag(torch.tensor([1.0, 1.0, -0.9], dtype=torch.float64))

    metric = moment_metric(broken, num_tokens=10**9, shrinkage=0.0)

    assert torch.isfinite(metric.unroot(torch.eye(3, dtype=torch.float64))).all()


def test_few_tokens_shrink_a_moment_towards_the_identity():
    spread = torch.diag(torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64)

    many, few = (moment_metric(spread, tokens, shrinkage=0.01).congruent(eye) for tokens in (10**6, 1))

    assert few[0, 0] / few[2, 2] < many[0, 0] / many[2, 2]


def test_weighted_svd_keeps_the_rows_the_loss_feels():
    weight = torch.randn(6, 6, dtype=torch.float64)
    fisher = torch.full((6, 6), 1e-6, dtype=torch.float64)
    fisher[:2] = 1.0

    found = SOLVERS["weighted_svd"].decompose(weight, MatrixStatistics(100, fisher=fisher)).factors(2).product

    assert torch.norm(weight[:2] - found[:2]) < 0.2 * torch.norm(weight[2:] - found[2:])


def test_frequent_tokens_keep_their_embeddings_best():
    table = torch.randn(20, 8, dtype=torch.float64)
    usage = torch.full((20,), 1e-3, dtype=torch.float64)
    usage[:3] = 1.0

    found = SOLVERS["whitened_svd"].decompose(table, MatrixStatistics(1000, row_weights=usage)).factors(3).product

    assert torch.norm((table - found)[:3], dim=1).max() < torch.norm((table - found)[3:], dim=1).mean()
