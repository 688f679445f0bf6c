"""Layers decoded by what other layers share: exact where they must be, one decoder, the same in every mode."""

import pytest
import torch
from elsewhere import assert_same_elsewhere
from every_method import TENSOR_METHODS
from safetensors.torch import load_file
from tiny_models import WIDTH, assert_same_function, build, inputs_for
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from hf_lowrank import compress
from hf_lowrank.errors import InputError
from hf_lowrank.files.checkpoint import Checkpoint
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.metric import DiagonalMetric, identity, moment_metric
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.rows import row_autoencoder
from hf_lowrank.methods.rows.method import Group
from hf_lowrank.methods.rows.nonlinear_autoencoder import RowTraining, train_rows
from hf_lowrank.methods.rows.nonlinear_method import NonlinearAutoencoderMethod
from hf_lowrank.methods.rows.row_autoencoder import RowAutoencoder, Rows
from hf_lowrank.planning.budgets import Budget
from hf_lowrank.remote_code.lowrank_autoencoder_linear import ROWS, LinearDecoder, NonlinearDecoder, row_shape
from hf_lowrank.remote_code.lowrank_materialize import MODES, set_materialize_
from hf_lowrank.remote_code.lowrank_plan import PlanError
from hf_lowrank.remote_code.lowrank_structures import build_shared_part, build_structure
from hf_lowrank.statistics.evidence import Evidence

NAMES = {"autoencoder": "linear_decoder", "nonlinear_autoencoder": "nonlinear_decoder"}
each_name = pytest.mark.parametrize("name", NAMES)
each_rows = pytest.mark.parametrize("rows", ROWS)


def layers(name, rows, rank=3, hosts=None):
    """Two layers of one decoder, drawn at random."""
    hosts = hosts or [nn.Linear(7, 5, dtype=torch.float64), nn.Linear(7, 5, dtype=torch.float64)]
    part = build_shared_part(hosts, {"structure": NAMES[name], "rank": rank, "rows": rows})
    part.reset_parameters(1.0)
    built = [build_structure(host, {"structure": name}, shared=part).eval() for host in hosts]
    for layer in built:
        layer.reset_parameters(1.0)
        nn.init.normal_(layer.bias)
    return nn.ModuleList(built), part


@each_name
@each_rows
def test_every_mode_and_either_host_is_the_layer_of_the_decoded_weight(name, rows):
    linear, conv = nn.Linear(7, 5, dtype=torch.float64), Conv1D(5, 7).double()
    (first, second), part = layers(name, rows, hosts=[linear, conv])
    nn.init.normal_(next(part.parameters()))
    second.load_state_dict(first.state_dict())
    states = torch.randn(4, 7, dtype=torch.float64)

    for mode in MODES:
        set_materialize_(nn.ModuleList([first, second]), mode)
        with torch.no_grad():
            for layer in (first, second):
                assert torch.allclose(layer(states), F.linear(states, layer.to_dense(), layer.bias), atol=1e-12)
    assert first.dense_size == (5, 7)


@each_name
@each_rows
def test_a_kept_weight_follows_the_shared_decoder(name, rows):
    built, part = layers(name, rows)
    set_materialize_(built, "once")
    states = torch.randn(4, 7, dtype=torch.float64)
    with torch.no_grad():
        before = [layer(states) for layer in built]
        next(part.parameters()).mul_(-0.5)
        after = [layer(states) for layer in built]

    assert all(not torch.allclose(old, new) for old, new in zip(before, after, strict=True))
    for layer, found in zip(built, after, strict=True):
        assert torch.allclose(found, F.linear(states, layer.to_dense(), layer.bias))


