"""Tensor methods from end to end: sizes as published, the same function after every trip, clear refusals."""

import copy
import json
from itertools import product

import pytest
import torch
from elsewhere import assert_same_elsewhere
from every_method import TENSOR_METHODS
from safetensors.torch import load_file
from tiny_models import WIDTH, assert_same_function, build, inputs_for
from transformers import BertConfig, BertModel

from hf_lowrank import analyze, cli, compress, decompress, make_report
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.problem import Problem
from hf_lowrank.methods.stacking import in_group
from hf_lowrank.methods.table import METHODS
from hf_lowrank.methods.tensor_ranks import ranks_within
from hf_lowrank.methods.tucker.ranks import tucker_ranks
from hf_lowrank.methods.tucker.tucker import TuckerRanks, hosvd, relative_error
from hf_lowrank.planning.budgets import Budget
from hf_lowrank.planning.sizes import overhead_bytes, parameter_bytes
from hf_lowrank.remote_code.configuration_lowrank import compressed_config_class
from hf_lowrank.remote_code.modeling_lowrank import compressed_model_class
from hf_lowrank.statistics.evidence import Evidence

HEADS = ["BertForMaskedLM", "GPT2LMHeadModel", "DistilBertForMaskedLM", "LlamaForCausalLM"]
FREE = [name for name, method in TENSOR_METHODS.items() if method.ranks is None]
# As the paper counts them: all but the word embeddings; in millions.
PUBLISHED = {
    "tucker-IV-72-384": 12.32,
    "tucker-III-64": 1.79,
    "tucker-IV-36-128": 1.90,
    "tucker-IV-36-256": 3.86,
    "tucker-III-384": 22.9,
}
pytestmark = pytest.mark.usefixtures("hardly_trained")
each_head = pytest.mark.parametrize("head", HEADS)
each_method = pytest.mark.parametrize("method", FREE)


def skeleton(dense, method):
    """A compressed model of a named size without any numbers."""
    row, matrices = METHODS[method], in_group(find_matrices(dense), "both")
    problem = Problem(dense, matrices, Evidence(dense, matrices), method, Budget("ranks", max(row.ranks), row.ranks))
    modules, shared = row.method.specs(problem, row.ranks)
    config = copy.deepcopy(dense.config)
    config.__class__ = compressed_config_class(type(dense.config))
    config.compression = {"format_version": 1, "modules": modules, "shared": shared, "provenance": {}}
    with torch.device("meta"):
        return compressed_model_class(type(dense))(config)


def test_sizes_are_those_published():
    assert set(PUBLISHED) == {name for name, method in TENSOR_METHODS.items() if method.ranks is not None}
    with torch.device("meta"):
        dense = BertModel(BertConfig())
    words = dense.embeddings.word_embeddings.weight.numel()
    reports = {method: make_report(skeleton(dense, method)) for method in PUBLISHED}

    for method, millions in PUBLISHED.items():
        counted = (reports[method].parameters - reports[method].embedding_parameters) / 1e6
        assert round(counted, 1 if millions == 22.9 else 2) == millions
        assert round((reports[method].dense_parameters - words) / 1e6, 2) == 86.04


def test_ratios_are_those_published():
    with torch.device("meta"):
        dense = BertModel(BertConfig())
    seventh, tiny = (make_report(skeleton(dense, name)) for name in ("tucker-IV-72-384", "tucker-III-64"))

    assert round(1 / seventh.kept_encoder_fraction, 1) == 7.0  # all but the word embeddings
    assert 1 / tiny.kept_encoder_fraction == pytest.approx(47.9, abs=0.15)
    assert round(1 / seventh.kept_targets_fraction, 1) == 7.6  # the factors alone
    assert round(1 / tiny.kept_targets_fraction) == 123
    assert seventh.kept_fraction > 0.3  # with the word embeddings, which are nearly all of it by then


