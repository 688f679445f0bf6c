"""The laws of every solver: a new one is tested by its row in `SOLVERS`."""

import itertools

import pytest
import torch
from every_method import SOLVERS
from hypothesis import given
from hypothesis import strategies as st

from hf_lowrank.methods.encoding import ENCODERS, sizes_beside_rank
from hf_lowrank.methods.factors import Factors, balanced
from hf_lowrank.remote_code.lowrank_structures import build_structure
from hf_lowrank.remote_code.lowrank_table import STRUCTURES

SHAPES = [(12, 7), (7, 12), (9, 9), (1, 8), (8, 1), (1, 1), (40, 3), (5000, 6)]
each_solver = pytest.mark.parametrize("name", SOLVERS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


# The one place that knows how a solver is called. Without statistics every solver is the plain best approximation and
# obeys the laws below.
def solve(name, weight, rank):
    return SOLVERS[name].decompose(weight).factors(rank)


def spectrum(name, weight):
    return SOLVERS[name].decompose(weight).singular_values


def error(name, weight, rank):
    return torch.linalg.norm(weight - solve(name, weight, rank).product).item()


def random_matrix(shape, rank=None, dtype=torch.float64):
    rank = rank or min(shape)
    return (torch.randn(shape[0], rank, dtype=dtype) @ torch.randn(rank, shape[1], dtype=dtype)).to(dtype)


def ranks_of(weight):
    return range(1, min(weight.shape) + 1)


@each_shape
@each_solver
def test_error_equals_the_discarded_singular_values(name, shape):
    weight = random_matrix(shape)
    values = torch.linalg.svdvals(weight)

    for rank in ranks_of(weight):
        expected = values[rank:].square().sum().sqrt().item()
        assert error(name, weight, rank) == pytest.approx(expected, rel=1e-9, abs=1e-7 * values[0].item())


@each_shape
@each_solver
def test_singular_values_are_those_of_torch(name, shape):
    weight = random_matrix(shape)

    found, expected = spectrum(name, weight), torch.linalg.svdvals(weight)

    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=1e-7 * float(expected[0]))


@each_shape
@each_solver
def test_error_never_grows_with_rank(name, shape):
    weight = random_matrix(shape)

    errors = [error(name, weight, rank) for rank in ranks_of(weight)]

    slack = 1e-9 * torch.linalg.norm(weight).item()
    assert all(later <= earlier + slack for earlier, later in itertools.pairwise(errors))


@each_shape
@each_solver
def test_full_rank_reproduces_the_matrix(name, shape):
    weight = random_matrix(shape)

    assert torch.allclose(solve(name, weight, min(shape)).product, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 5])
@each_solver
def test_a_matrix_of_a_rank_is_reproduced_at_that_rank(name, rank):
    weight = random_matrix((20, 11), rank)

    assert torch.allclose(solve(name, weight, rank).product, weight, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 999), rows=st.integers(1, 12), columns=st.integers(1, 12), data=st.data())
@each_solver
def test_laws_hold_for_any_shape_and_rank(name, seed, rows, columns, data):
    weight = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rank = data.draw(st.integers(1, min(rows, columns)))

    factors = solve(name, weight, rank)

    discarded = torch.linalg.svdvals(weight)[rank:].square().sum().sqrt().item()
    assert (factors.up.shape, factors.down.shape) == ((rows, rank), (rank, columns))
    assert torch.linalg.norm(weight - factors.product).item() == pytest.approx(discarded, rel=1e-6, abs=1e-6)
    assert torch.linalg.matrix_rank(factors.product) <= rank


@each_shape
@each_solver
def test_the_transpose_is_solved_by_the_transpose(name, shape):
    weight = random_matrix(shape)

    for rank in ranks_of(weight):
        turned = solve(name, weight.T, rank).product.T
        assert torch.allclose(solve(name, weight, rank).product, turned, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("exponent", [-200, -12, -1, 1, 12, 200])
@each_solver
def test_a_scaled_matrix_has_scaled_factors(name, exponent):
    weight, scale = random_matrix((11, 6)), 10.0**exponent

    scaled = solve(name, weight * scale, 3).product / scale

    assert torch.allclose(scaled, solve(name, weight, 3).product, rtol=1e-9, atol=1e-9)
    assert torch.allclose(spectrum(name, weight * scale) / scale, spectrum(name, weight), rtol=1e-9)


@each_shape
@each_solver
def test_column_and_row_of_every_component_are_equally_long(name, shape):
    weight = random_matrix(shape)

    factors = solve(name, weight, min(shape))

    assert torch.allclose(factors.up.norm(dim=0), factors.down.norm(dim=1), rtol=1e-9)


@each_solver
def test_the_same_matrix_gives_the_same_bits(name):
    weight = random_matrix((30, 20))

    first, second = solve(name, weight, 4), solve(name, weight.clone(), 4)

    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)