@each_name
@each_rows
def test_every_user_sends_gradients_to_the_one_decoder(name, rows):
    built, part = layers(name, rows)
    states, found = torch.randn(4, 7, dtype=torch.float64), []
    for layer in built:
        part.zero_grad()
        layer(states).square().sum().backward()
        found.append([p.grad.clone() for p in part.parameters()])
    part.zero_grad()
    sum(layer(states).square().sum() for layer in built).backward()

    for whole, *parts in zip((p.grad for p in part.parameters()), *found, strict=True):
        assert all(one.any() for one in parts)
        assert torch.allclose(whole, sum(parts))


@each_rows
def test_the_dense_weight_is_not_formed_in_each_forward(rows, monkeypatch):
    (first, _), _ = layers("autoencoder", rows)
    monkeypatch.setattr(type(first), "to_dense", lambda _: pytest.fail("formed"))

    first(torch.randn(4, 7, dtype=torch.float64)).sum().backward()


@each_name
@each_rows
def test_numbers_are_those_of_the_rule(name, rows):
    built, part = layers(name, rows)
    num_rows, width = row_shape(nn.Linear(7, 5), rows)

    assert sum(p.numel() for p in part.parameters()) == part.num_numbers(width, 3)
    assert [sum(p.numel() for p in layer.parameters()) for layer in built] == 2 * [num_rows * (3 + 1) + 5]


def test_the_decoders_have_the_published_sizes():
    assert NonlinearDecoder.num_numbers(768, 67) == pytest.approx(252_000, rel=0.002)
    assert NonlinearDecoder.num_numbers(3072, 373) == pytest.approx(5_980_000, rel=0.002)
    assert LinearDecoder.num_numbers(768, 75) == 75 * 768 + 768


def test_rows_of_different_length_have_no_decoder_in_common():
    with pytest.raises(PlanError, match=r"one length, got \[6, 7\]"):
        build_shared_part([nn.Linear(7, 5), nn.Linear(6, 5)], {"structure": "linear_decoder", "rank": 2})
    part = build_shared_part([nn.Linear(7, 5)], {"structure": "linear_decoder", "rank": 2, "rows": "input"})
    with pytest.raises(PlanError, match="rows of length 5, the matrix has rows of 6"):
        build_structure(nn.Linear(5, 6), {"structure": "autoencoder"}, shared=part)


def rows_of(kind, num_matrices=3, num_rows=20, width=8):
    """Random rows, with metrics of that kind."""
    found = []
    for _ in range(num_matrices):
        values = torch.randn(num_rows, width, dtype=torch.float64) * torch.arange(1, width + 1) ** -0.7
        sides = [torch.randn(40, n, dtype=torch.float64) * torch.arange(1, n + 1) ** -0.5 for n in (num_rows, width)]
        metrics = [moment_metric(side.T @ side / 40, 40, 0.01) for side in sides]
        plain = identity(), identity()
        directions = DiagonalMetric(1 / values.square().sum(1)), identity()
        found.append(Rows(values, *{"plain": plain, "direction": directions, "both": metrics}[kind]))
    return found


def loss_of(members, products):
    total = 0.0
    for member, product in zip(members, products, strict=True):
        half = torch.cat(list(member.row_metric.rooted_chunks(member.values - product, len(product))))
        total += float(torch.cat(list(member.column_metric.rooted_chunks(half.T, half.shape[1]))).square().sum())
    return total


each_kind = pytest.mark.parametrize("kind", ["plain", "direction", "both"])


@each_kind
def test_codes_as_long_as_the_rows_give_the_rows(kind):
    members = rows_of(kind)

    products = RowAutoencoder(members).solve(8).products

    for member, product in zip(members, products, strict=True):
        assert torch.allclose(product, member.values, atol=1e-8)


@pytest.mark.parametrize("kind", ["plain", "direction"])
def test_where_columns_count_alike_the_start_is_the_optimum(kind):
    members = rows_of(kind)
    autoencoder = RowAutoencoder(members)

    found = loss_of(members, autoencoder.solve(3).products)

    assert found == pytest.approx(float(autoencoder.errors[2]), rel=1e-6)
    if kind == "plain":  # between the best matrices of rank R and, with the offset, of rank R + 1
        tails = torch.linalg.svdvals(torch.cat([member.values for member in members])).square()
        assert float(tails[4:].sum()) <= found <= float(tails[3:].sum())


