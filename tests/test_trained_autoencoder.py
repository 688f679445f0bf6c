"""The published training: it learns, ends, goes on after a kill, and depends on its seed alone."""

import pytest
import torch
from torch.nn import functional as F

from hf_lowrank.files.checkpoint import Checkpoint
from hf_lowrank.methods.tables.trained_table import PublishedTraining, TrainedTable

SHORT = PublishedTraining(epochs=6, extra_epochs=4, learning_rate=0.01)


@pytest.fixture
def rows():
    return torch.randn(200, 4) @ torch.randn(4, 12) + 0.3


def cosine_error(rows, solution):
    return 1 - float(F.cosine_similarity(rows, solution.product, dim=1).mean())


def test_it_finds_the_directions_of_rows_of_that_rank(rows):
    start = PublishedTraining(epochs=1, extra_epochs=0, learning_rate=0.0)
    longer = PublishedTraining(epochs=40, extra_epochs=5, learning_rate=0.01, decay_epochs=15)

    found = [cosine_error(rows, TrainedTable(rows, training).solve([(200, 5)])) for training in (start, longer)]

    assert found[0] > 0.5
    assert found[1] < 0.02


def test_it_costs_what_the_rule_says(rows):
    sizes = TrainedTable(rows, SHORT).sizes(5)

    assert sizes == {"frequent": 200, "common": 1, "frequent_rank": 5, "common_rank": 5, "rank": 5}


def test_the_seed_decides_and_nothing_else_is_drawn_from(rows):
    expected = torch.random.get_rng_state()

    first, again = (TrainedTable(rows, SHORT).solve([(200, 3)]).product for _ in range(2))
    other = TrainedTable(rows, PublishedTraining(epochs=6, extra_epochs=4, seed=2)).solve([(200, 3)]).product

    assert torch.equal(torch.random.get_rng_state(), expected)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_killed_run_goes_on_to_the_same_numbers(rows, tmp_path):
    def killed(epochs, description):
        for epoch in epochs:
            if epoch == 5:
                raise KeyboardInterrupt
            yield epoch

    kept = Checkpoint(tmp_path, "run")
    expected = TrainedTable(rows, SHORT).solve([(200, 3)]).product
    with pytest.raises(KeyboardInterrupt):
        TrainedTable(rows, SHORT, kept, killed).solve([(200, 3)])

    seen = []

    def watched(epochs, description):
        seen.append(list(epochs))
        return epochs

    found = TrainedTable(rows, SHORT, kept, watched).solve([(200, 3)])

    assert seen == [[5, 6, 7, 8, 9]]
    assert torch.equal(found.product, expected)


def test_it_ends_when_the_training_loss_falls_no_more(rows):
    still = PublishedTraining(epochs=2, extra_epochs=50, learning_rate=0.0, patience=3)
    epochs = []

    def counted(numbers, description):
        for number in numbers:
            epochs.append(number)
            yield number

    TrainedTable(rows, still, progress=counted).solve([(200, 3)])

    assert len(epochs) < 10


@pytest.mark.parametrize(("epoch", "alpha"), [(0, 1.0), (3, 0.55), (6, 0.1), (9, 0.1)])
def test_the_exponent_is_annealed_over_the_first_epochs(epoch, alpha):
    found, wanted = torch.full((1, 4), 3.0), torch.full((1, 4), 1.0)
    training = PublishedTraining(epochs=6, cosine=0, l1=1.0)

    assert float(training.loss(found, wanted, epoch)) == pytest.approx(2**alpha)