@each_solver
def test_the_matrix_itself_is_not_changed(name):
    weight = random_matrix((8, 6))
    before = weight.clone()

    solve(name, weight, 3)
    spectrum(name, weight)

    assert torch.equal(weight, before)


ODD_MATRICES = {
    "zero": lambda shape, dtype: torch.zeros(shape, dtype=dtype),
    "ones": lambda shape, dtype: torch.ones(shape, dtype=dtype),
    "one entry": lambda shape, dtype: torch.zeros(shape, dtype=dtype).index_fill_(0, torch.tensor([0]), 3.0),
    "huge": lambda shape, dtype: (torch.randn(shape) * 1e30).to(dtype),
    "smallest": lambda shape, dtype: torch.full(shape, torch.finfo(dtype).smallest_normal, dtype=dtype),
    "tiny": lambda shape, dtype: (torch.randn(shape) * 1e-30).to(dtype),
    "largest": lambda shape, dtype: torch.full(shape, torch.finfo(dtype).max / 1e4, dtype=dtype),
    "huge beside tiny": lambda shape, dtype: torch.randn(shape).mul_(torch.logspace(-30, 30, shape[1])).to(dtype),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ODD_MATRICES)
@each_shape
@each_solver
def test_no_finite_matrix_breaks_it(name, shape, kind, dtype):
    weight = ODD_MATRICES[kind](shape, dtype)

    factors = solve(name, weight, min(shape))

    scale = max(float(weight.double().abs().max()), 1e-300)
    product = factors.up.double() @ factors.down.double()
    assert bool(torch.isfinite(factors.up).all() & torch.isfinite(factors.down).all())
    assert torch.allclose(product / scale, weight.double() / scale, rtol=1e-4, atol=1e-4)
    assert bool(torch.isfinite(spectrum(name, weight)).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@each_solver
def test_narrow_types_are_decomposed_in_a_wide_one(name, dtype):
    weight = random_matrix((20, 13), dtype=torch.float32).to(dtype)
    values = torch.linalg.svdvals(weight.double())

    factors = solve(name, weight, 6)

    assert factors.up.dtype == factors.down.dtype == torch.float32
    found = torch.linalg.norm(weight.double() - factors.product.double()).item()
    assert found == pytest.approx(values[6:].square().sum().sqrt().item(), rel=1e-4)


# Those that hold a pair of factors and nothing else.
@pytest.mark.parametrize(
    "structure",
    [name for name in ENCODERS if STRUCTURES[name].SIZES == ("rank",) and STRUCTURES[name].HOSTS != "experts"],
)
@each_solver
def test_its_factors_are_exactly_the_state_of_the_structure(name, structure):
    hosts = {"linear": torch.nn.Linear(6, 10, bias=False), "embedding": torch.nn.Embedding(10, 6)}
    host = hosts[STRUCTURES[structure].HOSTS].double()
    factors = solve(name, host.weight.detach(), 3)
    state = ENCODERS[structure](factors, None, torch.float64)

    built = build_structure(host, {"structure": structure, "rank": 3, **sizes_beside_rank(state)})
    built.load_state_dict(state, strict=True)

    assert torch.allclose(built.to_dense(), factors.product)


def test_balancing_keeps_the_product_and_leaves_zero_components_usable():
    up, down = torch.randn(5, 3) * 1e3, torch.randn(3, 4) * 1e-3
    down[1] = 0

    factors = balanced(up, down)

    assert torch.allclose(factors.product, Factors(up, down).product, rtol=1e-5)
    assert torch.equal(factors.up[:, 1], up[:, 1])
    assert torch.allclose(factors.up.norm(dim=0)[[0, 2]], factors.down.norm(dim=1)[[0, 2]])
