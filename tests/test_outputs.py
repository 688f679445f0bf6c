"""How far what one model says is from what another does."""

import pytest
import torch
from tiny_models import build
from torch.nn import functional as F

from hf_lowrank.hosts.outputs import OUTPUTS, Said, mean_distance, run


def logits(num_rows, size=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 200])
def test_the_distance_of_distributions_is_the_divergence_row_by_row(num_rows):
    found, wanted = logits(num_rows).requires_grad_(), logits(num_rows, seed=1)
    expected = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)

    distance = Said("distribution", found).distance(Said("distribution", wanted))

    torch.testing.assert_close(distance, expected)
    weights = torch.linspace(-1, 1, num_rows, dtype=torch.float64)
    gradients = [torch.autograd.grad((each * weights).sum(), found)[0] for each in (distance, expected)]
    torch.testing.assert_close(*gradients)


def test_what_says_the_same_has_no_distance_and_pulls_nowhere():
    found = logits(100).requires_grad_()

    distance = Said("distribution", found).distance(Said("distribution", found.detach() + 3))
    distance.sum().backward()

    assert distance.abs().max() < 1e-12
    assert found.grad.abs().max() < 1e-12


def rows_of(kind, free):
    """What is said, as a function of free numbers."""
    return Said(kind, F.normalize(free, dim=-1) if kind == "embedding" else free)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_what_is_the_same_has_no_distance_and_everything_else_has_one(kind):
    said, other = rows_of(kind, logits(50)), rows_of(kind, logits(50, seed=1))

    assert said.distance(said).abs().max() < 1e-12
    assert said.distance(other).shape == (50,)
    assert said.distance(other).min() > 0


@pytest.mark.parametrize("kind", OUTPUTS)
def test_random_gradients_have_the_second_moment_of_the_distances_hessian(kind):
    point = F.normalize(logits(1, size=3), dim=-1)[0]
    hessian = (
        torch.autograd.functional.hessian(
            lambda free: rows_of(kind, free[None]).distance(rows_of(kind, point[None])).sum(), point
        )
        if kind != "distribution"
        else torch.diag(point.softmax(0)) - torch.outer(point.softmax(0), point.softmax(0))
    )
    many = point.expand(200_000, 3).clone().requires_grad_()

    rows_of(kind, many).random_gradient_loss(torch.Generator().manual_seed(0)).backward()

    torch.testing.assert_close(many.grad.T @ many.grad / len(many), hessian, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"num_labels": 3}, "distribution"),
        ({"num_labels": 1}, "number"),
        ({"num_labels": 2, "problem_type": "regression"}, "number"),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "labels"),
    ],
)
@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2ForSequenceClassification"])
def test_what_a_sequence_head_says_follows_from_its_config(head, options, kind):
    model = build(head, pad_token_id=0, **options)

    found = run(model, {"input_ids": torch.ones(2, 5, dtype=torch.long)})

    assert (found.kind, found.rows.shape) == (kind, (2, options["num_labels"]))


@pytest.mark.parametrize("options", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_no_head_looks_healthy_after_it_was_destroyed(options):
    """A softmax over the one number of a reranker is 1 whatever it says."""
    dense = build("BertForSequenceClassification", **options)
    broken = build("BertForSequenceClassification", seed=1, **options)
    batch = {"input_ids": torch.arange(40).reshape(4, 10)}

    assert mean_distance(broken, dense, [batch]) > 1e-6
    run(dense, batch).random_gradient_loss(torch.Generator().manual_seed(0)).backward()
    assert all(layer.output.dense.weight.grad.abs().max() > 0 for layer in dense.bert.encoder.layer)
