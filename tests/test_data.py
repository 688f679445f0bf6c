"""Texts and batches come from anything, the same for the same seed, and bad data gets one clear line."""

import json
from itertools import chain

import datasets
import pytest
import torch
from tiny_tokenizers import LETTERS, decoder_tokenizer, encoder_tokenizer, make_tokenizer
from torch.utils.data import DataLoader

from hf_lowrank.data.batches import make_batches, require_tokens
from hf_lowrank.data.rows import load_rows, load_texts, require_columns
from hf_lowrank.errors import InputError
from hf_lowrank.extras import load_part
from hf_lowrank.files.digests import fingerprint

TEXTS = ["a b c d e f g", "h i", "j k l", "m n o p q"]


@pytest.fixture
def encoder():
    return encoder_tokenizer()


@pytest.fixture
def decoder():
    return decoder_tokenizer()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def real_ids(batches):
    return [
        row[mask.bool()].tolist()
        for batch in batches
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.txt", "first one\nsecond\n"),
        ("x.jsonl", '{"text": "first one"}\n\n{"text": "second"}\n'),
        ("y.jsonl", '"first one"\n"second"\n'),
        ("x.json", '[{"text": "first one"}, {"text": "second"}]'),
        ("y.json", '{"data": ["first one", "second"]}'),
        ("x.csv", 'id,text\n1,"first one"\n2,second\n'),
        ("x.tsv", "text\tlabel\nfirst one\t1\nsecond\t0\n"),
    ],
)
def test_every_file_type_gives_its_texts(tmp_path, name, text):
    column = "text" if "," in text.split("\n")[0] or "\t" in text else None

    assert load_texts(write(tmp_path / name, text), column) == ["first one", "second"]


def test_wrapped_lines_are_joined_to_paragraphs(tmp_path):
    path = write(tmp_path / "x.txt", "one\ntwo\n\nthree\n")

    assert load_texts(path) == ["one two", "three"]


def test_lines_too_long_to_be_wrapped_stay_texts(tmp_path):
    path = write(tmp_path / "x.txt", f"one\ntwo\n\n{'x' * 121}\n")

    assert load_texts(path) == ["one", "two", "x" * 121]


def test_json_lines_may_hold_a_line_separator(tmp_path):
    path = write(tmp_path / "x.jsonl", json.dumps({"text": "a\u2028b"}, ensure_ascii=False))

    assert load_texts(path) == ["a\u2028b"]


def test_quotes_in_a_tsv_are_text(tmp_path):
    path = write(tmp_path / "x.tsv", 'text\tlabel\n"oh\t1\nno"\t0\n')

    assert load_texts(path, "text") == ['"oh', 'no"']


def test_parquet_gives_its_rows(tmp_path):
    datasets.Dataset.from_dict({"text": ["first", "second"]}).to_parquet(tmp_path / "x.parquet")

    assert load_texts(tmp_path / "x.parquet") == ["first", "second"]


def test_a_dataset_gives_its_column():
    dataset = datasets.Dataset.from_dict({"question": ["who?"], "answer": ["me"]})

    assert load_texts(dataset, "answer") == ["me"]


def test_a_limit_draws_by_seed_and_keeps_the_order():
    texts = [f"{number:03}" for number in range(100)]

    drawn = load_texts(texts, limit=10, seed=1)

    assert drawn == sorted(drawn)
    assert drawn == load_texts(texts, limit=10, seed=1) != load_texts(texts, limit=10, seed=2)
    assert load_rows(texts, limit=10, seed=1) == [{"text": text} for text in drawn]


def test_packed_windows_are_full_and_hold_every_text_once(decoder):
    (whole,) = real_ids(make_batches(TEXTS, decoder, max_seq_length=21))  # 17 letters, an end after each text
    cut = real_ids(make_batches(TEXTS, decoder, max_seq_length=4, batch_size=2))

    assert sorted(text.strip() for text in decoder.decode(whole).split("[SEP]")) == sorted(["", *TEXTS])
    assert [len(row) for row in cut] == [4] * 5
    assert list(chain(*cut)) == whole[:20]


def test_a_passage_is_the_beginning_of_a_text_and_padding_is_masked(encoder):
    batches = make_batches(TEXTS, encoder, num_calibration_samples=4, max_seq_length=5, batch_size=4)

    (batch,) = batches
    expected = [[1, *ids[:3], 2] for ids in encoder(TEXTS, add_special_tokens=False)["input_ids"]]
    assert sorted(real_ids(batches)) == sorted(expected)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert batch["input_ids"].shape == (4, 5)