def test_sweeps_lower_the_loss_where_matrices_have_metrics_of_their_own(monkeypatch):
    members = rows_of("both")
    found = loss_of(members, RowAutoencoder(members).solve(3).products)
    again = loss_of(members, RowAutoencoder(members).solve(3).products)

    monkeypatch.setattr(row_autoencoder, "_MOST_SWEEPS", 0)
    start = loss_of(members, RowAutoencoder(members).solve(3).products)
    monkeypatch.setattr(row_autoencoder, "_MOST_SWEEPS", 500)
    monkeypatch.setattr(row_autoencoder, "_TOLERANCE", 1e-9)
    least = loss_of(members, RowAutoencoder(members).solve(3).products)

    assert found == again
    assert least <= found < 0.98 * start
    assert found < 1.05 * least


def test_a_row_of_zeros_stays_zero():
    members = rows_of("plain")
    members[0].values[4] = 0

    product = RowAutoencoder(members).solve(3).products[0]

    assert not product[4].any()


METHODS = [name for name in TENSOR_METHODS if name.endswith("autoencoder")]
LINEAR = [name for name in METHODS if "nonlinear" not in name]
each_method = pytest.mark.parametrize("method", METHODS)


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize(
    ("head", "targets"), [("BertForMaskedLM", ["query", "key"]), ("GPT2LMHeadModel", r".*attn\.c_proj")]
)
def test_the_longest_codes_give_the_dense_model(head, targets, method):
    dense = build(head).double()

    small = compress(dense, method=method, rank=WIDTH, target_modules=targets)

    assert_same_function(dense, small, inputs_for(head), tolerance=1e-8)


@pytest.mark.usefixtures("hardly_trained")
@each_method
def test_layers_of_one_kind_have_one_decoder_and_it_is_stored_once(method, tmp_path):
    dense = build("BertModel")
    matrices = [matrix for matrix in find_matrices(dense) if matrix.role == "block"]
    small = compress(dense, method=method, keep_targets=0.3)
    plan = small.config.plan
    small.save_pretrained(tmp_path)

    stored = load_file(tmp_path / "model.safetensors")

    kinds = {name.split(".", 3)[3] for name in plan["modules"]}
    assert len(plan["shared"]) == (len(plan["modules"]) if "separated" in method else len(kinds))
    parts = {name.split(".")[0] for name in stored if name.startswith("decoder_")}
    assert parts == set(plan["shared"])
    assert sum(value.numel() for value in stored.values()) == sum(p.numel() for p in small.parameters())
    rule = 0
    for part, spec in plan["shared"].items():
        members = [matrix for matrix in matrices if plan["modules"].get(matrix.name, {}).get("shared") == part]
        rule += Group(part, members, spec["rows"], spec["structure"]).cost(spec["rank"])
    ours = [key for key in stored if key.startswith("decoder_") or key.endswith((".codes", ".norms"))]
    assert rule == sum(stored[key].numel() for key in ours)
    dense_ones = [matrix for matrix in matrices if matrix.name not in plan["modules"]]
    assert rule + sum(m.num_weights for m in dense_ones) <= 0.3 * sum(m.num_weights for m in matrices)


@pytest.mark.usefixtures("hardly_trained")
@each_method
def test_the_same_seed_gives_the_same_numbers(method):
    first, second = (compress(build("GPT2LMHeadModel"), method=method, keep_targets=0.4) for _ in range(2))

    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.usefixtures("hardly_trained")
def test_decoders_load_without_this_library(tmp_path):
    head = "GPT2LMHeadModel"

    assert_same_elsewhere(
        {name: (head, compress(build(head), method=name, keep_targets=0.4)) for name in METHODS}, tmp_path
    )


