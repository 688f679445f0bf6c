"""Which models and matrices are compressed: patterns as in PEFT, ranks by name, options that name a row of a table."""

import pytest
import torch
import transformers
from tiny_architectures import build_architecture
from tiny_models import build

from hf_lowrank import InputError, compress, decompress, make_report
from hf_lowrank.compression.settings import CompressOptions
from hf_lowrank.hosts import targets
from hf_lowrank.hosts.targets import find_matrices, matching, select_matrices
from hf_lowrank.remote_code.lowrank_structures import named_structures


@pytest.fixture(scope="module")
def medium():
    return build("BertForMaskedLM", hidden_size=96, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384)


def svd(model, **options):
    return compress(model, method="svd", **options)


def ranks(model):
    return {name: module.rank for name, module in named_structures(model)}


def test_rank_is_the_rank_of_every_matrix_of_the_blocks(medium):
    small = svd(medium, rank=7)

    assert set(ranks(small).values()) == {7}
    assert {type(module).__name__ for _, module in named_structures(small)} == {"LowRankLinear"}
    assert len(ranks(small)) == sum(matrix.role == "block" for matrix in find_matrices(medium))


def test_rank_asks_for_the_embedding_when_it_is_told_to(medium):
    small = svd(medium, rank=7, embeddings="low_rank")

    assert ranks(small)["bert.embeddings.word_embeddings"] == 7
    assert small.cls.predictions.decoder.rank == 7


@pytest.mark.parametrize("options", [{"rank": 1000}, {"rank": 1, "rank_pattern": {"query": 1000}}])
def test_a_rank_above_the_matrix_is_named_with_its_bounds(medium, options):
    with pytest.raises(InputError, match=r"rank of '[\w.]+' must be between 1 and 96, got 1000\."):
        svd(medium, **options)


def test_rank_pattern_overrules_the_budget_and_later_keys_overrule_earlier(medium):
    small = svd(medium, keep_params=0.5, rank_pattern={"query": 3, "layer.1.attention.self.query": 5})

    found = {name: rank for name, rank in ranks(small).items() if name.endswith("query")}
    assert [found[f"bert.encoder.layer.{i}.attention.self.query"] for i in range(4)] == [3, 5, 3, 3]
    assert 0.4975 <= make_report(small).kept_fraction <= 0.5


@pytest.mark.parametrize(
    ("target", "exclude", "count"),
    [
        (["query"], None, 4),
        (["query", "attention.output.dense"], None, 8),
        (["dense"], ["intermediate.dense"], 8),
        ("bert.encoder.layer.[02].*.(key|value)", None, 4),
        (r".*\.(key|value)", r".*\.0\..*", 6),
        ("all-linear", None, 24),
        ("all-linear", ["layer.0.output.dense"], 23),
        (["word_embeddings"], None, 1),
    ],
)
def test_patterns_mean_what_they_mean_in_peft(medium, target, exclude, count):
    chosen = select_matrices(find_matrices(medium), {"block"}, target, exclude)

    assert len(chosen) == count


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_matches_nothing_is_named_with_the_closest_name(medium, option):
    value = {"querry": 3} if option == "rank_pattern" else ["querry"]

    with pytest.raises(InputError, match=rf"{option} 'querry' matches none of the 25 .*Closest: '[\w.]+'"):
        svd(medium, rank=2, **{option: value})


def test_a_list_holds_whole_parts_of_names(medium):
    with pytest.raises(InputError, match="target_modules 'uery' matches none"):
        select_matrices(find_matrices(medium), {"block"}, ["uery"], None)


def test_excluding_everything_is_refused(medium):
    with pytest.raises(InputError, match="exclude_modules leaves nothing to compress"):
        svd(medium, rank=2, exclude_modules=".*")


def test_a_broken_regular_expression_is_refused(medium):
    with pytest.raises(InputError, match=r"'\(query' is not a regular expression"):
        matching(find_matrices(medium), "(query", "target_modules")


@pytest.mark.parametrize("pattern", ["(a|a|[a-z]|.)+[!?]", r"((.|\w)+)+\d"])
def test_a_regular_expression_that_does_not_end_is_refused(medium, monkeypatch, pattern):
    monkeypatch.setattr(targets, "_MATCHING_SECONDS", 0.1)

    with pytest.raises(InputError, match="takes too long to match 'encoder"):
        matching(find_matrices(medium), pattern, "target_modules")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("method", "svdd", "method must be one of .*svd.*, got 'svdd'"),
        ("allocation", "fair", "allocation must be one of .*uniform.*, got 'fair'"),
        ("embeddings", "tiny", "embeddings must be one of low_rank, .*got 'tiny'"),
    ],
)
def test_an_unknown_choice_is_answered_with_the_known_ones(option, value, said):
    with pytest.raises(InputError, match=said):
        CompressOptions(rank=1, **{option: value})


def test_an_unknown_option_is_answered_with_the_closest(medium):
    with pytest.raises(InputError, match=r"no option 'keep_parms'. Closest: 'keep_params'"):
        svd(medium, keep_parms=0.5)


# Models


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_named_and_the_model_unchanged(value):
    model = build("BertForMaskedLM")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[3, 4] = value

    with pytest.raises(InputError, match=r"layer.1.output.dense.weight' of .* holds NaN or Inf\. Repair it"):
        svd(model, inplace=True, keep_params=0.5)

    assert not named_structures(model)
    assert type(model) is transformers.BertForMaskedLM


def test_a_compressed_model_is_not_compressed_again():
    with pytest.raises(InputError, match=r"LowRankBertModel is compressed already. Decompress it first"):
        svd(svd(build("BertModel"), rank=2), rank=2)


def test_a_dense_model_is_not_decompressed():
    with pytest.raises(InputError, match="BertModel is not a compressed model"):
        decompress(build("BertModel"))


def test_a_model_without_blocks_of_matrices_is_refused():
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")

    with pytest.raises(InputError, match=r"ResNetModel has no blocks .*Supported is every .*BERT, GPT-2"):
        svd(transformers.ResNetModel(config), rank=2)


@pytest.mark.parametrize("embeddings", ["low_rank", "autoencoder"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("T5ForConditionalGeneration", {}),
        ("PegasusForConditionalGeneration", {}),
        ("ViTForImageClassification", {}),
        ("BertForMaskedLM", {"target_modules": ["query"]}),
    ],
)
def test_a_table_that_is_asked_for_by_name_is_not_left_dense_without_a_word(name, options, embeddings):
    dense = build(name) if name.startswith("Bert") else build_architecture(name)

    with pytest.raises(InputError, match=f"embeddings='{embeddings}' finds no table to replace"):
        compress(dense, rank=2, method="svd", embeddings=embeddings, **options)