def test_later_parts_serve_where_there_are_too_few_texts(encoder):
    rows = real_ids(make_batches(["a b c d e f g", "h i j k"], encoder, max_seq_length=5))

    assert sorted(rows[:2]) == [[1, 4, 5, 6, 2], [1, 11, 12, 13, 2]]
    assert sorted(rows[2:]) == [[1, 7, 8, 9, 2], [1, 10, 2], [1, 14, 2]]


def test_no_more_samples_than_asked_for(encoder):
    assert len(real_ids(make_batches(TEXTS, encoder, num_calibration_samples=3, batch_size=2))) == 3


def test_the_seed_decides_alone(encoder):
    texts = [" ".join(LETTERS[i : i + 4]) for i in range(20)]

    first, again, other = (fingerprint(make_batches(texts, encoder, seed=seed)) for seed in (0, 0, 1))

    assert first == again != other


def test_batches_pass_through_with_their_labels():
    rows = [{"input_ids": torch.tensor([n, n]), "labels": torch.tensor(n)} for n in range(6)]

    batches = make_batches(DataLoader(rows, batch_size=4), None, num_calibration_samples=5)

    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]
    assert all((batch["attention_mask"] == 1).all() for batch in batches)


def test_tokenized_rows_are_padded_and_their_labels_ignored_there():
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]

    (batch,) = make_batches(datasets.Dataset.from_list(rows), None)

    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_fingerprint_sees_ids_masks_and_shapes():
    ids = torch.tensor([[1, 2], [3, 4]])
    variants = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        {"input_ids": ids.T.contiguous(), "attention_mask": torch.ones_like(ids)},
        {"input_ids": ids, "attention_mask": torch.eye(2, dtype=torch.long)},
        {"input_ids": ids.view(1, 4), "attention_mask": torch.ones(1, 4, dtype=torch.long)},
    ]

    assert len({fingerprint([batch]) for batch in variants}) == 4


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "The data is empty. Give some text."),
        (["", " \n"], {}, "The data holds no text: all 2 are blank."),
        ([{"body": "x", "title": "y"}], {}, "Which column holds the text.* body, title"),
        ([{"body": "x"}], {"text_column": "text"}, "no column 'text'; there are: body"),
        ([{"text": 3}], {"text_column": "text"}, "'text' of The data must hold text, got int"),
        (3, {}, "must be a file.* got int"),
        ([3], {}, "got int as row 1"),
        ("no-such-file.txt", {}, "There is no file no-such-file.txt"),
        ("nobody/no-such-data", {}, "Hub data set of that name cannot be loaded"),
        ("A text.\nAnother.", {}, "Give texts as a list"),
        (".", {}, "is a folder"),
        (datasets.DatasetDict(a=datasets.Dataset.from_dict({"text": ["x"]})), {}, "splits a. Give one"),
    ],
)
def test_bad_text_gets_one_clear_line(source, options, message):
    with pytest.raises(InputError, match=message) as caught:
        load_texts(source, **options)

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "is empty"),
        ("x.txt", b"\xff\xfe", "is not UTF-8 text .byte 0"),
        ("x.jsonl", b'{"text": "a"}\n{oops\n', "is not JSON: .* in line 2"),
        ("x.json", b"3", "must be a JSON list"),
        ("x.parquet", b"oops", "is not a parquet file"),
    ],
)
def test_a_bad_file_gets_one_clear_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)

    with pytest.raises(InputError, match=message):
        load_texts(tmp_path / name)


def test_missing_things_are_named(encoder):
    with pytest.raises(InputError, match="needs a tokenizer, and there is none"):
        make_batches(TEXTS, None)
    with pytest.raises(InputError, match="has 17 tokens, and at least 100 are needed"):
        require_tokens(make_batches(TEXTS, make_tokenizer(), pack=True, max_seq_length=17), 100)
    with pytest.raises(InputError, match="max_seq_length=2 leaves no room"):
        make_batches(TEXTS, encoder, max_seq_length=2)
    with pytest.raises(InputError, match=r"no column 'label'; there are: text\. Labels!"):
        require_columns([{"text": ""}], ["label"], "Labels!")


def test_a_missing_extra_names_the_command_that_installs_it(monkeypatch):
    def refuse(name):
        raise ModuleNotFoundError("No module named 'datasets'", name="datasets")

    monkeypatch.setattr("hf_lowrank.extras.importlib.import_module", refuse)

    with pytest.raises(InputError, match=r"needs the package datasets.*pip install 'hf-lowrank\[train\]'"):
        load_part("hf_lowrank.data.hub_datasets", "train")
