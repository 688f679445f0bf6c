"""Token tables as codes and decoders: exact where they must be, as small as they say, and better where it counts."""

import copy
import itertools

import pytest
import torch
from tiny_models import VOCABULARY, WIDTH, build, inputs_for, largest_difference, outputs
from tiny_tokenizers import encoder_tokenizer
from torch.nn import functional as F

from hf_lowrank import compress
from hf_lowrank.errors import InputError
from hf_lowrank.methods.encoding import encode_banded
from hf_lowrank.methods.matrix.svd import SVD
from hf_lowrank.methods.metric import moment_metric
from hf_lowrank.methods.tables.banded import CLOSED_FORM, BandedTable, TableObjective
from hf_lowrank.records.report import make_report
from hf_lowrank.remote_code.lowrank_autoencoder import AutoencoderEmbedding
from hf_lowrank.remote_code.lowrank_banded import BandedAutoencoder, bands_of, sizes_of_bands
from hf_lowrank.remote_code.lowrank_materialize import Materializing, set_materialize_
from hf_lowrank.sharing.saving import load_compressed
from hf_lowrank.statistics.token_counts import count_tokens

V, D = 300, 24
PLAIN = TableObjective(frequency_power=0, uses_metric=False)


def zipf(size=V):
    return 1 / torch.arange(1, size + 1, dtype=torch.float64)


def real_like(size=V, width=D):
    """Rows of a falling spectrum, in which rare rows are longer, as in trained models."""
    spectrum = torch.arange(1, width + 1) ** -0.7
    return torch.randn(size, width, dtype=torch.float64) * spectrum * torch.linspace(1, 2, size)[:, None] + 0.2


def module_of(solution, sizes, weight):
    module = AutoencoderEmbedding(*weight.shape, sizes, dtype=weight.dtype)
    module.load_state_dict(encode_banded(solution, None, weight.dtype), strict=True)
    return module


def error_of(weight, found, frequencies, metric=None):
    difference = weight - found
    rooted = difference if metric is None else metric.root(torch.eye(D).double()).T @ difference.T
    squares = difference.square().sum(1) if metric is None else rooted.square().sum(0)
    return float((frequencies * squares).sum())


@pytest.mark.parametrize("bands", [[(V, D)], [(50, D), (250, D)], [(20, D), (80, D), (200, D)]])
def test_full_codes_and_their_decoders_are_the_table_itself(bands):
    weight = real_like()
    table = BandedTable(weight, zipf(), moment_metric(weight.T @ weight, V, 0.1))

    module = module_of(table.solve(bands), sizes_of_bands(bands), weight)

    assert torch.allclose(module.to_dense(), weight, atol=1e-10)
    assert torch.allclose(module(torch.arange(V)), weight, atol=1e-10)


def test_one_band_whose_rows_count_alike_is_the_svd_of_what_its_mean_leaves():
    weight = real_like()

    found = BandedTable(weight, objective=PLAIN).solve([(V, 7)]).product

    centred = weight - weight.mean(0)
    assert torch.allclose(found, SVD().decompose(centred).factors(7).product + weight.mean(0), atol=1e-10)


@pytest.mark.parametrize("rank", [2, 5, 11])
@pytest.mark.parametrize("objective", list(CLOSED_FORM))
def test_it_costs_no_more_than_the_rule_says(rank, objective):
    weight, order = real_like(), V * 2 // 8  # in int16, beside numbers of float64
    table = BandedTable(weight, zipf(), objective=CLOSED_FORM[objective])

    sizes = table.sizes(rank, weight.element_size())
    module = AutoencoderEmbedding(V, D, sizes)

    numbers = sum(p.numel() for p in module.parameters())
    rule = BandedAutoencoder.num_weights(V, D, rank=rank)
    assert rule == rank * (V + D) + D
    assert numbers == BandedAutoencoder.num_weights(V, D, **sizes)
    assert 0.9 * rule < numbers + order <= rule


