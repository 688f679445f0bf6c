"""First-order pruning: what the masks and scores do, and that the Trainer around them stays the Trainer."""

import pytest
import tiny_models
import torch
from every_method import SOLVERS
from tiny_training import StopAt, arguments, rows
from torch import nn
from torch.nn.utils import parametrize
from transformers import Trainer

from hf_lowrank import InputError, compress
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.statistics.moments import MatrixStatistics
from hf_lowrank.training.callbacks.pruning import (
    IMPORTANCES,
    FirstOrderPruningCallback,
    Pruner,
    PruningMask,
    measure_rank,
)

HEAD = "BertForSequenceClassification"


def trainer_of(folder, model, callback, **options):
    return Trainer(
        model=model,
        args=arguments(folder, **{"max_steps": 8, **options}),
        train_dataset=rows(16, labels="class"),
        callbacks=[callback],
    )


def blocks_of(model):
    return [matrix for matrix in find_matrices(model) if matrix.role == "block"]


def kept_fractions(model):
    return [float((matrix.module.weight != 0).float().mean()) for matrix in blocks_of(model)]


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("head", [HEAD, "GPT2ForSequenceClassification"])
def test_dense_matrices_with_zeros_remain(head, importance, tmp_path):
    model = tiny_models.build(head)
    names = set(model.state_dict())
    embeddings = float((model.get_input_embeddings().weight == 0).float().mean())
    callback = FirstOrderPruningCallback(0.25, importance=importance)

    trainer_of(tmp_path, model, callback).train()

    assert kept_fractions(model) == pytest.approx([0.25] * len(kept_fractions(model)), abs=0.01)
    assert set(model.state_dict()) == names
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert float((model.get_input_embeddings().weight == 0).float().mean()) == embeddings
    assert {found.kept for found in callback.ranks.values()} == set(kept_fractions(model))


def test_scores_get_the_straight_through_gradient():
    weight, upstream = torch.randn(5, 4), torch.randn(5, 4)
    layer = nn.Linear(4, 5, bias=False)
    layer.weight.data.copy_(weight)
    mask = PruningMask(weight, is_scored=True)
    parametrize.register_parametrization(layer, "weight", mask)
    mask.mask[:, 2] = False

    (layer.weight * upstream).sum().backward()

    assert torch.equal(layer.weight.detach(), weight * mask.mask)
    assert torch.equal(mask.scores.grad, upstream * weight)
    assert torch.equal(layer.parametrizations.weight.original.grad, upstream * mask.mask)


def test_movement_scores_take_their_own_steps_and_no_decay(tmp_path):
    steps = {}
    for rate in (1e-3, 1e-1):
        model = tiny_models.build(HEAD)
        callback = FirstOrderPruningCallback(0.5, importance="movement", score_learning_rate=rate)
        trainer = trainer_of(tmp_path, model, callback, max_steps=1, weight_decay=0.5, lr_scheduler_type="constant")
        callback._span.__dict__.update(start=0, end=1)
        trainer.add_callback(StopAt(1))
        scores = callback.pruner.scores
        trainer.train()
        steps[rate] = scores[0].detach().abs().max().item()
        groups = trainer.optimizer.param_groups
        assert sum(id(p) == id(scores[0]) for group in groups for p in group["params"]) == 1
        assert len(groups) == 2

    # The first step of Adam is the learning rate.
    assert steps == pytest.approx({1e-3: 1e-3, 1e-1: 1e-1}, rel=1e-3)


