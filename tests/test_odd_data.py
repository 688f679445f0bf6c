"""Odd data is one line and exit status 2 from every command that reads text, and a model's own data always enters."""

import json
import re

import pytest
from tiny_models import build
from tiny_tokenizers import LETTERS, encoder_tokenizer

from hf_lowrank import InputError, compress, evaluate
from hf_lowrank.cli import main
from hf_lowrank.data.rows import load_rows, load_texts
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.training.features import make_features

TEXTS = [" ".join(LETTERS[number:]) for number in range(25)]
DEEP = "[" * 100_000

# name of the file, its bytes, what the line says
ODD = {
    "empty": ("x.txt", b"", "is empty"),
    "a byte-order mark alone": ("x.txt", b"\xef\xbb\xbf", "is empty"),
    "UTF-16": ("x.txt", "a b".encode("utf-16"), "is not UTF-8"),
    "mixed lines": ("x.jsonl", b'{"text": "a b"}\n7\n', "got int as row 2"),
    "a number for text": ("x.jsonl", b'{"text": "a b"}\n{"text": 7}\n', "must hold text, got int"),
    "a list for text": ("x.jsonl", b'{"text": "a b"}\n{"text": ["a"]}\n', "must hold text, got list"),
    "no column of text": ("x.jsonl", b'{"body": 1}\n', "Which column holds the text"),
    "deep lines": ("x.jsonl", DEEP.encode(), "nested too deeply"),
    "deep JSON": ("x.json", DEEP.encode(), "nested too deeply"),
    "cut JSON": ("x.json", b'[{"text": "a', "is not JSON"),
    "a number for JSON": ("x.json", b"7", "must be a JSON list"),
    "half a character": ("x.jsonl", b'{"text": "a \\ud800 b"}\n', "Row 1 of .* holds half a character"),
    "half a character inside": ("x.json", b'[{"text": "a", "more": [{"a": "\\udfff"}]}]', "holds half a character"),
    "more cells than names": ("x.csv", b"text\na,b\n", "more cells than the first line has names"),
    "an unclosed quote": ("x.csv", b'text\n"a', "needed|at least"),
    "no tokens that are known": ("x.txt", "\u4f60 \u597d\n".encode() * 40, "no token the tokenizer knows"),
    "no parquet": ("x.parquet", b"PAR1", "is not a parquet file"),
}
COMMANDS = {
    "evaluate": lambda model, data, _: ["evaluate", model, "--task", "masked-lm", "--dataset", data, "--no-cost"],
    "compress": lambda model, data, out: ["compress", model, out, "--rank", "2", "--calibration", data],
    "recover": lambda model, data, out: ["recover", f"{model}-small", out, "--teacher", model, "--dataset", data],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd") / "model"
    dense = build("BertForMaskedLM")
    dense.save_pretrained(folder)
    small = compress(dense, rank=2, method="svd")
    small.save_pretrained(f"{folder}-small")
    for path in (folder, f"{folder}-small"):
        encoder_tokenizer().save_pretrained(path)
    return str(folder)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", ODD)
def test_odd_data_is_one_line_and_leaves_nothing(model, tmp_path, capsys, case, command):
    name, content, message = ODD[case]
    (tmp_path / name).write_bytes(content)

    status = main(COMMANDS[command](model, str(tmp_path / name), str(tmp_path / "out")))

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2, error
    assert error.startswith("hf-lowrank: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no-such.txt", "no/such", "no/such:x:test", "x" * 300, "a\nb"])
def test_data_that_is_nowhere_is_one_line(model, capsys, name):
    assert main(["evaluate", model, "--task", "masked-lm", "--dataset", name]) == 2

    assert re.search("no file|one string", capsys.readouterr().err.strip().splitlines()[-1])


def test_a_cell_may_be_as_long_as_an_article(tmp_path):
    (tmp_path / "x.csv").write_text(f"text\n{'a ' * 100_000}\n")

    assert len(load_texts(tmp_path / "x.csv")[0]) == 200_000


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xef\xbb\xbftext,label\na b,1\n")
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": "a b"}]).encode())

    assert load_texts(tmp_path / "x.csv", "text") == load_texts(tmp_path / "x.json") == ["a b"]


VERBS = {
    "compress": lambda dense, rows: compress(dense, rank=2, calibration=rows),
    "evaluate": lambda dense, rows: evaluate(dense, rows, "agreement", dense=dense),
    "features": lambda dense, rows: make_features(dense, None, rows),
}
each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


