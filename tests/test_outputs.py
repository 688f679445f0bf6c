"""How far what one model says is from what another does."""

import pytest
import torch
from torch.nn import functional as F

from hf_lowrank.outputs import Said


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
