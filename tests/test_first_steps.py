"""What someone new is told: where the work is, what to do next, what numbers mean, which methods papers speak of."""

import io
from dataclasses import replace

import pytest
from rich.console import Console
from tiny_models import CONFIGURATIONS, build, heads_of

from hf_lowrank import compress, make_report, progress, recover
from hf_lowrank.cli.tables import print_comparison, print_matrices
from hf_lowrank.compression.settings import ComparisonOptions, CompressOptions
from hf_lowrank.evaluation import TASKS, make_task
from hf_lowrank.hosts.heads import auto_class
from hf_lowrank.hosts.latency import Latency
from hf_lowrank.methods.table import METHODS, paper_of
from hf_lowrank.records.latency import LatencyReport
from hf_lowrank.sharing.cards.usage import evaluation_task, loading_line


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so, and nothing written yet."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress.Lines, "are_wanted", True)
    monkeypatch.setattr(progress.Lines, "last", now[0])
    monkeypatch.setattr(progress, "SECONDS_A_LINE", 5.0)
    return now


def test_where_there_is_no_terminal_work_says_where_it_is_every_few_seconds(clock, capsys):
    for description in ("collecting", "measuring"):  # short ones add up
        for _ in progress.progress_bar(range(4), description):
            clock[0] += 2.0

    said = capsys.readouterr().err.splitlines()

    assert said == ["hf-lowrank: collecting, 3 of 4 done", "hf-lowrank: measuring, 2 of 4 done"]


def test_a_training_says_where_it_is_where_a_command_runs_it(clock, capsys, monkeypatch):
    dense = build("BertForMaskedLM")
    data = [{"input_ids": list(range(3, 14))} for _ in range(12)]
    said = {}
    for wanted in (True, False):
        monkeypatch.setattr(progress.Lines, "are_wanted", wanted)
        monkeypatch.setattr(progress, "SECONDS_A_LINE", 0.0)
        small = compress(dense, rank=4, method="svd")
        recover(small, teacher=dense, dataset=data, eval_dataset=data[:4], epochs=1, batch_size=4)
        said[wanted] = capsys.readouterr().err.splitlines()

    assert said[False] == []
    assert said[True][:3] == [f"hf-lowrank: training, {step} of 3 steps done" for step in (1, 2, 3)]


def test_on_a_terminal_there_is_a_bar_and_no_line(clock, capsys, monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(progress, "Console", lambda **_: terminal)

    for _ in progress.progress_bar(range(4), "collecting"):
        clock[0] += 60.0

    assert capsys.readouterr().err == ""
    assert "collecting" in terminal.file.getvalue()


@pytest.mark.parametrize("head", [head for family in CONFIGURATIONS for head in heads_of(family)])
def test_the_next_steps_name_the_class_that_loads_a_head_and_the_task_that_scores_it(head):
    model = compress(build(head), rank=2, method="svd")
    report, auto = make_report(model), auto_class(type(model)) or "AutoModel"

    task = evaluation_task(report, model)

    assert loading_line(report, "out") == f"{auto}.from_pretrained('out', trust_remote_code=True)"
    assert make_task(task).prepare(model) is model
    assert task != "agreement" or not any(head in make_task(name).heads for name in TASKS)


@pytest.mark.parametrize(
    ("config", "task"),
    [({"num_labels": 1}, "text-regression"), ({"problem_type": "multi_label_classification"}, "agreement")],
)
def test_a_classifier_of_no_classes_is_scored_by_what_it_says(config, task):
    model = compress(build("BertForSequenceClassification", **config), rank=2, method="svd")

    assert evaluation_task(make_report(model), model) == task


@pytest.mark.parametrize("speed_up", [2.0, 1.0, 0.5])
def test_a_speed_that_two_times_do_not_divide_to_says_what_it_is_in_one_line(speed_up, capsys):
    report = make_report(compress(build("BertModel"), rank=2, method="svd"))
    times = LatencyReport(8, 128, "", Latency(1.0, 1.0, 1.0, 1.0), Latency(0.9, 0.9, 0.9, speed_up))

    print_comparison(replace(report, latency=times))

    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("latency")]
    assert line.rstrip().endswith("median of rounds")


def test_no_number_without_a_scale_is_printed_of_a_compression(capsys):
    report = make_report(compress(build("BertModel"), rank=2, method="svd"))

    print_comparison(report), print_matrices(report)

    assert "error" not in capsys.readouterr().out


PAPER_NAMES = {also: name for name, row in METHODS.items() for also in row.also}


@pytest.mark.parametrize("spell", [str, str.lower, lambda name: name.replace("-", "_")])
@pytest.mark.parametrize(("called", "name"), [*PAPER_NAMES.items(), *((name.upper(), name) for name in METHODS)])
def test_a_method_is_known_by_what_its_paper_calls_it_however_it_is_spelled(called, name, spell):
    found = CompressOptions(method=spell(called), **({} if METHODS[name].ranks else {"keep_params": 0.5}))

    assert found.method == found.to_dict()["method"] == name
    assert ComparisonOptions(methods=[f"{spell(called)}:uniform"])


def test_no_two_methods_have_one_name_and_each_paper_says_its_own():
    names = [one.lower().replace("-", "").replace("_", "") for row in METHODS.values() for one in row.also]

    assert len(set(names)) == len(names)
    assert {"FWSVD", "TFWSVD", "SVD-LLM"} <= PAPER_NAMES.keys()
    assert "SVD-LLM" in paper_of("whitened_svd").title
