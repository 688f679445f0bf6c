"""Budgets, targets and plans: what `compress` may spend, where, and that it spends exactly that."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build
from torch import nn

from hf_lowrank import InputError, compress, make_report
from hf_lowrank.hosts.latency import Latency
from hf_lowrank.hosts.matrices import DenseMatrix, JointMatrix
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.planning import accounts, timing
from hf_lowrank.planning.allocation import ALLOCATIONS
from hf_lowrank.planning.budgets import BUDGETS, make_budget, parse_size
from hf_lowrank.planning.curves import make_curve
from hf_lowrank.planning.prices import WeightPrice
from hf_lowrank.remote_code.lowrank_structures import named_structures

KEPT = str(Path(os.environ["HF_HOME"]) / "decompositions")
each_allocation = pytest.mark.parametrize("allocation", ALLOCATIONS)


@pytest.fixture(scope="module")
def medium():
    """A model in which a rank of a layer is less than 0.1 % of all parameters."""
    return build(
        "BertForMaskedLM",
        vocab_size=2000,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
    )


@pytest.fixture(scope="module")
def smaller():
    return build("BertForMaskedLM", vocab_size=400, hidden_size=64, num_attention_heads=4, intermediate_size=128)


def svd(model, **options):
    """Decomposed and measured once, whatever the budget."""
    return compress(model, method="svd", cache_dir=KEPT, **options)


def ranks(model):
    return {name: module.rank for name, module in named_structures(model)}


def saved_bytes(model, folder):
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Budgets


@pytest.mark.parametrize("given", [{}, {"rank": 3, "keep_params": 0.5}, {"keep_targets": 0.5, "target_size": "1MB"}])
def test_exactly_one_budget_is_asked_for(given):
    with pytest.raises(
        InputError, match=rf"Exactly one budget .*{BUDGETS[0]}.*got ({', '.join(sorted(given))}|none|.*)\."
    ):
        make_budget(**given)


@pytest.mark.parametrize("kind", ["keep_params", "keep_targets"])
@pytest.mark.parametrize("value", [0, -0.1, 1.01, 60, float("nan"), "half", True])
def test_a_fraction_is_above_zero_and_at_most_one(kind, value):
    with pytest.raises(InputError, match=rf"{kind} must be a .*got .*{value}"):
        make_budget(**{kind: value})


@pytest.mark.parametrize("value", [0, -3, 1.5, "5", True, float("inf")])
def test_a_rank_is_a_whole_number_of_at_least_one(value):
    with pytest.raises(InputError, match=rf"rank must be a .*got .*{value}"):
        make_budget(rank=value)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("100MB", 10**8),
        ("95 MiB", 95 * 2**20),
        ("1.5gb", 1_500_000_000),
        (".5 kB", 500),
        ("7", 7),
        (12345, 12345),
        ("3B", 3),
    ],
)
def test_a_size_is_bytes(size, expected):
    assert parse_size(size) == make_budget(target_size=size).value == expected


@pytest.mark.parametrize("size", ["", "0", "-1MB", "ten", "10 TB", "1e6", "1.2.3MB", "MB", 0, -5, True])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(InputError, match="target_size must be a size such as"):
        parse_size(size)


# Meeting the budget


@each_allocation
@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.6, 0.75, 0.9, 0.97])
def test_keep_params_is_met_within_half_a_percent_and_never_exceeded(medium, allocation, keep):
    small = svd(medium, keep_params=keep, allocation=allocation)

    kept = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in medium.parameters())

    assert keep * 0.995 <= kept <= keep
    assert make_report(small).kept_fraction == pytest.approx(kept)


@each_allocation
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.8])
def test_keep_targets_is_met_within_half_a_percent_and_never_exceeded(medium, allocation, keep):
    small = svd(medium, keep_targets=keep, allocation=allocation)

    dense = sum(p.numel() for p in medium.parameters())
    targets = sum(matrix.num_weights for matrix in find_matrices(medium) if matrix.role == "block")
    kept = 1 - (dense - sum(p.numel() for p in small.parameters())) / targets
    assert keep * 0.995 <= kept <= keep
    assert make_report(small).kept_targets_fraction == pytest.approx(kept)


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("part", [0.3, 0.7])
def test_target_size_is_what_the_saved_folder_weighs(tmp_path, part, dtype):
    dense = build("BertForMaskedLM", vocab_size=12000, hidden_size=192, num_attention_heads=4, intermediate_size=768)
    asked = int(part * sum(p.numel() for p in dense.parameters()) * (2 if dtype else 4))

    found = saved_bytes(svd(dense, target_size=asked, dtype=dtype), tmp_path)

    assert asked * 0.99 <= found <= asked


@pytest.mark.parametrize(
    "excluded", ["query", "key", "layer.0.output.dense", "layer.1.output.dense", "word_embeddings"]
)
@each_allocation
@pytest.mark.parametrize("kind", ["keep_params", "keep_targets", "target_size"])
def test_a_budget_out_of_reach_says_what_is_reachable_and_that_works(smaller, kind, allocation, excluded):
    options = {"allocation": allocation, "exclude_modules": [excluded]}
    with pytest.raises(InputError, match=rf"{kind}=.* is out of reach: the smallest .* is [\d.]+") as caught:
        svd(smaller, **{kind: 1000 if kind == "target_size" else 1e-4}, **options)
    reachable = str(caught.value).partition("targets is ")[2].split(". ")[0]

    small = svd(smaller, **{kind: reachable if kind == "target_size" else float(reachable)}, **options)

    assert 1 in ranks(small).values()


def test_a_budget_out_of_reach_names_what_it_cannot_reach(medium):
    with pytest.raises(InputError, match=r"It cannot reach bert\.embeddings\.word_embeddings \(\d+%\)"):
        svd(medium, keep_params=0.01, exclude_modules=["word_embeddings"])
    with pytest.raises(InputError, match=r"smallest model with these targets is [\d.]+\. Raise"):
        svd(medium, keep_targets=1e-4)


def test_a_budget_of_everything_leaves_everything_dense(medium):
    small = svd(medium, keep_params=1.0)

    assert named_structures(small) == []
    assert {row.note for row in make_report(small).modules} == {"worth its full size at this budget"}


@each_allocation
def test_the_plan_is_plain_json_that_names_what_was_replaced(medium, allocation):
    plan = svd(medium, keep_params=0.5, allocation=allocation).config.compression

    assert json.loads(json.dumps(plan)) == plan
    assert plan["provenance"].keys() >= {"settings", "kept_dense", "relative_errors", "hf_lowrank"}
    assert plan["modules"].keys() == plan["provenance"]["relative_errors"].keys()


@each_allocation
def test_a_linear_layer_stays_dense_where_it_would_not_shrink(medium, allocation):
    small = svd(medium, keep_params=0.9, allocation=allocation)

    rows = make_report(small).modules
    assert all(row.parameters < row.dense_parameters for row in rows if row.structure != "dense")
    assert all(row.note for row in rows if row.structure == "dense")


def test_a_rank_replaces_only_what_it_makes_clearly_smaller(medium):
    found = ranks(svd(medium, rank=60))

    assert set(found) == {
        f"bert.encoder.layer.{i}.{part}.dense" for i in range(4) for part in ("intermediate", "output")
    }


# Latency

SECONDS_PER_PRODUCT, SECONDS_PER_CALL = 1e-6, 1e-5


@pytest.fixture
def clock(monkeypatch):
    """Every product of a layer costs the same, and every matrix product something more; the rest of a model 0.1 s."""

    def seconds(layer, *_):
        sizes = [p.numel() for p in layer.parameters() if p.dim() > 1]
        return SECONDS_PER_CALL * len(sizes) + SECONDS_PER_PRODUCT * sum(sizes)

    def latency(models, *_):
        (model,) = models.values()
        spent = 0.1 + sum(seconds(matrix.module) for matrix in find_matrices(model) if matrix.role == "block")
        return {"dense": Latency(spent, spent, spent, 1.0)}

    monkeypatch.setattr(timing, "_time_call", seconds)
    monkeypatch.setattr(accounts, "measure_latency", latency)
    return lambda model: latency({"dense": model})["dense"].median, seconds


@pytest.mark.parametrize("fraction", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("storage", ["low_rank", "pivoted"])
def test_a_latency_budget_is_kept_to_by_the_layers_as_timed(clock, medium, fraction, storage):
    latency_of, seconds = clock
    whole = latency_of(medium)

    small = compress(medium, keep_latency=fraction, method="svd", storage=storage)

    names = [matrix.path for matrix in find_matrices(medium) if matrix.role == "block"]
    spent = 0.1 + sum(seconds(small.get_submodule(name)) for name in names)
    assert spent <= fraction * whole * 1.001
    assert spent >= (fraction - 0.03) * whole


def test_a_latency_out_of_reach_says_what_is_reachable(clock, medium):
    with pytest.raises(InputError, match=r"keep_latency=0.01 is out of reach: the smallest .* is 0\.\d+\."):
        compress(medium, keep_latency=0.01, method="svd")


def test_members_of_one_input_pay_for_their_common_product_once(clock):
    members = tuple(
        DenseMatrix(name, name, "block", nn.Linear(64, 64, device="meta"), (64, 64)) for name in ("q", "k", "v")
    )
    cpu = [DenseMatrix("x", "x", "block", nn.Linear(64, 64), (64, 64))]
    times, ranks = timing.LayerTimes(cpu, ["low_rank"]), np.array([8, 16, 32])

    joint = times.of_ranks(JointMatrix("j", "j", members), "joint_low_rank", ranks)
    single = times.of_ranks(members[0], "low_rank", ranks)

    assert np.allclose(single, 2 * SECONDS_PER_CALL + SECONDS_PER_PRODUCT * ranks * 128)
    assert np.allclose(joint, 3 * single * 4 / 6)  # 1 + 3 products instead of 3 + 3
    assert times.of_dense(JointMatrix("j", "j", members)) == 3 * times.of_dense(members[0])


# Allocation


def curves_of(seed, shapes, structure="low_rank"):
    generator = np.random.default_rng(seed)
    curves = []
    for index, shape in enumerate(shapes):
        values = np.sort(generator.gamma(0.5, size=min(shape)))[::-1]
        matrix = DenseMatrix(f"m{index}", f"m{index}", "block", nn.Linear(*shape, device="meta"), shape)
        curves.append(make_curve(matrix, structure, WeightPrice(1), values))
    return curves


def totals(curves, choices):
    pairs = list(zip(curves, choices, strict=True))
    return sum(c.costs[k] for c, k in pairs), sum(c.errors[k] for c, k in pairs)


@given(seed=st.integers(0, 500), fraction=st.floats(0.05, 1.0))
@each_allocation
def test_no_allocation_spends_more_than_the_budget(allocation, seed, fraction):
    curves = curves_of(seed, [(8, 8), (6, 24), (30, 5), (12, 12)])
    least, most = (sum(pick(curve.costs) for curve in curves) for pick in (min, max))
    budget = least + fraction * (most - least)

    choices = ALLOCATIONS[allocation].choose(curves, budget)

    assert totals(curves, choices)[0] <= budget
    assert all(0 <= choice <= curve.dense for choice, curve in zip(choices, curves, strict=True))


@given(seed=st.integers(0, 500), fraction=st.floats(0.05, 0.95))
def test_energy_is_optimal_up_to_one_rank(seed, fraction):
    curves = curves_of(seed, [(8, 8), (6, 12), (10, 5)])
    budget = fraction * sum(curve.dense_cost for curve in curves)
    every = [totals(curves, choices) for choices in itertools.product(*(range(len(c.costs)) for c in curves))]
    affordable = [found for cost, found in every if cost <= budget]
    if not affordable:
        return
    step = max(float(np.diff(curve.costs).max()) for curve in curves)
    best_with_one_rank_less = min((found for cost, found in every if cost <= budget - step), default=np.inf)

    _, found = totals(curves, ALLOCATIONS["energy"].choose(curves, budget))

    assert min(affordable) <= found + 1e-12
    assert found <= best_with_one_rank_less + 1e-12


def test_energy_prefers_the_matrix_that_needs_it():
    model = build("BertModel")
    layers = [layer.intermediate.dense for layer in model.encoder.layer]
    with torch.no_grad():
        layers[0].weight.copy_(torch.randn(70, 2) @ torch.randn(2, 36))

    small = svd(model, keep_targets=0.5)

    assert small.encoder.layer[0].intermediate.dense.rank == 2


def test_uniform_keeps_the_same_fraction_of_every_matrix(medium):
    small = svd(medium, keep_targets=0.5, allocation="uniform")

    rows = make_report(small).modules
    one_rank = max((sum(row.shape) / row.dense_parameters) for row in rows)
    assert all(abs(row.parameters / row.dense_parameters - 0.5) <= one_rank for row in rows)


def test_a_rank_that_is_asked_for_need_not_be_one_of_the_steps():
    dense = build("BertModel", hidden_size=280, num_attention_heads=4, intermediate_size=280)
    rank = int(0.85 * 280 / 2)

    assert rank % 8
    assert set(ranks(compress(dense, rank=rank, method="svd")).values()) == {rank}