@pytest.mark.parametrize("rank", [4, 10])
def test_bands_lose_less_than_one_band_and_one_less_than_the_svd_of_equal_size(rank):
    rows = 2000
    weight, frequencies = real_like(rows)[torch.randperm(rows)], zipf(rows) / zipf(rows).sum()
    metric = moment_metric(real_like().T @ real_like(), V, 0.1)
    table = BandedTable(weight, frequencies, metric, TableObjective(frequency_power=1))
    sizes = bands_of(rows, D, table.sizes(rank))

    banded = error_of(weight, table.solve(sizes).product, frequencies, metric)
    single = error_of(weight, table.solve([(rows, rank)]).product, frequencies, metric)
    plain = error_of(weight, SVD().decompose(weight).factors(rank).product, frequencies, metric)

    assert banded < single < plain


def test_the_direction_objective_has_less_cosine_error_than_the_svd_of_equal_size():
    weight = real_like() * torch.exp(torch.randn(V, 1).double())
    table = BandedTable(weight, zipf(), objective=CLOSED_FORM["direction"])

    found = table.at_rank(6).product
    plain = SVD().decompose(weight).factors(6).product

    errors = [1 - float(F.cosine_similarity(weight, other).mean()) for other in (found, plain)]
    assert errors[0] < errors[1]


def test_errors_fall_with_size_from_near_one_to_nothing():
    errors = BandedTable(real_like(), zipf()).errors

    assert len(errors) == D
    assert all(first >= second for first, second in itertools.pairwise(errors))
    assert 0.1 < errors[0] < 1
    assert errors[-1] == 0


def test_frequent_rows_get_the_long_codes_wherever_they_are():
    frequencies = torch.ones(V, dtype=torch.float64)
    frequencies[[7, 150, 299]] = 1e6
    table = BandedTable(real_like(), frequencies)

    solution = table.solve([(3, D), (297, 2)])

    assert set(solution.order[:3].tolist()) == {7, 150, 299}
    assert set(table.at_rank(4).order[:3].tolist()) == {7, 150, 299}


def test_special_tokens_count_as_the_most_frequent():
    tokenizer = encoder_tokenizer()

    counts = count_tokens(["a b a", "a c"], tokenizer, len(tokenizer))

    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert counts[a] == 3
    assert counts[b] == 1
    assert all(counts[index] == 3 for index in tokenizer.all_special_ids)


def test_without_text_or_tokenizer_nothing_is_counted():
    tokenizer = encoder_tokenizer()

    assert count_tokens(None, tokenizer, 5) is None
    assert count_tokens(["a"], None, 5) is None
    assert count_tokens([{"input_ids": torch.tensor([[1]])}], tokenizer, 5) is None


# A table and head in a model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"])
@pytest.mark.parametrize("budget", [{"rank": 8}, {"keep_targets": 0.3}])
def test_a_saved_model_is_the_same_function(head, tied, budget, tmp_path):
    small = compress(build(head, tie_word_embeddings=tied), embeddings="autoencoder", method="svd", **budget)
    small.save_pretrained(tmp_path)

    again = load_compressed(tmp_path)

    structures = [spec["structure"] for spec in small.config.plan["modules"].values()]
    assert "autoencoder_embedding" in structures
    assert (small.config.plan.get("output_embeddings") is None) == tied
    assert largest_difference(outputs(small, inputs_for(head)), outputs(again, inputs_for(head))) == 0.0


@pytest.mark.parametrize("keep", [0.4, 0.6])
def test_the_budget_holds_with_the_order_of_the_tokens_paid_for(keep):
    dense = build("BertForMaskedLM")
    name = "embeddings.word_embeddings"

    small = compress(dense, keep_targets=keep, target_modules=[name], embeddings="autoencoder", method="svd")

    table = small.get_input_embeddings()
    stored = sum(t.numel() * t.element_size() for t in [*table.parameters(), *table.buffers()])
    assert 0.9 * keep < stored / (VOCABULARY * WIDTH * 4) <= keep + 1 / WIDTH