@each_head
@pytest.mark.parametrize("group", ["attention", "feed_forward", "both"])
def test_full_ranks_give_the_dense_model(head, group):
    dense = build(head).double()

    small = compress(dense, method="tucker", ranks=(WIDTH, WIDTH), group=group)

    assert_same_function(dense, small, inputs_for(head), tolerance=1e-10)


@each_head
def test_a_full_bank_gives_the_dense_model(head):
    dense = build(head).double()
    blocks = sum(-(-m.shape[0] // WIDTH) * -(-m.shape[1] // WIDTH) for m in find_matrices(dense) if m.role == "block")

    small = compress(dense, method="tucker", ranks=(blocks, WIDTH, WIDTH))

    assert_same_function(dense, small, inputs_for(head), tolerance=1e-10)


@each_head
@each_method
def test_the_reconstructed_dense_model_computes_the_same(head, method):
    small = compress(build(head).double(), method=method, keep_targets=0.4)

    assert_same_function(small, decompress(small), inputs_for(head), tolerance=1e-10)


@each_method
@pytest.mark.parametrize("keep", [0.15, 0.3, 0.6])
def test_a_budget_is_kept_and_used(method, keep):
    if method == "separated_nonlinear_autoencoder" and keep < 0.3:
        pytest.skip("at this width its decoders alone are as large as that")
    report = make_report(compress(build("BertForMaskedLM"), method=method, keep_targets=keep))

    assert 0.9 * keep < report.kept_targets_fraction <= keep


@each_method
def test_a_budget_of_the_whole_model_is_kept(method):
    dense = build("BertForMaskedLM", vocab_size=200)
    small = compress(dense, method=method, keep_params=0.7)

    assert sum(p.numel() for p in small.parameters()) <= 0.7 * sum(p.numel() for p in dense.parameters())


@each_method
def test_a_size_of_the_saved_folder_is_kept(method, tmp_path):
    dense = build("BertForMaskedLM", vocab_size=200)
    asked = overhead_bytes(dense, [METHODS[method].method.structure]) + 0.7 * parameter_bytes(dense)
    compress(dense, method=method, target_size=asked).save_pretrained(tmp_path)

    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= asked


def test_saved_models_load_without_this_library(tmp_path):
    heads = {
        "whitened_tucker": "BertForMaskedLM",
        "shared_tensor_train": "GPT2LMHeadModel",
        "kronecker_sum": "DistilBertForMaskedLM",
    }
    cases = {name: (head, compress(build(head), method=name, keep_targets=0.4)) for name, head in heads.items()}

    assert_same_elsewhere(cases, tmp_path)

    for name, (_, small) in cases.items():
        stored = load_file(tmp_path / name / "model.safetensors")
        assert sum(value.numel() for value in stored.values()) == sum(p.numel() for p in small.parameters())


@pytest.mark.parametrize("pair", [("tucker", "whitened_tucker"), ("tensor_train", "whitened_tensor_train")])
def test_whitening_loses_less_of_what_the_matrices_give(pair):
    dense = build("BertModel")
    with torch.no_grad():  # inputs of very different size, as real ones are
        for layer in dense.encoder.layer:
            for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
                norm.weight.mul_(torch.logspace(0.5, -1.5, len(norm.weight)))
    generator = torch.Generator().manual_seed(5)
    batches = [{"input_ids": torch.randint(3, 97, (8, 24), generator=generator)} for _ in range(4)]

    plain, aware = (
        lost_of_outputs(dense, compress(dense, method=method, keep_targets=0.4, calibration=batches), batches[0])
        for method in pair
    )

    assert aware < 0.8 * plain


def lost_of_outputs(dense, small, batch):
    """Squared error of what every replaced matrix gives, on the dense model's own inputs."""
    lost = []
    hooks = [
        matrix.module.register_forward_hook(
            lambda module, inputs, output, path=matrix.path: lost.append(
                float((small.get_submodule(path)(inputs[0]) - output).square().sum())
            )
        )
        for matrix in in_group(find_matrices(dense), "both")
    ]
    with torch.no_grad():
        dense(**batch)
    for hook in hooks:
        hook.remove()
    return sum(lost)


def test_the_input_is_left_alone_and_inplace_uses_it():
    dense = build("BertForMaskedLM")
    before = copy.deepcopy(dense.state_dict())

    compress(dense, method="tucker", rank=8)
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())

    small = compress(dense, method="tucker", rank=8, inplace=True)
    assert small is dense
    assert small.config.plan["shared"]["tucker_factors"]["left_rank"] == 8


def test_the_dtype_asked_for_is_that_of_every_part():
    small = compress(build("BertModel"), method="tucker", ranks=(5, 8, 8), dtype="bfloat16")

    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", [name for name in FREE if "nonlinear" not in name])  # trained: seconds, and chaotic
def test_a_16_bit_model_gives_nearly_what_it_would_in_32_bits(method):
    dense = build("BertModel").bfloat16()
    found, wanted = (
        compress(model, method=method, keep_targets=0.8) for model in (dense, copy.deepcopy(dense).float())
    )

    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    inputs = {"input_ids": torch.arange(3, 15)[None]}
    with torch.no_grad():
        outputs = [model.float()(**inputs).last_hidden_state for model in (found, wanted)]
    assert (outputs[0] - outputs[1]).norm() <= 0.1 * outputs[1].norm()


@pytest.mark.parametrize("budget", [13, 25, 40, 70])
def test_a_budget_picks_the_ranks_that_keep_the_largest_share_of_each_block(budget):
    generator = torch.Generator().manual_seed(0)
    decay = torch.tensor([3.0, 1, 0.3, 0.1])
    stack = torch.randn(4, 4, 4, dtype=torch.float64, generator=generator) * decay * decay[:, None]
    every = [TuckerRanks(*sizes) for sizes in product(range(1, 5), range(1, 5), [1, 2, None])]
    affordable = [ranks for ranks in every if ranks.num_weights(4, 4, 4) <= budget]

    stack /= stack.flatten(1).norm(dim=1)[:, None, None]
    errors = {ranks: relative_error(stack, hosvd(stack, ranks)) for ranks in affordable}
    blocks_of_all_sizes = stack * decay[:, None, None]

    found = tucker_ranks(blocks_of_all_sizes, budget)
    assert found in affordable
    assert errors[found] == pytest.approx(min(errors.values()), abs=1e-9)


def test_a_budget_below_ranks_of_one_picks_none():
    assert tucker_ranks(torch.randn(4, 4, 4), budget=8) is None


def test_a_budget_picks_a_bank_where_blocks_are_mixed_from_one():
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(2, 6, 6, generator=generator)
    stack = torch.tensordot(torch.randn(12, 2, generator=generator), bank, dims=1)

    assert tucker_ranks(stack, budget=2 * 36 + 12 * 2 + 2 * 36) == TuckerRanks(6, 6, 2)


@pytest.mark.parametrize("budget", [5, 14, 30, 41])
def test_a_budget_picks_the_ranks_whose_worst_matrix_loses_least(budget):
    spectra = [torch.tensor(values) for values in ([9.0, 1, 0.5, 0.1], [5.0, 3, 1, 1], [4.0, 4, 2, 1])]
    prices = 2, 5, 3

    def cost(ranks):
        return sum(rank * price for (rank,), price in zip(ranks, prices, strict=True))

    def worst(ranks):
        return max(float(s[rank:].norm() / s.norm()) for s, (rank,) in zip(spectra, ranks, strict=True))

    found = ranks_within([[values] for values in spectra], cost, budget)
    affordable = [r for r in product([(1,), (2,), (3,), (4,)], repeat=3) if cost(r) <= budget]

    if not affordable:
        assert found is None
    else:
        assert cost(found) <= budget
        assert worst(found) == pytest.approx(min(map(worst, affordable)), abs=1e-6)


def test_all_kronecker_products_give_the_dense_model():
    dense = build("BertForMaskedLM").double()

    small = compress(dense, method="kronecker_sum", rank=WIDTH, group="attention")  # square, so that is full

    assert_same_function(dense, small, inputs_for("BertForMaskedLM"), tolerance=1e-10)


def test_as_many_kronecker_products_in_every_matrix():
    for given in ({"rank": 3}, {"ranks": (3,)}):
        modules = compress(build("BertModel"), method="kronecker_sum", **given).config.plan["modules"]

        assert list(modules.values()) == 12 * [{"structure": "kronecker_sum", "rank": 3}]


def test_the_report_counts_shared_parts_once():
    small = compress(build("BertModel"), method="tucker", ranks=(5, 8, 7))
    report = make_report(small)
    rows = {row.name: row for row in report.modules}

    assert rows["tucker_factors"].parameters == WIDTH * (8 + 7) + 5 * 8 * 7
    assert sum(row.parameters for row in report.modules) == report.parameters - (
        report.dense_parameters - sum(row.dense_parameters for row in report.modules)
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "tucker"}, "Exactly one budget"),
        ({"method": "tucker-III-64", "keep_targets": 0.5}, "Exactly one budget .* got keep_targets, ranks"),
        ({"method": "tucker-III-64"}, "left rank must be between 1 and 36 for"),
        ({"method": "tucker", "ranks": (1, 2, 3, 4)}, "two .* or three .* got 4"),
        ({"method": "tucker", "ranks": (0, 2)}, "whole numbers of at least 1"),
        ({"method": "tensor_train", "ranks": (99, 2)}, r"left_rank must be between 1 and \d+"),
        ({"method": "kronecker_sum", "ranks": (3, 4)}, r"sum of Kronecker products is one, .* got \[3, 4\]"),
        ({"method": "kronecker_sum", "rank": 99}, r"query: rank must be between 1 and \d+ for a sum .*got 99\."),
        ({"method": "tucker", "keep_targets": 0.001}, r"keep_targets=0.001 is out of reach.*smallest.*0\.00"),
        ({"method": "svd", "ranks": (3, 3)}, "ranks does not go with method=svd"),
        ({"method": "tucker", "rank": 3, "allocation": "energy"}, "allocation does not go with method=tucker"),
        ({"method": "tucker", "rank": 3, "storage": "pivoted"}, "storage does not go with"),
        ({"method": "tucker", "rank": 3, "embeddings": "low_rank"}, "embeddings does not go with"),
        ({"method": "tucker", "rank": 3, "group": "heads"}, "group must be one of attention"),
    ],
)
def test_what_cannot_be_done_is_said(options, message):
    with pytest.raises(InputError, match=message):
        compress(build("BertModel"), **options)


def test_the_command_line_takes_ranks(tmp_path, capsys):
    build("BertModel").save_pretrained(tmp_path / "dense")
    command = ["compress", str(tmp_path / "dense"), str(tmp_path / "small"), "--method", "tucker"]

    assert cli.main([*command, "--ranks", "4", "8", "8", "--json", "--no-latency"]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert {row["structure"] for row in report["modules"]} == {"tucker_bank", "banked_tucker"}
    assert len(report["modules"]) == 1 + 2 * 6
    assert cli.main([*command, "--keep-targets", "0.3", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["shared"]


def test_analysis_of_single_matrices_refuses_a_tensor_method():
    with pytest.raises(InputError, match=r"has none\. Use compare"):
        analyze(build("BertModel"), method="tucker", keep_targets=0.5)


def test_nothing_is_run_for_a_method_that_looks_at_no_text(monkeypatch):
    monkeypatch.setattr(Evidence, "calibration", property(lambda _: pytest.fail("looked at text")))

    compress(build("BertModel"), method="tucker", keep_targets=0.3)
