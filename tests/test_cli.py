"""The command line: results on stdout, one line for bad input, nothing half-written, nothing lost."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_lowrank import remote_code
from hf_lowrank.cli import compress as compress_command
from hf_lowrank.cli import main
from hf_lowrank.cli.flags.parser import build_parser
from hf_lowrank.hosts.latency import Latency
from hf_lowrank.methods.table import METHODS
from hf_lowrank.records.report import make_report
from hf_lowrank.records.wording import speed_in_words
from hf_lowrank.sharing.saving import load_compressed

# The method that looks at no text is the fastest.
BUDGET = ["--keep-params", "0.6", "--method", "svd"]
BERT = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dense") / "bert"
    BertForMaskedLM(BERT).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(95))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


@pytest.fixture(scope="module")
def small(dense, tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "bert"
    assert main(["compress", str(dense), str(out), *BUDGET, "--no-latency", "--json"]) == 0
    return out


def run(capsys, *argv):
    status = main([str(part) for part in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def weights_of(folder):
    return (folder / "model.safetensors").read_bytes()


def test_compress_prints_before_and_after_and_what_to_do_next(dense, tmp_path, capsys):
    status, out, _ = run(capsys, "compress", dense, tmp_path / "out", "--keep-params", "0.6")

    assert status == 0
    for words in (
        "parameters",
        "multiply-adds a token",
        "latency, 8 x 32 tokens",
        "left dense",
        "next: hf-lowrank verify",
    ):
        assert words in out
    assert "trust_remote_code=True" in out


def test_compress_reports_one_json_object_and_nothing_else(dense, tmp_path, capsys):
    status, out, _ = run(capsys, "compress", dense, tmp_path / "out", "--rank", "4", "--method", "svd", "--json")

    result = json.loads(out)
    assert status == 0
    assert set(result["latency"]) == {"batch_size", "sequence_length", "machine", "dense", "compressed"}
    assert result["report"]["architecture"] == "LowRankBertForMaskedLM"
    assert result["folder_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())


def test_options_reach_the_saved_model(dense, tmp_path):
    argv = [
        "--method",
        "svd",
        "--rank",
        "4",
        "--rank-pattern",
        "query=2",
        "--exclude-modules",
        "key",
        "--dtype",
        "bfloat16",
    ]

    assert main(["compress", str(dense), str(tmp_path / "out"), *argv, "--no-latency"]) == 0

    model = load_compressed(tmp_path / "out")
    ranks = {name.rpartition(".")[2]: spec["rank"] for name, spec in model.config.plan["modules"].items()}
    assert (ranks["query"], ranks["value"], "key" in ranks) == (2, 4, False)
    assert model.dtype == torch.bfloat16


SHIPPED_BYTES = sum(path.stat().st_size for path in Path(remote_code.__path__[0]).glob("*.py"))


@pytest.mark.parametrize("kilobytes", [95, 70])
def test_target_size_speaks_of_the_whole_folder(dense, tmp_path, capsys, kilobytes):
    size = f"{SHIPPED_BYTES // 1000 + kilobytes}KB"

    _, out, _ = run(
        capsys, "compress", dense, tmp_path / "out", "--target-size", size, "--method", "svd", "--no-latency", "--json"
    )

    assert json.loads(out)["folder_bytes"] <= int(size[:-2]) * 1000
    assert load_compressed(tmp_path / "out").config.plan["provenance"]["settings"]["target_size"] == size


def test_dry_run_prints_the_plan_and_writes_nothing(dense, tmp_path, capsys):
    argv = ["compress", dense, tmp_path / "out", *BUDGET, "--dry-run"]

    status, out, _ = run(capsys, *argv)
    _, as_json, _ = run(capsys, *argv, "--json")

    assert status == 0
    assert "dry run: nothing was written" in out
    assert json.loads(as_json)["plan"]["modules"]
    assert not list(tmp_path.iterdir())


def test_dry_run_promises_what_the_real_run_delivers(dense, small, capsys):
    _, out, _ = run(capsys, "compress", dense, small.parent / "x", *BUDGET, "--dry-run", "--json")

    promised, delivered = json.loads(out)["report"], make_report(load_compressed(small)).to_dict()
    for key in ("parameters", "dense_parameters", "multiply_adds", "size_bytes"):
        assert promised[key] == delivered[key]


def test_inspect_shows_the_report_of_the_saved_model(small, capsys):
    _, out, _ = run(capsys, "inspect", small, "--json")
    status, table, _ = run(capsys, "inspect", small, "--modules")

    expected = json.loads(json.dumps(make_report(load_compressed(small)).to_dict()))
    assert json.loads(out)["report"] == expected
    assert status == 0
    assert "encoder.layer.0" in table


def test_inspect_reads_no_more_of_the_weights_than_their_headers(small, monkeypatch, capsys):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded"))

    assert run(capsys, "inspect", small)[0] == 0


def test_decompress_writes_a_stock_model_with_its_tokenizer(small, tmp_path, capsys):
    status, out, _ = run(capsys, "decompress", small, tmp_path / "out", "--json")

    assert status == 0
    assert json.loads(out)["class"] == "BertForMaskedLM"
    assert not list((tmp_path / "out").glob("*.py"))
    assert (tmp_path / "out" / "vocab.txt").exists()
    BertForMaskedLM.from_pretrained(tmp_path / "out")


def test_verify_exits_with_one_when_the_check_fails(small, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((small / "config.json").read_bytes())

    status, out, err = run(capsys, "verify", tmp_path)
    json_status, as_json, _ = run(capsys, "verify", tmp_path, "--json")

    assert (status, json_status, err) == (1, 1, "")
    assert out.startswith(f"FAILED: {tmp_path} has no model.safetensors")
    assert json.loads(as_json)["ok"] is False


@pytest.fixture(scope="module")
def places(dense, small, tmp_path_factory):
    """Every kind of folder that a command should refuse."""
    root = tmp_path_factory.mktemp("places")
    nan, untied = root / "nan", root / "missing"
    model = BertForMaskedLM(BERT)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight[0, 0] = float("nan")
    model.save_pretrained(nan)
    state = {name: value for name, value in model.state_dict().items() if "layer.1.output.dense" not in name}
    model.save_pretrained(untied, state_dict=state)
    texts = {
        "empty/readme.txt": "",
        "unsupported/config.json": '{"model_type": "resnet", "architectures": ["ResNetModel"]}',
        "unknown/config.json": '{"model_type": "nonsense"}',
        "nonsense/config.json": "{",
        "diary/page.txt": "dear diary",
        "strict/config.json": '{"model_type": "bert", "architectures": ["BertModel"], "hidden_size": "wide"}',
    }
    for name, text in texts.items():
        (root / name).parent.mkdir()
        (root / name).write_text(text)
    misnamed = json.loads((small / "config.json").read_text())
    misnamed["compression"]["modules"] = {"encoder.layer.7.output.dense": {"structure": "low_rank", "rank": 1}}
    (root / "misnamed").mkdir()
    (root / "misnamed" / "config.json").write_text(json.dumps(misnamed))
    return {"root": root, "dense": dense, "small": small}


BAD_INPUT = {
    "no command": ([], r"required: COMMAND"),
    "unknown command": (["squash"], r"no COMMAND 'squash'. Closest: 'push'"),
    "no model": (
        ["compress", "{root}/nowhere", "{out}", *BUDGET],
        r"no folder '.*nowhere', and the Hub gave no model",
    ),
    "folder without a model": (
        ["compress", "{root}/empty", "{out}", *BUDGET],
        r"not a model folder: it has no config",
    ),
    "file for a folder": (["compress", "{root}/diary/page.txt", "{out}", *BUDGET], r"is a file"),
    "config that is no JSON": (["compress", "{root}/nonsense", "{out}", *BUDGET], r"config.json.* not a JSON object"),
    "config of a wrong type": (["compress", "{root}/strict", "{out}", *BUDGET], r"hidden_size.*expected int"),
    "unknown architecture": (["compress", "{root}/unknown", "{out}", *BUDGET], r"no usable model '.*unknown'"),
    "unsupported architecture": (["compress", "{root}/unsupported", "{out}", *BUDGET], r"unsupported"),
    "unknown method": (["compress", "{dense}", "{out}", *BUDGET, "--method", "magic"], r"method must be one of .*svd"),
    "unknown kind of embeddings": (["compress", "{dense}", "{out}", *BUDGET, "--embeddings", "x"], r"must be one of"),
    "no budget": (["compress", "{dense}", "{out}"], r"Exactly one budget is needed out of keep_params"),
    "two budgets": (["compress", "{dense}", "{out}", *BUDGET, "--rank", "2"], r"--rank: not allowed with argument"),
    "budget out of reach": (
        ["compress", "{dense}", "{out}", "--keep-params", "0.01"],
        r"the smallest model .* is 0\.\d+",
    ),
    "size out of reach": (
        ["compress", "{dense}", "{out}", "--target-size", "40KB"],
        r"smallest model.* 0\.\d+MB.*Besides",
    ),
    "size below the tokenizer": (["compress", "{dense}", "{out}", "--target-size", "20B"], r"other files alone take"),
    "size that is none": (["compress", "{dense}", "{out}", "--target-size", "small"], r'such as "100MB"'),
    "fraction above one": (["compress", "{dense}", "{out}", "--keep-params", "60"], r"above 0 and at most 1.*got 60"),
    "fraction that is no number": (
        ["compress", "{dense}", "{out}", "--keep-params", "x"],
        r"invalid float value: 'x'",
    ),
    "pattern that matches nothing": (
        ["compress", "{dense}", "{out}", *BUDGET, "--target-modules", "querry"],
        r"target_modules 'querry' matches none.*Closest: '.*query'",
    ),
    "expression that matches nothing": (
        ["compress", "{dense}", "{out}", *BUDGET, "--exclude-modules", "attn.*"],
        r"exclude_modules 'attn\.\*' matches none",
    ),
    "expression that is none": (
        ["compress", "{dense}", "{out}", *BUDGET, "--target-modules", "(a"],
        r"not a regular expression",
    ),
    "rank zero": (["compress", "{dense}", "{out}", "--rank", "0"], r"at least 1, got 0"),
    "rank above the matrix": (["compress", "{dense}", "{out}", "--rank", "33"], r"between 1 and 32, got 33"),
    "rank pattern without a rank": (
        ["compress", "{dense}", "{out}", "--rank", "2", "--rank-pattern", "query"],
        r"not of the form NAME=R",
    ),
    "rank pattern that is no number": (
        ["compress", "{dense}", "{out}", "--rank", "2", "--rank-pattern", "query=x"],
        r"'query=x' is not of the form NAME=R",
    ),
    "unknown device": (
        ["compress", "{dense}", "{out}", *BUDGET, "--device", "abacus"],
        r"device must be one of this machine.s.*abacus",
    ),
    "empty argument": (["compress", "{dense}", "{out}", *BUDGET, "--cache-dir", ""], r"An argument is empty"),
    "argument that is no text": (["compress", "{dense}", "{out}\udc80", *BUDGET], r"is not UTF-8 text"),
    "full output": (["compress", "{dense}", "{root}/diary", *BUDGET], r"exists and is not empty.*--overwrite"),
    "output that is no model": (
        ["compress", "{dense}", "{root}/diary", *BUDGET, "--overwrite"],
        r"not a model folder",
    ),
    "output in the input": (["compress", "{dense}", "{dense}/out", *BUDGET], r"overlap"),
    "compressed already": (["compress", "{small}", "{out}", *BUDGET], r"compressed already"),
    "NaN weights": (["compress", "{root}/nan", "{out}", *BUDGET], r"layer\.1\.attention\.self\.query.*NaN or Inf"),
    "missing weights": (
        ["compress", "{root}/missing", "{out}", *BUDGET],
        r"lacks the weights of .*layer\.1\.output\.dense",
    ),
    "inspect a dense model": (["inspect", "{dense}"], r"not a compressed model"),
    "inspect nothing": (["inspect", "{root}/empty"], r"not a model folder"),
    "inspect a misnamed plan": (
        ["inspect", "{root}/misnamed"],
        r"layer\.7.*Closest: 'encoder\.layer\.1\.output\.dense'",
    ),
    "decompress a dense model": (["decompress", "{dense}", "{out}"], r"not a compressed model"),
    "decompress over a diary": (["decompress", "{small}", "{root}/diary"], r"exists and is not empty"),
    "verify a dense model": (["verify", "{dense}"], r"not a compressed model"),
    "verify nothing": (["verify", "{root}/nowhere"], r"is not a folder"),
}


@pytest.mark.parametrize(("argv", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_gets_one_clear_line_and_writes_nothing(places, tmp_path, capsys, argv, message):
    places = places | {"out": tmp_path / "out"}

    status, out, err = run(capsys, *(part.format(**places) for part in argv))

    assert (status, out) == (2, "")
    assert err.startswith("hf-lowrank: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["full disk", "interrupt"],
)
def test_a_failed_save_keeps_the_old_output_and_says_so(dense, tmp_path, capsys, monkeypatch, error, status, message):
    argv = ["compress", dense, tmp_path / "out", *BUDGET, "--no-latency"]
    assert run(capsys, *argv)[0] == 0
    before = weights_of(tmp_path / "out")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    got, out, err = run(capsys, *argv, "--overwrite")

    assert (got, out) == (status, "")
    assert message in err
    assert err.count("\n") == 1
    assert weights_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_gpt2_is_compressed_and_loaded_again(tmp_path, capsys):
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")

    status, _, _ = run(
        capsys, "compress", tmp_path / "gpt2", tmp_path / "out", "--keep-targets", "0.5", "--method", "svd"
    )

    assert status == 0
    assert type(load_compressed(tmp_path / "out")).__name__ == "LowRankGPT2LMHeadModel"


@pytest.mark.parametrize(
    ("speed_up", "words"),
    [(2.0, "2.00x as fast"), (1.04, "memory only: no faster here"), (0.8, "memory only: slower here")],
)
def test_speed_is_only_claimed_where_it_was_measured(speed_up, words):
    assert words in speed_in_words(Latency(1.0, 1.0, 1.0, speed_up))


@pytest.mark.parametrize(
    ("given", "patterns"),
    [(["query"], ["query"]), (["all-linear"], "all-linear"), ([".*query"], ".*query"), (["a", "b"], ["a", "b"])],
)
def test_a_single_expression_is_a_pattern_and_names_are_a_list(given, patterns):
    assert compress_command._patterns(given) == patterns


def commands():
    return next(action.choices for action in build_parser()._actions if isinstance(action.choices, dict))


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_that_says_what_each_flag_means(command, capsys):
    with pytest.raises(SystemExit) as done:
        build_parser().parse_args([command, "--help"])

    assert done.value.code == 0
    assert "usage: hf-lowrank" in capsys.readouterr().out
    assert all(action.help for action in commands()[command]._actions)


def test_there_are_no_more_flags_than_people_can_read():
    flags = [name for parser in commands().values() for action in parser._actions for name in action.option_strings]

    assert len([name for name in flags if name.startswith("--") and name != "--help"]) <= 100


TAKES_METHODS = [
    name for name, parser in commands().items() if {"--method", "--methods"} & parser._option_string_actions.keys()
]


@pytest.mark.parametrize("command", TAKES_METHODS)
def test_help_names_every_method_and_what_the_recommended_ones_look_at(command, capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    lines = capsys.readouterr().out.splitlines()

    assert any(all(name in line for name in METHODS) for line in lines)
    for name, row in METHODS.items():
        assert any(name in line and row.summary in line for line in lines) is row.is_recommended


# Words that are nearly right -> what is named instead
MISSPELLED = {
    "compres a b --rank 2": "'compress'",
    "compress a b --rnak 2": "--rank",
    "compress a b --rank 2 --dryrun": "--dry-run",
    "compress a b --rank 2 --method sdv": "'svd'",
    "compress a b --rank 2 --method ASVD": "'svd'",
    "analyze a --method whitend-svd": "'whitened_svd'",
    "compare a --dataset d.tsv --task masked-lm --methods svd sdv:uniform": "'svd'",
    "evaluate a --dataset d.tsv --task mlm": "'masked-lm'",
    "compare a --dataset d.tsv --task mlm --methods svd": "'masked-lm'",
    "recover a b --teacher c --dataset d.tsv --losses logit=1": "'logits'",
    "push a b --privat": "--private",
}


def test_a_misspelled_word_is_told_with_the_closest_before_anything_slow_is_imported():
    code = f"""
import sys
from hf_lowrank.cli import main
for line in {list(MISSPELLED)!r}:
    print(main(line.split()), "torch" in sys.modules)
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.splitlines() == ["2 False"] * len(MISSPELLED)
    for said, closest in zip(done.stderr.splitlines(), MISSPELLED.values(), strict=True):
        assert f"Closest: {closest}" in said