def test_ranks_of_an_autoencoder_are_one_number():
    with pytest.raises(InputError, match=r"one, the length of its codes, got \[2, 3\]"):
        compress(build("BertModel"), method="offline_autoencoder", ranks=(2, 3))
    with pytest.raises(InputError, match="rank must be between 1 and"):
        compress(build("BertModel"), method="offline_autoencoder", rank=1000)


def planted(num_rows=200, width=16, rank=3):
    """Rows whose directions are a curved function of a short code, half of them in each of two matrices."""
    hidden = torch.tanh(torch.randn(num_rows, rank) @ torch.randn(rank, 32))
    rows = F.normalize(hidden @ torch.randn(32, width), dim=1) * torch.randn(num_rows, 1).exp()
    return list(rows.split(num_rows // 2))


def linear_codes(rows, rank=3):
    return RowAutoencoder(
        [Rows(own, DiagonalMetric(1 / own.double().square().sum(1)), identity()) for own in rows]
    ).solve(rank)


def test_a_non_linear_decoder_starts_as_the_linear_one_and_learns_curved_rows():
    rows = planted()
    start = linear_codes(rows)
    linear = RowTraining().loss(
        F.normalize(torch.cat(start.products).float(), dim=1), torch.cat(rows), torch.cat(start.norms).float()
    )

    found, again = (train_rows(rows, start, training=RowTraining(steps=120)) for _ in range(2))

    assert found.losses[0] == pytest.approx(float(linear), rel=0.02)
    assert min(found.losses) < 0.9 * found.losses[0]
    assert found.losses == again.losses
    decoder = NonlinearDecoder(16, 3)
    decoder.load_state_dict(found.decoder)
    with torch.no_grad():
        directions = F.normalize(decoder(torch.cat(found.codes)), dim=1)
        reached = RowTraining().loss(directions, torch.cat(rows), torch.cat(found.norms).float())
    assert float(reached) == pytest.approx(min(found.losses), rel=1e-4)


def test_a_killed_training_goes_on_to_the_same_numbers(tmp_path):
    rows, training, seen = planted(), RowTraining(steps=60), []

    def killed(steps, description):
        for step in steps:
            if step == 40:
                raise KeyboardInterrupt
            yield step

    def watched(steps, description):
        seen.extend(steps)
        return steps

    kept, expected = Checkpoint(tmp_path, "rows"), train_rows(rows, linear_codes(rows), training=training)
    with pytest.raises(KeyboardInterrupt):
        train_rows(rows, linear_codes(rows), training=training, checkpoint=kept, progress=killed)
    for _ in range(2):  # the second finds it finished
        found = train_rows(rows, linear_codes(rows), training=training, checkpoint=kept, progress=watched)

        assert found.losses == expected.losses
        assert all(map(torch.equal, found.codes, expected.codes))
        assert all(torch.equal(value, expected.decoder[name]) for name, value in found.decoder.items())
    assert seen == list(range(25, 61))


def test_rows_of_inputs_are_not_taken_for_those_of_outputs_that_were_kept(tmp_path):
    model = build("BertModel")
    matrices = [matrix for matrix in find_matrices(model) if matrix.name.endswith("self.key")]

    def solved(rows, folder):
        evidence = Evidence(model, matrices, cache_dir=folder)
        problem = Problem(model, matrices, evidence, "nonlinear_autoencoder", Budget("ranks", 3, (3,)))
        group = Group("decoder_key", matrices, rows, "nonlinear_decoder")
        return NonlinearAutoencoderMethod(None)._solved(problem, group, 3)[0]

    solved("output", tmp_path)

    assert all(map(torch.equal, solved("input", tmp_path), solved("input", None)))


def test_training_that_gains_nothing_ends_early():
    rows = planted()

    found = train_rows(rows, linear_codes(rows), training=RowTraining(learning_rate=0.0, patience=4))

    assert len(found.losses) == 5
