"""`analyze` tells what `compress` would do, by the same plans, and changes nothing."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from tiny_models import build
from tiny_tokenizers import LETTERS, encoder_tokenizer

from hf_lowrank import InputError, compress, make_report
from hf_lowrank.cli import main
from hf_lowrank.hosts.matrices import dense_weight
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.planning import timing
from hf_lowrank.planning.timing import NUM_TOKENS
from hf_lowrank.studies.analysis import analyze
from hf_lowrank.studies.analysis_report import spectrum_of

TEXTS = [" ".join(LETTERS[number:]) for number in range(24)]


@pytest.fixture(scope="module")
def dense():
    return build("BertForMaskedLM")


@pytest.fixture(scope="module")
def analysis(dense):
    return analyze(dense, method="svd")


@pytest.mark.parametrize("rank", [1, 2, 7, 30])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_effective_and_stable_rank_of_equal_singular_values_are_their_number(rank, scale):
    values = torch.zeros(40, dtype=torch.float64)
    values[:rank] = scale

    spectrum = spectrum_of(values)

    assert spectrum.effective_rank == pytest.approx(rank, rel=1e-12)
    assert spectrum.stable_rank == pytest.approx(rank, rel=1e-12)
    assert spectrum.rank_99 == rank


def test_ranks_of_energy_hold_that_much_and_no_less_would_do():
    values = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1])
    energies = values.square() / values.square().sum()

    spectrum = spectrum_of(values)

    for rank, share in ((spectrum.rank_90, 0.9), (spectrum.rank_99, 0.99)):
        assert energies[:rank].sum() >= share > energies[: rank - 1].sum()


def test_a_matrix_of_zeros_has_rank_zero():
    spectrum = spectrum_of(torch.zeros(3))

    assert (spectrum.effective_rank, spectrum.stable_rank, spectrum.rank_90, spectrum.rank_99) == (0, 0, 0, 0)


def test_a_long_spectrum_is_thinned_but_its_ends_and_its_measures_stay():
    values = torch.linspace(5, 1, 1000, dtype=torch.float64)

    spectrum = spectrum_of(values)

    assert len(spectrum.ranks) == len(spectrum.values) == 64
    assert (spectrum.ranks[0], spectrum.ranks[-1]) == (1, 1000)
    assert (spectrum.values[0], spectrum.values[-1]) == (5.0, 1.0)
    assert spectrum.stable_rank == pytest.approx(float(values.square().sum() / 25))


def test_every_matrix_is_there_with_its_shape_and_the_norm_of_its_weight(dense, analysis):
    matrices = find_matrices(dense)

    assert [(m.name, m.role, m.shape) for m in analysis.matrices] == [(m.name, m.role, m.shape) for m in matrices]
    assert analysis.matrices[-1].role == "embedding"
    for analyzed, matrix in zip(analysis.matrices, matrices, strict=True):
        squares = sum(value**2 for value in analyzed.spectrum.values)
        assert squares == pytest.approx(float(dense_weight(matrix.module).square().sum()), rel=1e-4)


def test_at_the_break_even_rank_two_factors_are_no_larger_than_the_matrix_and_beyond_it_they_are(analysis):
    for matrix in analysis.matrices:
        rows, columns = matrix.shape
        assert matrix.break_even_rank * (rows + columns) <= matrix.parameters
        assert (matrix.break_even_rank + 1) * (rows + columns) > matrix.parameters


@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("BertForMaskedLM", {"method": "svd"}),
        ("BertForMaskedLM", {"method": "svd", "embeddings": "low_rank", "storage": "pivoted"}),
        ("GPT2LMHeadModel", {"method": "whitened_svd", "allocation": "uniform"}),
        ("LlamaForCausalLM", {"embeddings": "low_rank", "dtype": "bfloat16"}),
        ("BertModel", {"rank_pattern": {"query": 3}}),
    ],
    ids=str,
)
def test_what_is_planned_is_what_compress_makes(head, options):
    dense = build(head)
    analysis = analyze(dense, keep_targets=[0.7, 0.4], **options)

    for index, planned in enumerate(analysis.budgets):
        report = make_report(compress(dense, keep_targets=planned.budget, **options))
        assert (planned.parameters, planned.size_bytes) == (report.parameters, report.size_bytes)
        assert planned.multiply_adds == report.multiply_adds
        assert analysis.dense.multiply_adds == report.dense_multiply_adds
        errors = {m.name: m.planned[index].relative_error for m in analysis.matrices if m.planned}
        modules = [m for m in report.modules if m.dense_parameters]  # not the parts they share
        assert errors == pytest.approx({m.name: m.relative_error or 0.0 for m in modules}, abs=1e-2)
        ranks = {m.name: m.planned[index].rank for m in analysis.matrices if m.planned}
        assert ranks == {m.name: m.rank for m in modules}


def test_a_half_precision_model_is_analyzed_in_its_own_size():
    dense = build("BertModel").half()

    analysis = analyze(dense, keep_targets=0.5)

    assert analysis.dense.size_bytes == 2 * analysis.dense.parameters
    assert analysis.budgets[0].size_bytes == 2 * analysis.budgets[0].parameters


def test_keep_params_speaks_of_the_whole_model_and_makes_embeddings_targets(dense):
    analysis = analyze(dense, method="svd", keep_params=[0.8, 0.5])

    assert [model.budget for model in analysis.budgets] == [0.8, 0.5]
    assert all(m.parameters <= m.budget * analysis.dense.parameters for m in analysis.budgets)
    assert len(analysis.matrices[-1].planned) == 2


def test_the_loss_is_the_sum_over_the_matrices_and_grows_as_less_is_kept(analysis):
    losses = [model.predicted_loss for model in analysis.budgets]

    assert losses == sorted(losses)
    assert losses[0] > 0
    for index, loss in enumerate(losses):
        assert loss == pytest.approx(sum(m.planned[index].predicted_loss for m in analysis.matrices if m.planned))


def test_without_text_the_loss_is_called_energy_and_with_it_damage(dense, analysis):
    measured = analyze(dense, keep_targets=0.5, calibration=TEXTS, tokenizer=encoder_tokenizer())

    assert (analysis.loss_name, analysis.budgets[0].measured_damage) == ("energy lost", None)
    assert measured.loss_name == "predicted damage"
    assert measured.budgets[0].measured_damage > 0
    assert measured.matrices[0].metric_spectrum is not None
    assert measured.matrices[-1].metric_spectrum is None


def test_energy_is_told_as_a_share_of_all_there_is(analysis):
    table = analysis.tables()[0][1]
    column = [row[table[0].index("energy\nlost")] for row in table[1:]]

    assert column[0] == "0.0%"
    assert all(0 < float(share.rstrip("%")) < 100 for share in column[1:])
    assert sum(matrix.norm for matrix in analysis.matrices if matrix.planned) > analysis.budgets[-1].predicted_loss


@pytest.mark.parametrize(
    ("damages", "words"),
    [
        ((None, None), "next: energy .* --calibration TEXT"),
        ((0.004, 0.02), r"recommended: --keep-targets 0\.4, .*\(0\.0200\)"),
        ((0.004, 0.2), r"recommended: --keep-targets 0\.8, .*\(0\.0040\)"),
        ((0.09, 0.2), r"recommended: none of these as they are; .* 0\.0900, at 0\.8; .* recover"),
    ],
)
def test_it_ends_in_the_least_budget_that_hardly_changes_what_is_said(analysis, damages, words):
    budgets = [replace(analysis.budgets[0], budget=0.8), replace(analysis.budgets[-1], budget=0.4)]
    measured = [replace(model, measured_damage=damage) for model, damage in zip(budgets, damages, strict=True)]

    assert re.match(words, replace(analysis, budgets=tuple(measured)).recommendation)


def test_nothing_is_changed():
    dense = build("BertForMaskedLM").train()
    dense.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = copy.deepcopy(dense)
    state = torch.random.get_rng_state()

    analyze(dense, keep_targets=0.5, latency=True)

    assert torch.equal(state, torch.random.get_rng_state())
    assert dense.config.to_dict() == before.config.to_dict()
    assert [m.training for m in dense.modules()] == [m.training for m in before.modules()]
    for (name, now), (old_name, was) in zip(dense.named_parameters(), before.named_parameters(), strict=True):
        assert name == old_name
        assert torch.equal(now, was)
        assert (now.requires_grad, now.grad) == (was.requires_grad, None)


def test_latency_follows_the_ranks_that_were_timed(dense, monkeypatch):
    def seconds(layer, *_):
        return 1.0 + sum(p.numel() for p in layer.parameters() if p.dim() > 1)

    monkeypatch.setattr(timing, "_time_call", seconds)

    analysis = analyze(dense, method="svd", keep_targets=0.4, storage="low_rank", latency=True)

    planned = [m.planned[0] for m in analysis.matrices if m.planned]
    assert analysis.dense.seconds == sum(1.0 + m.parameters for m in analysis.matrices if m.planned)
    assert [one.seconds for one in planned] == pytest.approx([1.0 + one.multiply_adds for one in planned])
    assert analysis.budgets[0].seconds == pytest.approx(sum(one.seconds for one in planned))
    assert any(f"{NUM_TOKENS} tokens" in cell for cell in analysis.tables()[0][1][0])


def test_bad_input_gets_one_clear_line(dense):
    spoiled = copy.deepcopy(dense)
    spoiled.bert.embeddings.word_embeddings.weight.data[3, 3] = float("nan")

    with pytest.raises(InputError, match="keep_targets names no budget"):
        analyze(dense, keep_targets=[])
    with pytest.raises(InputError, match=r"Exactly one budget .* got keep_targets, rank"):
        analyze(dense, keep_targets=0.5, rank=3)
    with pytest.raises(InputError, match=r"keep_targets=0\.01 is out of reach"):
        analyze(dense, method="svd", keep_targets=0.01)
    with pytest.raises(InputError, match=r"word_embeddings\.weight' of .* holds NaN or Inf"):
        analyze(spoiled, method="svd")


def test_the_command_prints_tables_or_one_json_object(dense, tmp_path, capsys):
    dense.save_pretrained(tmp_path / "dense")
    argv = ["analyze", str(tmp_path / "dense"), "--method", "svd", "--keep-targets", "0.5"]

    assert main(argv) == 0
    table = capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["analysis"]

    assert f"{result['budgets'][0]['parameters']:,}" in table
    assert "energy lost: share" in table
    assert table.splitlines()[-1].startswith("next: ")
    assert all(matrix["name"] in table for matrix in result["matrices"])
    assert result == json.loads(json.dumps(analyze(dense, method="svd", keep_targets=0.5).to_dict()))
