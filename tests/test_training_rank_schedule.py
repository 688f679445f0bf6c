"""Ranks that fall during a training, and the penalty that lowers them before."""

import pytest
import tiny_models
import torch
from tiny_training import StopAt, arguments, rows
from transformers import Trainer

from hf_lowrank import InputError, compress, make_report
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.factors import truncated
from hf_lowrank.remote_code.lowrank_structures import named_structures
from hf_lowrank.sharing.saving import load_compressed
from hf_lowrank.training.callbacks.rank_schedule import (
    RankScheduleCallback,
    StableRankPenaltyCallback,
    stable_rank,
    stable_rank_gradient,
)

HEAD = "BertForSequenceClassification"


def trainer_of(folder, model, callback, **options):
    args = arguments(folder, **{"max_steps": 10, "weight_decay": 0.01, **options})
    return Trainer(model=model, args=args, train_dataset=rows(16, labels="class"), callbacks=[callback])


def small_model():
    return compress(tiny_models.build(HEAD), rank=8, method="svd")


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_a_cut_is_the_best_approximation_of_the_product(shape):
    up, down = torch.randn(shape[0], 5), torch.randn(5, shape[1])
    left, values, right = torch.linalg.svd(up @ down)

    for rank in range(1, 6):
        best = left[:, :rank] * values[:rank] @ right[:rank]
        assert torch.allclose(truncated(up, down, rank).product, best, atol=1e-4)


def test_ranks_fall_step_by_step_to_the_target(tmp_path):
    small = small_model()
    seen = []
    layer = small.bert.encoder.layer[0].output.dense

    class Watch(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            both = (layer.up.weight.abs().sum(0) > 0) & (layer.down.weight.abs().sum(1) > 0)
            assert torch.equal(both, layer.up.weight.abs().sum(0) > 0)
            seen.append(int(both.sum()))

    trainer = trainer_of(tmp_path, small, RankScheduleCallback(0.5, end=8, cuts=4))
    trainer.add_callback(Watch(99))
    trainer.train()
    small.save_pretrained(tmp_path / "out")

    assert seen == [8, 6, 6, 4, 4, 4, 4, 4, 4, 4]
    assert {module.rank for _, module in named_structures(small)} == {4}
    assert {report.rank for report in make_report(small).modules} == {4}
    tiny_models.assert_same_function(small.eval(), load_compressed(tmp_path / "out"), tiny_models.inputs_for(HEAD))


def test_the_last_cut_changes_no_output(tmp_path):
    small = small_model()
    outputs = {}

    class Watch(StopAt):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            outputs["before"] = tiny_models.outputs(model.eval(), tiny_models.inputs_for(HEAD))

    callback = RankScheduleCallback({"encoder.layer.0.output.dense": 3}, end=5)
    trainer = trainer_of(tmp_path, small, callback)
    trainer.add_callback(Watch(99))
    trainer.train()
    after = tiny_models.outputs(small.eval(), tiny_models.inputs_for(HEAD))

    assert tiny_models.largest_difference(outputs["before"], after) < 1e-5
    assert small.bert.encoder.layer[0].output.dense.rank == 3
    assert small.bert.encoder.layer[1].output.dense.rank == 8


@pytest.mark.parametrize("kind", ["ranks", "penalty"])
def test_killed_and_resumed_it_ends_bit_identical(kind, tmp_path):
    make = {
        "ranks": lambda: (small_model(), RankScheduleCallback(0.5, end=8, cuts=4)),
        "penalty": lambda: (tiny_models.build(HEAD), StableRankPenaltyCallback(1.0)),
    }[kind]
    ends = []
    for name in ("whole", "resumed"):
        folder, options, checkpoint = tmp_path / name, {"save_strategy": "steps", "save_steps": 4}, None
        if name == "resumed":
            cut = trainer_of(folder, *make(), **options)
            cut.add_callback(StopAt(4))
            cut.train()
            checkpoint = str(folder / "checkpoint-4")
        model, callback = make()
        trainer_of(folder, model, callback, **options).train(resume_from_checkpoint=checkpoint)
        ends.append(model.state_dict())

    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_the_penalty_has_the_gradient_of_the_stable_rank(shape):
    torch.manual_seed(2)
    weight = torch.randn(shape) + 2.0  # one large singular value
    weight.requires_grad_(True)
    values = torch.linalg.svdvals(weight).square()
    (values.sum() / values[0]).backward()

    assert torch.allclose(stable_rank_gradient(weight.detach()), weight.grad, atol=1e-3)
    assert not stable_rank_gradient(torch.zeros(shape)).any()


def test_the_penalty_lowers_stable_ranks(tmp_path):
    ends = []
    for strength in (1e-9, 50.0):
        model = tiny_models.build(HEAD)
        trainer_of(tmp_path, model, StableRankPenaltyCallback(strength)).train()
        ends.append([stable_rank(m.module.weight) for m in find_matrices(model) if m.role == "block"])

    assert all(penalized < plain for plain, penalized in zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (lambda: RankScheduleCallback(1.5), "between 0 and 1"),
        (lambda: RankScheduleCallback(0.5, cuts=0), "cuts must be at least 1"),
        (lambda: RankScheduleCallback({"encoder.layer.0.output.dense": 9}), "between 1 and its present rank 8"),
        (lambda: RankScheduleCallback({"nothing": 2}), "names 'nothing'"),
        (lambda: RankScheduleCallback(0.5, end=11), "ends at step 11, the training at step 10"),
        (lambda: StableRankPenaltyCallback(0), "strength must be positive"),
        (lambda: StableRankPenaltyCallback(1), "compressed already"),
    ],
)
def test_options_that_cannot_be_used_are_named(callback, message, tmp_path):
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, small_model(), callback()).train()


def test_ranks_of_a_dense_model_cannot_fall(tmp_path):
    with pytest.raises(InputError, match="no layers of two factors"):
        trainer_of(tmp_path, tiny_models.build(HEAD), RankScheduleCallback(0.5)).train()