def test_more_tokens_are_saved_and_loaded(tmp_path):
    small = compress(build("BertForMaskedLM"), embeddings="autoencoder", method="svd", rank=8)
    before = small.get_input_embeddings().to_dense()

    small.resize_token_embeddings(VOCABULARY + 5)
    small.save_pretrained(tmp_path)
    again = load_compressed(tmp_path)

    after = again.get_input_embeddings().to_dense()
    assert torch.allclose(after[:VOCABULARY], before, atol=1e-6)
    assert torch.allclose(after[VOCABULARY:], before.mean(0).expand(5, -1), atol=1e-5)
    assert largest_difference(*(outputs(m.eval(), inputs_for("BertForMaskedLM")) for m in (small, again))) < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_training_reaches_codes_and_decoder_and_keeps_the_tie(tied):
    small = compress(
        build("GPT2LMHeadModel", tie_word_embeddings=tied), embeddings="autoencoder", method="svd", rank=8
    )
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    inputs = inputs_for("GPT2LMHeadModel")
    before = small.get_input_embeddings().to_dense().detach()

    small.train()
    small(**inputs, labels=inputs["input_ids"]).loss.backward()
    optimizer.step()

    table, head = small.get_input_embeddings(), small.get_output_embeddings()
    assert not torch.equal(table.to_dense(), before)
    assert torch.equal(table.to_dense(), head.to_dense()) == tied


def test_the_objective_is_chosen_by_name_and_recorded():
    dense = build("BertModel")
    found = {
        name: compress(dense, embeddings="autoencoder", embedding_objective=name, method="svd", rank=8)
        for name in ("loss", "direction", "published", "nonlinear")
    }

    tables = [model.get_input_embeddings().to_dense() for model in found.values()]
    assert not any(torch.allclose(*pair) for pair in itertools.combinations(tables, 2))
    assert all(m.config.plan["provenance"]["settings"]["embedding_objective"] == name for name, m in found.items())
    with pytest.raises(InputError, match="must be one of loss, direction, published, nonlinear, got 'nonsense'"):
        compress(dense, embeddings="autoencoder", embedding_objective="nonsense", rank=8)


def test_memory_of_both_modes_is_reported():
    small = compress(build("BertForMaskedLM"), embeddings="autoencoder", method="svd", rank=8)

    report = make_report(small)

    assert report.size_bytes == sum(p.numel() * p.element_size() for p in small.parameters())
    assert report.materialized_bytes == VOCABULARY * WIDTH * 4  # the tied head uses the table's


# Keeping the decoded weight


@pytest.fixture
def small():
    return compress(build("BertForMaskedLM"), embeddings="autoencoder", method="svd", rank=8).requires_grad_(False)


def kept(model):
    return [m._kept is not None for m in model.modules() if isinstance(m, Materializing)]


def test_a_kept_weight_gives_the_same_function_and_its_size_is_told(small):
    inputs = inputs_for("BertForMaskedLM")
    expected = outputs(small, inputs)

    set_materialize_(small, "once")

    assert largest_difference(outputs(small, inputs), expected) < 1e-5
    assert kept(small) == [True, False]  # the tied head uses the table's
    assert small.get_input_embeddings().materialized_bytes == VOCABULARY * WIDTH * 4
    set_materialize_(small, "each_forward")
    assert largest_difference(outputs(small, inputs), expected) == 0.0
    assert kept(small) == [False, False]


def test_a_kept_weight_follows_every_change(small):
    inputs = inputs_for("BertForMaskedLM")
    set_materialize_(small, "once")
    outputs(small, inputs)

    small.get_input_embeddings().basis.mul_(2)
    changed = outputs(small, inputs)

    set_materialize_(small, "each_forward")
    assert largest_difference(changed, outputs(small, inputs)) < 1e-5


def test_a_kept_weight_is_neither_saved_nor_copied(small, tmp_path):
    set_materialize_(small, "once")
    names = set(small.state_dict())
    outputs(small, inputs_for("BertForMaskedLM"))

    assert set(small.state_dict()) == names
    assert kept(copy.deepcopy(small)) == [False, False]


def test_gradients_are_not_lost_to_a_kept_weight(small):
    small.requires_grad_(True)
    set_materialize_(small, "once")

    small(**inputs_for("BertForMaskedLM")).logits.sum().backward()

    assert bool(small.get_input_embeddings().basis.grad.any())


def test_the_mode_is_chosen_when_loading(small, tmp_path):
    small.save_pretrained(tmp_path)

    model = type(small).from_pretrained(tmp_path, materialize="once")

    assert model.get_input_embeddings().keeps_weight
    assert model.get_output_embeddings().keeps_weight
    assert not type(small).from_pretrained(tmp_path).get_input_embeddings().keeps_weight


def test_an_unknown_mode_is_named(small):
    with pytest.raises(ValueError, match="materialize must be one of each_forward, once, got 'never'"):
        set_materialize_(small, "never")
