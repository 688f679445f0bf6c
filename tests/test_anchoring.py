"""Anchored solves: what they minimize, what they read, and when they are refused."""

import json

import pytest
import torch
from tiny_models import VOCABULARY, assert_same_function, build, inputs_for

from hf_lowrank import InputError, compress
from hf_lowrank.compression import anchoring
from hf_lowrank.compression.anchoring import anchor_
from hf_lowrank.data.calibration import Calibration
from hf_lowrank.hosts.blocks import Walk, calls_in_order, find_blocks, hidden_states, recorded_outputs
from hf_lowrank.hosts.outputs import mean_distance, run
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.matrix.anchored import AnchoredMoments
from hf_lowrank.methods.matrix.svd import decompose
from hf_lowrank.methods.metric import identity, moment_metric, shrinkage_strength

ROWS, COLUMNS, TOKENS, RANK = 7, 5, 40, 3
each_head = pytest.mark.parametrize("head", ["BertModel", "BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"])


def text(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(3, VOCABULARY, (4, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draw]


def calibration():
    batches = text()
    return Calibration(tuple(batches[:-2]), tuple(batches[-2:]))


def problem(drift):
    """A weight, its inputs in the dense and in the compressed model, and a residual term, in float64."""
    weight, inputs = (
        torch.randn(ROWS, COLUMNS, dtype=torch.float64),
        torch.randn(TOKENS, COLUMNS, dtype=torch.float64) + 1,
    )
    return (
        weight,
        inputs,
        inputs + drift * torch.randn(TOKENS, COLUMNS).double(),
        drift * torch.randn(TOKENS, ROWS).double(),
    )


def moments_of(weight, inputs, seen, residual):
    moments = AnchoredMoments(weight)
    missing = (inputs - seen) @ weight.T + residual
    for rows in range(0, TOKENS, 16):  # streamed
        moments.add(seen[rows : rows + 16], missing[rows : rows + 16])
    return moments


def centred(rows, is_centred):
    return rows - rows.mean(dim=0) if is_centred else rows


def objective(approximation, data, is_centred, root):
    """`(1 - a) E||W x + s - W' x^||_G^2 + a m ||W' - W||_G^2` with `G = root root^T`, straight from its definition."""
    weight, inputs, seen, residual = data
    errors = inputs @ weight.T + residual - seen @ approximation.T
    strength = shrinkage_strength(COLUMNS, TOKENS, 0.01)
    scale = centred(seen, is_centred).square().mean()
    fit = (centred(errors, is_centred) @ root).square().sum() / TOKENS
    return (1 - strength) * fit + strength * scale * ((approximation - weight).T @ root).square().sum()


@pytest.mark.parametrize("is_centred", [True, False])
def test_no_other_matrix_of_that_rank_fits_the_dense_outputs_better(is_centred):
    data = problem(drift=0.5)
    gradients = torch.randn(30, ROWS, dtype=torch.float64)
    metric = moment_metric(gradients.T @ gradients / 30, 10**9, 0.1)
    root = metric.root(torch.eye(ROWS, dtype=torch.float64))
    target = moments_of(*data).target(data[0], is_centred)

    found = decompose(target.weight, metric, target.input_metric).factors(RANK)

    plain_metric = moment_metric(data[1].T @ data[1] / TOKENS, TOKENS, 0.01)
    plain = decompose(data[0], metric, plain_metric).factors(RANK)
    best = objective(found.product, data, is_centred, root)
    assert best < objective(plain.product, data, is_centred, root)
    for _ in range(50):
        up, down = (factor + 0.01 * torch.randn_like(factor) for factor in (found.up, found.down))
        assert best < objective(up @ down, data, is_centred, root)


def test_at_full_rank_it_is_the_regularized_least_squares_answer():
    data = problem(drift=0.5)
    target = moments_of(*data).target(data[0], is_centred=True)
    wanted = target.weight.clone().requires_grad_(True)

    objective(wanted, data, True, torch.eye(ROWS, dtype=torch.float64)).backward()

    assert wanted.grad.abs().max() < 1e-12


def test_inputs_that_nothing_has_changed_give_the_dense_weight_back():
    data = problem(drift=0.0)
    target = moments_of(*data).target(data[0], is_centred=True)

    assert torch.equal(target.weight, data[0])
    assert torch.equal(target.missing_mean, torch.zeros(ROWS, dtype=torch.float64))


def test_the_bias_makes_outputs_right_on_average():
    weight, inputs, seen, residual = data = problem(drift=0.5)
    target = moments_of(*data).target(weight, is_centred=True)
    product = decompose(target.weight, identity(), target.input_metric).factors(1).product

    errors = inputs @ weight.T + residual - seen @ product.T - target.bias_change(weight, product)

    assert errors.mean(dim=0).abs().max() < 1e-12


def test_a_matrix_that_never_saw_anything_keeps_its_weight():
    weight = torch.randn(ROWS, COLUMNS, dtype=torch.float64)

    assert torch.equal(AnchoredMoments(weight).target(weight, is_centred=True).weight, weight)


@each_head
def test_a_walk_returns_what_every_block_of_one_run_returns(head):
    model, batches = build(head), text(2)
    blocks = find_blocks(model, find_matrices(model))
    walk = Walk(model, blocks, batches)

    for name in blocks:
        for batch, returned in zip(batches, walk.advance(), strict=True):
            with torch.no_grad(), recorded_outputs(model, [name]) as outputs:
                run(model, batch)
            assert torch.equal(hidden_states(returned), hidden_states(outputs[name]))


def test_a_module_that_runs_twice_is_not_among_the_calls():
    model = build("BertModel")
    attention = model.encoder.layer[1].attention.self
    attention.key = attention.query
    paths = [f"encoder.layer.1.attention.self.{name}" for name in ("value", "query")]

    assert calls_in_order(model, paths, text(1)[0]) == paths[:1]


def euclidean(matrix):
    return identity()


def pairs(dense):
    options = {"method": "svd", "storage": "low_rank", "calibration": text(), "refine_passes": 0}
    return compress(dense, keep_targets=0.3, anchored=False, **options)


def ranks(small):
    return {name: spec.get("rank") for name, spec in small.config.plan["modules"].items()}


def anchored(dense):
    small = pairs(dense)
    return small, anchor_(small, dense, find_matrices(dense), euclidean, calibration())


@each_head
def test_anchoring_brings_the_model_nearer_and_says_where(head):
    dense = build(head)
    before = mean_distance(pairs(dense), dense, calibration().probes)

    small, found = anchored(dense)

    assert found.before == before
    assert found.after == mean_distance(small, dense, calibration().probes)
    assert found.after < before
    assert sorted(found.accepted + found.refused) == find_blocks(dense, find_matrices(dense))
    assert found.accepted


@each_head
def test_a_block_that_takes_errors_back_ends_nearer_than_one_that_does_not(head, monkeypatch):
    dense = build(head)
    monkeypatch.setattr(anchoring, "mean_distance", lambda *args: next(falling))  # accepts everything
    last, errors = find_blocks(dense, find_matrices(dense))[-1], []
    for sums in (anchoring._SUMS, set()):
        falling = iter(range(0, -100, -1))
        monkeypatch.setattr(anchoring, "_SUMS", sums)
        small, _ = anchored(dense)
        errors.append(block_error(small, dense, last))

    assert errors[0] < errors[1]


def block_error(small, dense, name):
    walks = [Walk(model, [name], calibration().batches) for model in (small, dense)]
    returned = [torch.cat([hidden_states(output) for output in walk.advance()]) for walk in walks]
    return float((returned[0] - returned[1]).square().mean())


@each_head
def test_the_stream_is_found_where_a_matrix_writes_into_it_and_nowhere_else(head):
    dense = build(head)
    matrices = [matrix for matrix in find_matrices(dense) if matrix.role == "block"]
    with torch.no_grad(), anchoring._watched(dense, [matrix.path for matrix in matrices]) as watch:
        run(dense, text(1)[0])

    writers = ("output.dense", "c_proj", "o_proj", "down_proj")
    assert set(watch.addends) == {matrix.path for matrix in matrices if matrix.path.endswith(writers)}


def test_factors_that_do_not_help_are_refused_bit_for_bit(monkeypatch):
    dense = build("BertModel")
    before = pairs(dense).state_dict()
    target = AnchoredMoments.target
    monkeypatch.setattr(AnchoredMoments, "target", lambda self, weight, centred: target(self, -3 * weight, centred))

    small, found = anchored(dense)

    assert (found.accepted, found.after) == ([], found.before)
    assert len(found.refused) == 2
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


@pytest.mark.parametrize("storage", ["low_rank", "pivoted"])
def test_compress_anchors_before_it_stores_and_keeps_the_record(storage):
    dense = build("BertForMaskedLM")
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    options = {"keep_targets": 0.4, "calibration": text(), "refine_passes": 0, "storage": storage}
    options |= {"method": "whitened_svd", "allocation": "uniform"}

    plain = compress(dense, anchored=False, **options)
    first, second = (compress(dense, anchored=True, **options) for _ in range(2))

    assert_same_function(first, second, inputs_for("BertForMaskedLM"))
    record = first.config.plan["provenance"]["anchoring"]
    assert mean_distance(first, dense, text()[-1:]) < mean_distance(plain, dense, text()[-1:])
    assert record["after"] < record["before"]
    assert json.dumps(record)
    assert ranks(first) == ranks(plain)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())


def test_in_place_there_is_no_dense_model_to_anchor_to():
    with pytest.raises(InputError, match="anchored needs the dense model"):
        compress(build("BertModel"), keep_targets=0.5, anchored=True, inplace=True)

    small = compress(build("BertModel"), keep_targets=0.5, calibration=text(), inplace=True)
    assert "anchoring" not in small.config.plan["provenance"]


def test_a_common_first_factor_stays_common_and_is_solved_for_all_its_members():
    dense = build("BertModel")
    layers = [layer.attention.self for layer in dense.encoder.layer]
    with torch.no_grad():
        for layer in layers:
            common = torch.randn(4, layer.query.in_features)
            for matrix in (layer.query, layer.key, layer.value):
                matrix.weight.copy_(torch.randn(len(matrix.weight), 4) @ common / 10)
    options = {"keep_targets": 0.2, "calibration": text(), "method": "whitened_svd", "refine_passes": 0}
    plain, small = (compress(dense, anchored=anchors, **options) for anchors in (False, True))

    accepted = tuple(small.config.plan["provenance"]["anchoring"]["accepted"])
    shared = [name for name in small.config.plan["shared"] if name.startswith(accepted)]
    assert shared
    assert ranks(small) == ranks(plain)
    for name in shared:
        assert not torch.equal(small.get_submodule(name).down.weight, plain.get_submodule(name).down.weight)
    assert mean_distance(small, dense, text()[-1:]) < mean_distance(plain, dense, text()[-1:])
