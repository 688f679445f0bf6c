"""What a language-model head does to the loss is part of its table's metric, tied or not."""

import pytest
import torch
from every_method import SOLVERS
from tiny_models import VOCABULARY, build

from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.statistics.collection import collect_statistics
from hf_lowrank.statistics.moments import MatrixStatistics

NEEDS = SOLVERS["two_sided_svd"].needs


def batch(labels=None):
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found["attention_mask"][1, 6:] = 0
    return found if labels is None else {**found, "labels": labels}


def table_statistics(model, role, inputs, path, kinds=NEEDS):
    matrices = [matrix for matrix in find_matrices(model) if matrix.role in ("block", role)]
    found = collect_statistics(model, matrices, [inputs], kinds, path=path / "found.safetensors", fingerprint="")
    return found[next(matrix.name for matrix in matrices if matrix.role == role)]


def head_curvature(model, inputs, counts):
    """`h` and `p (1 - p)` of each token that counts, the plain way."""
    head, seen = model.get_output_embeddings(), []
    hook = head.register_forward_hook(lambda module, given, logits: seen.append((given[0], logits)))
    with torch.no_grad():
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    hook.remove()
    hidden, logits = (values[counts].double() for values in seen[0])
    chances = logits.softmax(dim=-1)
    return hidden, chances * (1 - chances)


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForMaskedLM"])
def test_a_tied_table_holds_the_curvature_of_its_head(tmp_path, head):
    model = build(head)
    labels = torch.full((2, 9), -100)
    labels[0, 2] = labels[1, 3] = 5
    inputs = batch(labels) if head == "BertForMaskedLM" else batch()
    counts = labels != -100 if head == "BertForMaskedLM" else inputs["attention_mask"].bool()

    found = table_statistics(model, "embedding", inputs, tmp_path)

    hidden, weights = head_curvature(model, inputs, counts)
    expected = (weights * hidden.square().sum(dim=1, keepdim=True)).sum(dim=0) / 15
    moment = (hidden * weights.sum(dim=1, keepdim=True)).T @ hidden / 15
    assert torch.allclose(found.head_weights, expected, rtol=1e-4)
    assert found.head_weights.sum().item() == pytest.approx(moment.trace().item(), rel=1e-4)
    rest = torch.linalg.eigvalsh(found.input_moment - moment)  # the moment of the look-up's gradients
    assert rest.min() > -1e-5 * rest.max()
    assert rest.max() > 0


def test_an_untied_head_weights_its_rows_and_has_no_moment_of_the_size_of_the_vocabulary(tmp_path):
    model, inputs = build("GPT2LMHeadModel", tie_word_embeddings=False), batch()

    found = table_statistics(model, "head", inputs, tmp_path)

    _, weights = head_curvature(model, inputs, inputs["attention_mask"].bool())
    assert torch.allclose(found.row_weights, weights.sum(dim=0) / 15, rtol=1e-4)
    assert found.output_moment is None
    assert found.head_weights is None


def test_a_method_without_gradients_looks_at_no_head(tmp_path):
    found = table_statistics(
        build("GPT2LMHeadModel"), "embedding", batch(), tmp_path, kinds=SOLVERS["whitened_svd"].needs
    )

    assert found.head_weights is None


def test_both_sides_of_a_tied_table_count_by_their_share_of_the_curvature():
    usage, head = torch.tensor([0.7, 0.3, 0.0]).double(), torch.tensor([0.0, 1.0, 5.0]).double()
    moment = torch.diag(torch.tensor([6.0, 4.0])).double()  # a trace of 10: 4 of the look-up and 6 of the head

    rows, _ = SOLVERS["two_sided_svd"].metrics(
        MatrixStatistics(100, input_moment=moment, row_weights=usage, head_weights=head)
    )

    weights = rows.congruent(torch.eye(3).double()).diagonal()
    shares = (4 * usage + head) / 10
    assert torch.allclose(weights, 0.9 * shares + 0.1 * shares.mean())
    assert shares.sum() == pytest.approx(1)
