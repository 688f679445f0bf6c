"""`compare` scores methods at equal bytes, and what is done once is not done again."""

import json
import math

import pytest
from every_method import TENSOR_METHODS
from tiny_models import build
from tiny_tokenizers import LETTERS, encoder_tokenizer

from hf_lowrank import InputError, compress
from hf_lowrank.cli import main
from hf_lowrank.evaluation import make_task
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.statistics import evidence
from hf_lowrank.studies import comparison
from hf_lowrank.studies.comparison import compare
from hf_lowrank.studies.comparison_report import Cell, related

TEXTS = [" ".join(LETTERS[number:]) for number in range(20)]
OTHER = [" ".join(reversed(text.split())) for text in TEXTS]
METHODS = ["svd", "whitened_svd:uniform:low_rank", "two_sided_svd:measured:pivoted"]
BUDGETS = [0.6, 0.3]


@pytest.fixture(scope="module")
def dense():
    return build("BertForMaskedLM", num_hidden_layers=1)


def run(dense, work_dir=None, dataset=TEXTS, methods=METHODS, **options):
    task = make_task("masked-lm", block_length=16)
    options = {"budgets": BUDGETS, "tokenizer": encoder_tokenizer(), "off_calibration": OTHER} | options
    return compare(dense, dataset, task, methods=methods, work_dir=work_dir, **options)


@pytest.fixture(scope="module")
def result(dense):
    return run(dense)


@pytest.fixture
def compressions(monkeypatch):
    """What was compressed, as `method budget`."""
    made = []

    def counted(model, **options):
        made.append(f"{options['method']} {options['keep_targets']}")
        return compress(model, **options)

    monkeypatch.setattr(comparison, "compress", counted)
    return made


def test_the_dense_model_is_first_and_every_method_is_there_at_every_budget(result):
    assert [(cell.method, cell.budget) for cell in result.cells] == [
        ("dense", 1.0),
        *((method, budget) for budget in BUDGETS for method in METHODS),
    ]
    assert all(set(cell.scores) == {"held-out", "off-calibration"} for cell in result.cells)


def test_methods_are_compared_at_equal_bytes(dense, result):
    whole = 4 * sum(matrix.num_weights for matrix in find_matrices(dense) if matrix.role == "block")

    for cell in result.cells[1:]:
        assert 0.97 * cell.budget * whole < cell.target_bytes <= cell.budget * whole
        assert cell.size_bytes == result.cells[0].size_bytes - whole + cell.target_bytes


@pytest.mark.usefixtures("hardly_trained")
def test_methods_that_take_matrices_together_are_compared_like_any_other():
    together = [name for name, method in TENSOR_METHODS.items() if method.ranks is None]
    dense = build("BertForMaskedLM")
    whole = 4 * sum(matrix.weight.numel() for matrix in find_matrices(dense) if matrix.role == "block")

    found = run(dense, methods=["svd", *together], budgets=[0.8], off_calibration=None).cells

    assert [cell.method for cell in found] == ["dense", "svd", *together]
    assert all(0 < cell.target_bytes <= 0.8 * whole for cell in found[1:])
    assert all(math.isfinite(cell.scores["held-out"]["perplexity"]) for cell in found)


def test_scores_are_those_of_evaluating_what_compress_makes(dense, result):
    small = compress(
        dense,
        keep_targets=0.3,
        method="whitened_svd",
        allocation="uniform",
        storage="low_rank",
        tokenizer=encoder_tokenizer(),
    )
    task = make_task("masked-lm", block_length=16)
    cell = next(cell for cell in result.cells if (cell.method, cell.budget) == ("whitened_svd:uniform:low_rank", 0.3))

    for text, data in (("held-out", TEXTS), ("off-calibration", OTHER)):
        alone = task.evaluate(small, encoder_tokenizer(), data)
        assert alone.items() <= cell.scores[text].items()
        assert cell.scores[text]["kl_from_dense"] > 0


def test_it_scores_on_as_many_examples_as_it_is_told(dense):
    found = compare(
        dense, TEXTS, "masked-lm", tokenizer=encoder_tokenizer(), methods="svd", budgets=[0.5], max_examples=3
    )

    assert {scores["examples"] for cell in found.cells for scores in cell.scores.values()} == {3.0}


def test_g_is_the_logarithm_of_the_ratio_of_perplexities(result):
    dense = result.cells[0].scores["held-out"]["perplexity"]

    for cell in result.cells:
        perplexity = cell.scores["held-out"]["perplexity"]
        assert cell.g["held-out"] == pytest.approx(math.log(perplexity / dense))
        assert cell.change["held-out"] == pytest.approx(perplexity - dense)


def cell(method, budget, perplexity):
    scores = {"held-out": {"perplexity": perplexity}}
    return Cell(method, budget, 1, 4, None, 1, scores, g={}, relative_g={}, change={}, verdict={})


def test_relative_g_is_that_over_the_baseline_of_the_same_budget():
    made = [("dense", 1.0, 10.0), ("svd", 0.6, 40.0), ("best", 0.6, 20.0), ("svd", 0.3, 80.0), ("best", 0.3, 20.0)]

    cells = list(related([cell(*one) for one in made], "perplexity", "svd", False))

    relatives = [cell.relative_g["held-out"] for cell in cells[1:]]
    assert relatives == pytest.approx([1, 1 / 2, 1, 1 / 3])


def test_nothing_is_relative_to_a_baseline_that_lost_nothing():
    made = [cell("dense", 1.0, 10.0), cell("svd", 0.6, 9.0), cell("best", 0.6, 20.0)]

    assert [one.relative_g for one in related(made, "perplexity", "svd", False)] == [{}, {}, {}]