@each_verb
@pytest.mark.parametrize("ids", [[5, 97], [5, -1]])
def test_a_token_id_the_model_has_no_row_for_is_named(verb, ids):
    with pytest.raises(InputError, match=rf"Token id {ids[1]} must be below 97, the size of the model's vocab"):
        verb(build("BertForMaskedLM"), [{"input_ids": ids}] * 40)


NO_IDS = {
    "text": {"input_ids": "x"},
    "nothing": {"input_ids": None},
    "fractions": {"input_ids": [5.5, 6.0]},
    "truth values": {"input_ids": [True, False]},
    "words": {"input_ids": ["a", "b"]},
    "no ids": {"input_ids": []},
    "one number": {"input_ids": 5},
    "rows of several lengths": {"input_ids": [[5, 6], [5]]},
    "a cube": {"input_ids": [[[5, 6]]]},
    "another row without": {"other": [5]},
    "a shorter mask": {"input_ids": [5, 6], "attention_mask": [1]},
    "a mask of text": {"input_ids": [5, 6], "attention_mask": "x"},
}


@each_verb
@pytest.mark.parametrize("row", NO_IDS.values(), ids=NO_IDS)
def test_rows_that_hold_no_token_ids_are_one_line(verb, row):
    rows = [row] * 40 if "input_ids" in row else [{"input_ids": [5, 6]}, row] * 20

    with pytest.raises(InputError, match=r"input_ids") as caught:
        verb(build("BertForMaskedLM"), rows)

    assert "\n" not in str(caught.value)


def test_a_tokenizer_with_more_tokens_than_the_model_is_named():
    dense = build("BertForMaskedLM", vocab_size=12)

    for task in ("masked-lm", "agreement"):
        with pytest.raises(InputError, match="must be below 12, the size of the model's vocabulary"):
            evaluate(dense, TEXTS, task, dense=dense, tokenizer=encoder_tokenizer())
    with pytest.raises(InputError, match="must be below 12, the size of the model's vocabulary"):
        make_features(dense, encoder_tokenizer(), TEXTS)


ROWS = {
    "text-classification": {"text": "a", "label": 1},
    "similarity": {"sentence1": "a", "sentence2": "b", "score": 1},
    "question-answering": {"question": "a", "context": "a b", "answers": {"text": ["a"], "answer_start": [0]}},
}
HEADS = {"similarity": "BertModel", "question-answering": "BertForQuestionAnswering"}


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("value", [None, ["a"], {"a": 1}, float("nan"), "missing"])
def test_every_row_has_what_the_task_reads(task, value):
    dense = build(HEADS.get(task, "BertForSequenceClassification"))

    for column in ROWS[task]:
        odd = {name: cell for name, cell in ROWS[task].items() if name != column or value != "missing"}
        if value != "missing":
            odd[column] = value
        with pytest.raises(InputError) as caught:
            evaluate(dense, [ROWS[task]] * 3 + [odd], task, tokenizer=encoder_tokenizer(), cost=False)
        assert "\n" not in str(caught.value)


def test_rows_of_several_kinds_are_named_by_their_place():
    with pytest.raises(InputError, match="got NoneType as row 3"):
        load_rows(["a", {"text": "b"}, None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-examples", "0"], "max_examples must be a whole number at least 1"),
        (["--block-length", "2"], "block_length=2 leaves no room"),
        (["--block-length", "1"], "block_length must be a whole number at least 2"),
        (["--device", "meta"], "device must be one of this machine's, .* got 'meta'"),
        (["--device", "gpu9"], "device must be one of this machine's, .* got 'gpu9'"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(model, tmp_path, capsys, options, message):
    (tmp_path / "x.txt").write_text("\n".join(TEXTS))

    status = main(["evaluate", model, "--task", "masked-lm", "--dataset", str(tmp_path / "x.txt"), *options])

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert status == 2, error
    assert re.search(message, error), error


def test_a_batch_holds_something(model):
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        evaluate(load_dense(model), TEXTS, "masked-lm", tokenizer=encoder_tokenizer(), batch_size=0, cost=False)


def test_a_foreign_line_in_a_work_folder_is_one_line(model, tmp_path, capsys):
    (tmp_path / "x.txt").write_text("\n".join(TEXTS))
    words = ["compare", model, "--task", "masked-lm", "--dataset", str(tmp_path / "x.txt"), "--methods", "svd"]

    for line in (b"7\n", b'{"a": 1}\n', b"[]\n"):
        (tmp_path / "comparison.jsonl").write_bytes(b"\xff cut short\n" + line)
        assert main([*words, "--work-dir", str(tmp_path)]) == 2
        assert "Line 2 of" in capsys.readouterr().err.strip().splitlines()[-1]
