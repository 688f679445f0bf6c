"""Every known way to be given something bad ends in one line: the table of what was once met otherwise."""

import inspect
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from examining import complaint
from fuzzing import LINES, copy_world, write_world

import hf_lowrank
from hf_lowrank import cli, compress, evaluate, recover
from hf_lowrank.cli import main
from hf_lowrank.errors import InputError
from hf_lowrank.files.scratch import claimed
from hf_lowrank.hosts.loading import load_dense, load_tokenizer


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-line") / "world"
    folder.mkdir()
    write_world(folder)
    return folder


@pytest.fixture
def world(untouched, tmp_path, monkeypatch):
    copy_world(untouched, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return tmp_path / "world"


COMPRESS, EVALUATE = LINES["compress"], LINES["evaluate"]
LM = "evaluate gpt2 --task causal-lm --dataset texts.txt --no-cost"
AWARE = "compress dense out --rank 2 --method whitened_svd --fast --no-latency --calibration"

RECOVER, LPAF = LINES["recover"], LINES["lpaf"]
FOREVER = "(.+)+" * 6 + "z"
HUGE = "1" + "0" * 20

# what it is -> a line of options, and what is said
OPTIONS = {
    "a block without a token": (f"{LM} --block-length 0", r"block.length"),
    "a device without numbers": (f"{EVALUATE} --device meta", r"meta"),
    "a device without numbers, compressing": (f"{COMPRESS} --device meta", r"meta"),
    "a huge seed": (f"{AWARE} texts.txt --seed {HUGE}", r"seed"),
    "a negative seed": (f"{AWARE} texts.txt --seed -1", r"seed"),
    "a learning rate that is no number": (f"{RECOVER} --learning-rate nan", r"learning.rate"),
    "a negative learning rate": (f"{RECOVER} --learning-rate -1", r"learning.rate"),
    "passes without end": (f"{RECOVER} --epochs inf", r"epochs"),
    "negative passes": (f"{LPAF} --prune-epochs -1", r"prune.epochs"),
    "1e20 passes of refinement": (f"{AWARE} texts.txt --refine-passes {HUGE}", r"refine.passes"),
    "a rank given twice": (f"{COMPRESS} --rank-pattern query=2 query=3", r"rank_pattern names 'query' twice"),
    "a rank in two flags": (
        f"{COMPRESS} --rank-pattern key=2 --rank-pattern key=2",
        r"rank_pattern names 'key' twice",
    ),
    "a loss given twice": (f"{RECOVER} --losses logits=1 logits=2", r"losses names 'logits' twice"),
    "a loss of no weight": (f"{RECOVER} --losses logits=nan", r"losses?.*nan"),
    "an expression that takes forever": (f"{COMPRESS} --target-modules {FOREVER}", r"target_modules"),
    "no such folder": (COMPRESS.replace("dense", "nowhere/at-all"), r"nowhere/at-all"),
    "no such model to inspect": ("inspect nowhere", r"nowhere"),
}


@pytest.mark.parametrize(("line", "message"), OPTIONS.values(), ids=OPTIONS)
def test_a_bad_option_gets_one_line(world, capsys, line, message):
    assert_one_line(line, world, capsys, message)


def assert_one_line(line, world, capsys, message):
    assert complaint(line.split(), world) is None
    assert main(line.split()) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (world / "out").exists()


def config_with(**values):
    def write(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return write


def of_bytes(content):
    return lambda path: path.write_bytes(content)


def nested(depth):
    return b'{"a":' * depth + b"1" + b"}" * depth


def pickled(path):
    torch.save({"x": InputError("not weights")}, path.with_name("pytorch_model.bin"))
    path.unlink()


def indexed(path):
    path.with_name("model.safetensors.index.json").write_text("{}")
    path.unlink()


def of_odd_provenance(path):
    path.write_text(path.read_text().replace('"provenance": {', '"provenance": 7, "x": {'))


LAYERS = 10**7
ROWS = b'{"sentence": "a", "label": 0}\n'
CONFIG, WEIGHTS = "dense/config.json", "dense/model.safetensors"
# what it is -> file, how it is spoiled, a line that reads it, and what is said; None where it may be fine too
FILES = {
    "rows of mixed types": ("dev.tsv", of_bytes(ROWS + b"[1]\n"), EVALUATE.replace("dev.tsv", "rows.jsonl"), None),
    "rows that are lists": ("rows.jsonl", of_bytes(ROWS + b"[1]\n"), f"{EVALUATE} --dataset rows.jsonl", r"row 2"),
    "a large cell": ("dev.tsv", of_bytes(b"sentence\tlabel\n" + b"x" * 200_000 + b"\t1\n"), EVALUATE, None),
    "deep JSON": ("rows.json", of_bytes(nested(100_000)), f"{AWARE} rows.json", r"rows.json"),
    "a lone surrogate": ("rows.jsonl", of_bytes(b'{"text": "\\ud800"}\n' * 20), f"{AWARE} rows.jsonl", r"rows.jsonl"),
    "texts that are no UTF-8": ("rows.txt", of_bytes(b"\xff\xfe\xff"), f"{AWARE} rows.txt", r"rows.txt"),
    "a refused pickle": (WEIGHTS, pickled, COMPRESS, r"dense"),
    "an index without a map": (WEIGHTS, indexed, COMPRESS, r"dense"),
    "an odd architecture": (CONFIG, config_with(architectures=[7]), COMPRESS, r"dense"),
    "architectures that are none": (CONFIG, config_with(architectures="Bert"), COMPRESS, r"dense"),
    "an odd type": (CONFIG, config_with(dtype="float31"), COMPRESS, r"dense"),
    "a deep configuration": (CONFIG, of_bytes(nested(100_000)), COMPRESS, r"config.json"),
    "a deep report": ("small/compression_report.json", of_bytes(nested(100_000)), "card small", r"report.json"),
    "a configuration that is a list": (CONFIG, of_bytes(b"[]"), COMPRESS, r"config.json"),
    "a compressed one that is a number": ("small/config.json", of_bytes(b"7"), "inspect small", r"config.json"),
    "ten million layers": (CONFIG, config_with(num_hidden_layers=LAYERS), COMPRESS, r"num_hidden_layers"),
    "ten million compressed": ("small/config.json", config_with(num_hidden_layers=LAYERS), "inspect small", r"layers"),
    "a card that is no UTF-8": ("small/README.md", of_bytes(b"\xff\xfe---"), "card small", r"README.md"),
    "a tokenizer that is none": ("small/tokenizer.json", of_bytes(b'{"version": 1}'), EVALUATE, r"tokenizer"),
    "provenance of a wrong type": ("small/config.json", of_odd_provenance, "inspect small", r"provenance"),
}


@pytest.mark.parametrize(("name", "spoil", "line", "message"), FILES.values(), ids=FILES)
def test_a_bad_file_gets_one_line(world, capsys, name, spoil, line, message):
    spoil(world / name)

    if message is None:
        assert complaint(line.split(), world) is None
    else:
        assert_one_line(line, world, capsys, message)


WRITERS = {name: line for name, line in LINES.items() if " out" in line}


@pytest.fixture
def no_work(monkeypatch):
    """Whatever a command that writes a folder would do first."""
    for command in WRITERS:
        monkeypatch.setattr(f"hf_lowrank.cli.{command}.run", lambda _: pytest.fail("work was begun"))


@pytest.mark.parametrize("overwrite", ["", " --overwrite"])
@pytest.mark.parametrize("command", WRITERS)
def test_an_output_that_another_run_writes_is_refused_before_any_work(world, capsys, no_work, command, overwrite):
    with claimed(world / "out"):
        assert_one_line(WRITERS[command] + overwrite, world, capsys, r"out is being written by another run")

    assert not list(world.glob(".hf_lowrank-*"))


@pytest.mark.parametrize("command", WRITERS)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(world, capsys, no_work, command, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)

    assert_one_line(WRITERS[command], world, capsys, r"out cannot be written: Permission denied\. Choose another")


LINKS = {
    "to an empty folder": ("empty", None),
    "to nothing yet": ("deep/nothing", None),
    "to a file": ("dev.tsv", r"dev.tsv is a file"),
    "to the input": ("small", r"overlap"),
    "to a folder that is full": ("dense", r"exists and is not empty"),
    "to itself": ("out", r"out leads round in a circle"),
}


@pytest.mark.parametrize(("target", "message"), LINKS.values(), ids=LINKS)
def test_an_output_that_is_a_link_is_what_it_leads_to(world, capsys, target, message):
    (world / "empty").mkdir()
    (world / "out").symlink_to(world / target)

    status = main(LINES["decompress"].split())

    assert status == (0 if message is None else 2)
    assert message is None or re.fullmatch(f"hf-lowrank: .*{message}.*\n", capsys.readouterr().err)
    assert (world / "out").is_symlink()
    assert message is not None or (world / target / "config.json").is_file()
    assert not list(world.rglob(".hf_lowrank-*"))


@pytest.mark.parametrize("command", LINES)
def test_where_the_folder_a_command_runs_in_is_gone_it_says_so(world, capsys, command, monkeypatch):
    (world / "gone").mkdir()
    monkeypatch.chdir(world / "gone")
    (world / "gone").rmdir()

    assert main(LINES[command].split()) == 2
    assert re.fullmatch(r"hf-lowrank: .*folder .* gone.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", LINES)
def test_a_name_that_the_locale_cannot_read_is_told_as_that(capsys, command, monkeypatch):
    name = "f\u00e9".encode().decode("ascii", "surrogateescape")  # as Python has it where LC_ALL=C
    monkeypatch.setattr("sys.getfilesystemencoding", lambda: "ascii")

    assert main([*LINES[command].split(), name]) == 2
    assert "is not ASCII text, as names are here. Set LC_ALL=C.UTF-8" in capsys.readouterr().err


def test_foreign_lines_in_the_work_of_a_comparison_get_one_line(world, capsys):
    line = f"{LINES['compare']} --work-dir work"
    assert main(line.split()) == 0
    for path in (path for path in (world / "work").rglob("*") if path.is_file()):
        path.write_text('{"x": 1}\nnot ours\n')

    assert complaint(line.split(), world) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compress_and_recover_work_where_gradients_are_off(world, mode):
    with mode():
        small = compress("dense", rank=2, calibration="texts.txt", fast=True)
        healed = recover(small, teacher="dense", dataset="train.tsv", epochs=0.2, tokenizer=load_tokenizer("dense"))

    assert healed.num_parameters() == small.num_parameters()


WRONG_TYPES = {
    "a seed of letters": lambda: compress("dense", rank=2, seed="x"),
    "samples of letters": lambda: compress("dense", rank=2, num_calibration_samples="many"),
    "no such device": lambda: compress("dense", rank=2, device="gpu9"),
    "a model that is a number": lambda: compress(7, rank=2),
    "an unknown option": lambda: compress("dense", rank=2, rnak=3),
    "no examples at once": lambda: evaluate(load_dense("dense"), "dev.tsv", "text-classification", batch_size=0),
    "data of a wrong kind": lambda: evaluate(load_dense("dense"), 7, "text-classification"),
}


@pytest.mark.parametrize("call", WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_a_wrong_type_in_python_is_an_input_error(world, call):
    with pytest.raises(InputError):
        call()


# public name -> arguments that it takes, as functions of a dense and a compressed model
ARGUMENTS = {
    "compress": lambda dense, small: {"model": dense, "rank": 2, "method": "svd"},
    "decompress": lambda dense, small: {"model": small},
    "convert_storage_": lambda dense, small: {"model": small, "storage": "low_rank"},
    "reduce_vocabulary": lambda dense, small: {"model": dense, "tokenizer": tokenizer(), "vocabulary": "texts.txt"},
    "evaluate": lambda dense, small: scored(small),
    "make_report": lambda dense, small: {"model": small},
    "analyze": lambda dense, small: {"model_or_id": dense, "method": "svd", "keep_targets": 0.5},
    "compare": lambda dense, small: {"model_or_id": dense, "methods": "svd", **scored(None)},
    "push_to_hub": lambda dense, small: {"model": small, "repo_id": "me/small", "dry_run": True},
    "recover": lambda dense, small: {"model": small, "teacher": dense, "dataset": "train.tsv"},
    "lpaf": lambda dense, small: {"model": dense, "dataset": "train.tsv", "keep_targets": 0.5},
    "record_evaluation": lambda dense, small: {"folder": "small", "evaluation": None, "dataset": "dev.tsv"},
    "export": lambda dense, small: {"folder": "small"},
    "saved_report": lambda dense, small: {"path": "small"},
    "register_method": lambda dense, small: {"name": "x", "row": None},
    "CardCallback": lambda dense, small: {"dataset": "x"},
    "DistillationTrainer": lambda dense, small: {"model": small, "teacher": dense, "losses": {"logits": 1.0}},
    "FirstOrderPruningCallback": lambda dense, small: {"keep": 0.5},
    "MixedRank": lambda dense, small: {"model": small, "dense": dense, "max_steps": 5},
    "MixedRankCallback": lambda dense, small: {"dense": dense},
    "RankScheduleCallback": lambda dense, small: {"target": 0.5},
    "StableRankPenaltyCallback": lambda dense, small: {"strength": 0.1},
}  # fmt: skip
# What is looked at when the training begins.
NOT_YET = {"MixedRankCallback": ["dense"]}
NOT_CALLED = {"__version__", "InputError", "PlanError"}


def tokenizer():
    return load_tokenizer("dense")


def scored(model):
    about = {"dataset": "dev.tsv", "task": "text-classification", "tokenizer": tokenizer()}
    return about if model is None else {"model": model, "cost": False, **about}


def named_arguments(name):
    """Those that are not options, which their own table checks; whether a value of any type may be right."""
    every = inspect.signature(getattr(hf_lowrank, name)).parameters.values()
    return {one.name: one.annotation is Any for one in every if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_no_argument_of_a_wrong_type_is_another_error(world, name):
    dense = load_dense("dense")
    arguments = ARGUMENTS[name](dense, compress(dense, rank=2, method="svd"))

    for argument, is_any in named_arguments(name).items():
        refused = pytest.raises(InputError, match=r"^.+$")
        is_looked_at = not is_any and argument not in NOT_YET.get(name, ())
        with refused if is_looked_at else suppress(InputError):
            getattr(hf_lowrank, name)(**{**arguments, argument: object()})


def test_every_public_name_has_its_arguments_tried():
    assert set(ARGUMENTS) == set(hf_lowrank.__all__) - NOT_CALLED


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_a_fault_of_ours_is_told_as_one_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", failing(ZeroDivisionError("by\nnothing")))

    assert main(["inspect", "x"]) == 1
    said = r"hf-lowrank: a fault of hf-lowrank, not of yours: ZeroDivisionError at .*: by nothing .*\n"
    assert re.fullmatch(said, capsys.readouterr().err)


@pytest.mark.parametrize("error", [ZeroDivisionError(), InputError("bad")])
def test_a_debugged_command_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(cli, "_run", failing(error))
    monkeypatch.setenv("HF_LOWRANK_DEBUG", "1")

    with pytest.raises(type(error)):
        main(["inspect", "x"])


def test_a_long_line_is_cut(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run", failing(InputError("x" * 10_000)))

    assert main(["inspect", "x"]) == 2
    assert len(capsys.readouterr().err) < 1100