def test_the_standard_is_the_baseline_however_it_is_spelled(dense, result):
    spelled = run(dense, methods=["svd", "whitened_svd:uniform:low_rank:0"], budgets=[0.5])

    assert result.baseline == "whitened_svd:uniform:low_rank"
    assert spelled.baseline == "whitened_svd:uniform:low_rank:0"
    assert run(dense, methods=["svd"], budgets=[0.5]).baseline is None


def test_a_killed_comparison_goes_on_where_it_was(dense, result, tmp_path, monkeypatch, compressions):
    counted = comparison.compress

    def killed(model, **options):
        if len(compressions) == 4:
            raise KeyboardInterrupt
        return counted(model, **options)

    monkeypatch.setattr(comparison, "compress", killed)
    with pytest.raises(KeyboardInterrupt):
        run(dense, tmp_path)
    monkeypatch.setattr(comparison, "compress", counted)
    resumed = run(dense, tmp_path)

    assert len(compressions) == len(set(compressions)) == len(METHODS) * len(BUDGETS)
    assert resumed == result
    assert run(dense, tmp_path) == result
    assert len(compressions) == len(METHODS) * len(BUDGETS)


def test_a_line_that_a_kill_cut_short_is_done_again_and_harms_no_other(dense, tmp_path, compressions):
    first = run(dense, tmp_path, methods=["svd"])
    record = tmp_path / "comparison.jsonl"
    record.write_bytes(record.read_bytes()[:-20])
    compressions.clear()

    assert run(dense, tmp_path, methods=["svd"]) == first
    assert compressions == ["svd 0.3"]
    assert run(dense, tmp_path, methods=["svd"]) == first
    assert compressions == ["svd 0.3"]


def test_another_text_model_or_setting_is_not_taken_for_done(dense, tmp_path, compressions):
    for options in ({}, {"dataset": TEXTS[1:]}, {"seed": 1}, {"exclude_modules": ["key"]}):
        run(dense, tmp_path, methods=["svd"], budgets=[0.5], **options)
    run(build("BertForMaskedLM", num_hidden_layers=1, seed=5), tmp_path, methods=["svd"], budgets=[0.5])

    assert len(compressions) == 5


def test_a_second_text_costs_no_second_evaluation_of_the_first(dense, tmp_path):
    run(dense, tmp_path, methods=["svd"], budgets=[0.5], off_calibration=None)
    run(dense, tmp_path, methods=["svd"], budgets=[0.5])

    lines = [json.loads(line) for line in (tmp_path / "comparison.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["held-out", "held-out", "off-calibration", "off-calibration"]


def test_statistics_are_collected_once_for_all_budgets(dense, monkeypatch):
    collected = []
    collect = evidence.collect_statistics
    monkeypatch.setattr(
        evidence,
        "collect_statistics",
        lambda *args, **kwargs: collected.append(args[3]) or collect(*args, **kwargs),
    )

    run(dense, methods=["two_sided_svd", "two_sided_svd:uniform"], calibration=TEXTS)

    assert len(collected) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["svd:uniform:pivoted:1:2"]}, r"spelled NAME\[:ALLOCATION.*got 'svd:uniform:pivoted:1:2'"),
        ({"methods": ["svd:::two"]}, r"spelled NAME\[:ALLOCATION"),
        ({"methods": ["cvd"]}, "methods must be one of .*got 'cvd'. Closest: 'svd'"),
        ({"methods": ["svd:even"]}, "allocation must be one of .*got 'even'"),
        ({"methods": []}, "nothing to compare"),
        ({"budgets": []}, "nothing to compare"),
        ({"baseline": "two_sided_svd:uniform"}, "baseline 'two_sided_svd:uniform' is not among the methods"),
        ({"keep_params": 0.5}, "Exactly one budget"),
        ({"sede": 1}, "compare has no option 'sede'. Closest: 'seed'"),
    ],
)
def test_bad_input_gets_one_clear_line(dense, options, message):
    with pytest.raises(InputError, match=message):
        run(dense, **options)


def test_without_a_head_models_are_compared_by_the_cosine_of_their_embeddings(dense):
    task = make_task("agreement", max_seq_length=16)

    result = compare(dense.base_model, TEXTS, task, methods="svd", budgets=[0.5], tokenizer=encoder_tokenizer())

    assert result.metric == "cosine_to_dense"
    assert 0 < result.score(result.cells[1], "held-out") < 1
    assert result.tables()[0][1][1][-1] == ""


def test_the_command_prints_a_table_or_one_json_object(dense, tmp_path, capsys):
    dense.save_pretrained(tmp_path / "dense")
    encoder_tokenizer().save_pretrained(tmp_path / "dense")
    (tmp_path / "test.txt").write_text("\n".join(TEXTS))
    argv = ["compare", str(tmp_path / "dense"), "--dataset", str(tmp_path / "test.txt"), "--task", "masked-lm"]
    argv += [
        "--methods",
        "svd",
        "whitened_svd:uniform:low_rank",
        "--keep-targets",
        "0.5",
        "--work-dir",
        str(tmp_path / "work"),
    ]

    assert main(argv) == 0
    table = capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["comparison"]

    assert [cell["method"] for cell in result["cells"]] == ["dense", "svd", "whitened_svd:uniform:low_rank"]
    assert all(f"{cell['scores']['held-out']['perplexity']:,.2f}" in table for cell in result["cells"])
    assert "g0: that of whitened_svd:uniform:low_rank" in table
