"""Matrices of one input with a common first factor: when it is computed, and when it is chosen."""

import pytest
import torch
from tiny_models import build, inputs_for, largest_difference, outputs
from torch import nn

from hf_lowrank import compress, decompress
from hf_lowrank.planning.allocation import settled
from hf_lowrank.planning.curves import Curve
from hf_lowrank.records.report import make_report
from hf_lowrank.remote_code.lowrank_joint import JointLinear, SharedDown
from hf_lowrank.remote_code.lowrank_plan import PlanError
from hf_lowrank.remote_code.lowrank_structures import install_plan_

JOINT = "encoder.layer.0.attention.self.joint_query_key_value"
MEMBERS = [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")]
PLAN = {
    "format_version": 1,
    "modules": {name: {"structure": "joint_low_rank", "shared": JOINT} for name in MEMBERS},
    "shared": {JOINT: {"structure": "shared_down", "rank": 3}},
}


@pytest.fixture
def members():
    """Three members of one factor, and a list that grows by one with each product of that factor."""
    shared = SharedDown(8, 3, num_members=3)
    found = [JointLinear(8, rows, shared) for rows in (5, 5, 7)]
    calls = []
    shared.down.register_forward_hook(lambda *_: calls.append(1))
    return found, calls


def planted(head="BertForMaskedLM"):
    """A model whose query, key and value of each block share their rows' space."""
    model = build(head)
    with torch.no_grad():
        for layer in model.base_model.encoder.layer:
            attention = layer.attention.self
            common = torch.randn(4, attention.query.in_features)
            for matrix in (attention.query, attention.key, attention.value):
                matrix.weight.copy_(torch.randn(len(matrix.weight), 4) @ common / 10)
    return model


def test_the_common_product_is_computed_once_for_all_members(members):
    layers, calls = members
    hidden_states = torch.randn(2, 8)

    found = [layer(hidden_states) for layer in layers]

    assert len(calls) == 1
    for layer, output in zip(layers, found, strict=True):
        expected = nn.functional.linear(hidden_states, layer.to_dense(), layer.dense_bias())
        assert torch.allclose(output, expected, atol=1e-6)
    assert layers[0].shared._common._known is None  # nothing outlives the last member's call


@pytest.mark.parametrize("change", ["another input", "input", "weight", "grad mode", "weight object"])
def test_a_result_is_not_used_again_after_a_change(members, change):
    (first, second, _), _ = members
    hidden_states = torch.randn(2, 8)
    with torch.no_grad():
        first(hidden_states)
        if change == "another input":
            hidden_states = hidden_states.clone() + 1
        elif change == "input":
            hidden_states.add_(1)
        elif change == "weight":
            first.shared.down.weight.mul_(2)
        elif change == "weight object":
            first.shared.down.weight = nn.Parameter(torch.randn(3, 8))
    with torch.set_grad_enabled(change == "grad mode"):
        found = second(hidden_states)

    expected = nn.functional.linear(hidden_states, second.to_dense(), second.dense_bias())
    assert torch.allclose(found, expected, atol=1e-6)
    assert found.requires_grad == (change == "grad mode")


def test_gradients_of_all_members_meet_in_the_common_factor(members):
    layers, calls = members
    hidden_states = torch.randn(2, 8)
    sum(layer(hidden_states).sum() for layer in layers).backward()
    found = layers[0].shared.down.weight.grad.clone()
    layers[0].shared.zero_grad()

    # Different tensors: computed for each member by itself.
    sum(layer(hidden_states.clone()).sum() for layer in layers).backward()

    assert len(calls) == 4
    assert torch.allclose(found, layers[0].shared.down.weight.grad, atol=1e-6)


def curve(name, costs, errors):
    return Curve(name, "low_rank", list(range(1, len(costs))), torch.tensor(costs).double().numpy(), errors)


def test_the_cheaper_way_to_the_same_error_is_chosen_at_each_budget():
    errors = torch.tensor([4.0, 1.0, 0.0]).double().numpy()
    separate = [curve("a", [2, 4, 8], errors), curve("b", [2, 4, 8], errors)]
    cheap, dear = curve("cheap", [3, 6, 16], 2 * errors), curve("dear", [5, 9, 16], 2 * errors)

    assert [c.matrix for c in settled([[separate, [cheap]]], budget=6)] == ["cheap"]
    assert [c.matrix for c in settled([[separate, [dear]]], budget=8)] == ["a", "b"]


@pytest.mark.parametrize("passes", [0, 1])
def test_matrices_with_a_common_row_space_get_a_common_factor(passes):
    dense = planted()
    batches = [{key: value for key, value in inputs_for("BertForMaskedLM").items() if key != "labels"}] * 4

    small = compress(
        dense,
        keep_targets=0.4,
        calibration=batches,
        target_modules=["query", "key", "value"],
        allocation="first_order",
        refine_passes=passes,
    )

    shared = small.config.plan["shared"]
    assert shared
    assert all(name.endswith("joint_query_key_value") for name in shared)
    keys = [key for key in small.state_dict() if ".down.weight" in key]
    assert len(keys) == len(shared) + sum(s["structure"] == "low_rank" for s in small.config.plan["modules"].values())
    report = make_report(small)
    assert report.parameters == sum(p.numel() for p in small.parameters())
    assert report.kept_targets_fraction <= 0.4
    if not passes:
        worst = max(m.relative_error or 0.0 for m in report.modules if m.structure == "joint_low_rank")
        assert worst < 0.05


def test_decompressing_leaves_nothing_of_the_common_factor():
    small = build("BertForMaskedLM")
    small = compress(small, keep_targets=0.5, target_modules=["intermediate.dense"], method="svd")
    plan = {**PLAN, "provenance": {}}
    joint = type(small)(type(small.config)(**{**build_config(small), "compression": plan})).eval()

    dense = decompress(joint)

    assert not any("joint" in key for key in dense.state_dict())
    inputs = inputs_for("BertForMaskedLM")
    assert largest_difference(outputs(dense.eval(), inputs), outputs(joint, inputs)) < 1e-5


def build_config(model):
    return {key: value for key, value in model.config.to_dict().items() if key not in ("compression", "auto_map")}


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"shared": {}}, r"query: shared must name one of no parts, got '.*joint_query_key_value'"),
        ({"shared": {**PLAN["shared"], "pooler.x": PLAN["shared"][JOINT]}}, r"pooler.x: no module of the plan uses"),
        ({"shared": {JOINT: {"structure": "low_rank", "rank": 3}}}, r"structure must be one of .*shared_down"),
        ({"shared": {JOINT: {"structure": "shared_down"}}}, r"needs exactly the sizes rank, got none"),
        ({"modules": {MEMBERS[0]: {"structure": "low_rank", "rank": 2, "shared": JOINT}}}, r"low_rank shares nothing"),
        ({"shared": {JOINT: {"structure": "shared_down", "rank": 999}}}, r"rank must be between 1 and \d+"),
    ],
)
def test_a_broken_plan_names_what_is_wrong(broken, words):
    with pytest.raises(PlanError, match=words):
        install_plan_(build("BertForMaskedLM"), {**PLAN, **broken})


@pytest.mark.parametrize("place", ["encoder.layer.9.joint", "encoder.layer"])
def test_a_place_that_is_none_or_taken_is_named(place):
    modules = {name: {"structure": "joint_low_rank", "shared": place} for name in MEMBERS}

    with pytest.raises(PlanError, match=place):
        install_plan_(
            build("BertForMaskedLM"),
            {"format_version": 1, "modules": modules, "shared": {place: PLAN["shared"][JOINT]}},
        )