def test_the_kept_fraction_falls_as_a_cubic(tmp_path):
    model = tiny_models.build(HEAD)
    callback = FirstOrderPruningCallback(0.2, start=2, end=6)
    fractions = []

    class Watch(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            fractions.append(callback.pruner.ranks()["encoder.layer.0.output.dense"].kept)

    trainer = trainer_of(tmp_path, model, callback)
    trainer.add_callback(Watch(99))
    trainer.train()

    expected = [1, 1, *(0.2 + 0.8 * (1 - k / 4) ** 3 for k in range(1, 5)), 0.2, 0.2]
    assert fractions == pytest.approx(expected, abs=0.01)


def test_global_pruning_lets_matrices_compete():
    model = tiny_models.build(HEAD)
    matrices = blocks_of(model)
    with torch.no_grad():
        matrices[0].module.weight.mul_(10)
    pruner = Pruner(model, matrices, "magnitude", is_global=True, seed=0)

    pruner.keep(0.3)
    kept = [found.kept for found in pruner.ranks().values()]
    weights = [matrix.num_weights for matrix in matrices]

    assert kept[0] > 0.8 > max(kept[1:])
    assert sum(k * w for k, w in zip(kept, weights, strict=True)) == pytest.approx(0.3 * sum(weights), abs=1)


def test_sensitivity_is_the_running_mean_of_gradient_times_weight():
    model = tiny_models.build(HEAD)
    pruner = Pruner(model, blocks_of(model), "sensitivity", is_global=False, seed=0)
    pruner.keep(0.5)  # pruned entries are sensitive too
    expected = [torch.zeros_like(score) for score in pruner.scores]

    for weight in (1.0, -3.0):
        for score, found in zip(pruner.scores, expected, strict=True):
            score.grad = weight * torch.randn_like(score)
            found.lerp_(score.grad.abs(), 0.05)
        pruner.gather_sensitivities()

    assert all(torch.allclose(*pair) for pair in zip(pruner.scores, expected, strict=True))
    assert all(score.grad is None for score in pruner.scores)


def test_equal_scores_lose_no_more_than_asked():
    model = tiny_models.build(HEAD)
    pruner = Pruner(model, blocks_of(model), "movement", is_global=False, seed=0)

    pruner.keep(0.5)  # all scores are zero

    assert all(found.kept == pytest.approx(0.5, abs=0.01) for found in pruner.ranks().values())


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_killed_and_resumed_it_ends_bit_identical(importance, tmp_path):
    ends = []
    for name in ("whole", "resumed"):
        folder, options = tmp_path / name, {"save_strategy": "steps", "save_steps": 5}
        checkpoint = None
        if name == "resumed":
            cut = trainer_of(folder, tiny_models.build(HEAD), FirstOrderPruningCallback(0.3, importance=importance),
                             **options)  # fmt: skip
            cut.add_callback(StopAt(5))
            cut.train()
            checkpoint = str(folder / "checkpoint-5")
        model = tiny_models.build(HEAD)
        callback = FirstOrderPruningCallback(0.3, importance=importance)
        trainer_of(folder, model, callback, **options).train(resume_from_checkpoint=checkpoint)
        ends.append((model.state_dict(), callback.ranks))

    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])


def test_the_rank_of_a_sparse_matrix_is_counted():
    weight = torch.randn(20, 12)
    weight[:, 5:] = 0
    weight[0, 0] = 100.0

    found = measure_rank(weight)

    assert (found.rank, found.full_rank, found.energy_rank) == (5, 12, 1)
    assert measure_rank(torch.zeros(4, 4)).rank == 0


@pytest.mark.parametrize("name", ["sparsity_aware_svd", "importance_aware_svd"])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_rows_without_an_entry_stay_exactly_zero(name, shape):
    weight = torch.randn(shape)
    weight[[1, 4]] = 0
    weight[2, 1:] = 0
    fisher = torch.rand(shape, dtype=torch.float64)

    for rank in range(1, 9):
        found = SOLVERS[name].decompose(weight, MatrixStatistics(10, fisher=fisher)).factors(rank)
        assert not found.up[[1, 4]].any()
        assert found.up[2].any() or rank < 8


def test_rows_with_more_survivors_are_kept_better():
    weight = torch.randn(12, 12, dtype=torch.float64)
    weight[6:] *= torch.rand(6, 12) < 0.4
    errors = {}
    for name in ("svd", "sparsity_aware_svd"):
        errors[name] = (weight - SOLVERS[name].decompose(weight).factors(4).product)[:6].norm()

    assert errors["sparsity_aware_svd"] < errors["svd"]


def test_the_weighted_error_is_least_in_the_weights_of_the_rows():
    weight = torch.randn(9, 7, dtype=torch.float64) * (torch.rand(9, 7) < 0.6)
    weights = (weight != 0).sum(dim=1).double()[:, None]
    errors = {
        name: float((weights * (weight - SOLVERS[name].decompose(weight).factors(3).product).square()).sum())
        for name in ("svd", "sparsity_aware_svd")
    }

    assert errors["sparsity_aware_svd"] < errors["svd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be above 0"),
        ({"keep": 0.5, "importance": "luck"}, "must be one of sensitivity"),
        ({"keep": 0.5, "start": -1}, "must be positive"),
        ({"keep": 0.5, "end": 20}, "ends at step 20, the training at step 8"),
        ({"keep": 0.5, "start": 0.8}, "begins at step 6"),
        ({"keep": 0.5, "target_modules": ["qery"]}, "matches none"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        trainer_of(tmp_path, tiny_models.build(HEAD), FirstOrderPruningCallback(**options)).train()

    assert "\n" not in str(caught.value)


def test_a_model_with_nothing_to_prune_is_refused(tmp_path):
    small = compress(tiny_models.build(HEAD), rank=3, method="svd")
    for model, message in ((small, "compressed already"),):
        with pytest.raises(InputError, match=message):
            trainer_of(tmp_path, model, FirstOrderPruningCallback(0.5))


def test_a_callback_added_too_late_says_so(tmp_path):
    trainer = trainer_of(tmp_path, tiny_models.build(HEAD), StopAt(1))
    trainer.add_callback(FirstOrderPruningCallback(0.5))

    with pytest.raises(InputError, match="Give it in callbacks="):
        trainer.train()
