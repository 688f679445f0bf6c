"""What the fuzz tests draw: lines of options for every command, and damage to every kind of file a command reads."""

import argparse
import json
import os
import shutil
import struct
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from tiny_files import byte_tokenizer, word_piece_tokenizer, write_data
from tiny_models import build

from hf_lowrank.cli import main
from hf_lowrank.cli.flags.parser import build_parser

SEED = int(os.environ.get("HF_LOWRANK_FUZZ_SEED", "0"))
SHARE = float(os.environ.get("HF_LOWRANK_FUZZ_SHARE", "1"))  # of the cases that are drawn without it

_SIZES = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 1}

# command -> a line that it takes; each ends within a second on the models of `write_world`
LINES = {
    "compress": "compress dense out --rank 2 --method svd --no-latency",
    "analyze": "analyze dense --method svd --keep-targets 0.5",
    "inspect": "inspect small",
    "verify": "verify small",
    "decompress": "decompress small out",
    "evaluate": "evaluate small --task text-classification --dataset dev.tsv --no-cost",
    "card": "card small",
    "push": "push small me/small --dry-run",
    "doctor": "doctor small",
    "export": "export small",
    "compare": "compare dense --dataset dev.tsv --task text-classification --methods svd --keep-targets 0.5",
    "recover": "recover small out --teacher dense --dataset train.tsv --epochs 0.2",
    "lpaf": "lpaf dense out --dataset train.tsv --keep-targets 0.5 --prune-epochs 0.2 --tune-epochs 0.2",
}

# folder -> lines that read it
READERS = {
    "small": [
        LINES["inspect"] + " --modules",
        LINES["inspect"] + " --json",
        LINES["decompress"],
        LINES["evaluate"],
        LINES["evaluate"] + " --record",
        LINES["card"],
        LINES["push"],
        LINES["doctor"],
        LINES["export"],
    ],
    "dense": [
        LINES["compress"],
        LINES["compress"] + " --dry-run",
        LINES["compress"] + " --embeddings low_rank",
        "compress dense out --rank 2 --method whitened_svd --fast --no-latency --calibration texts.txt",
        LINES["analyze"],
        LINES["evaluate"].replace("small", "dense"),
        "doctor dense",
    ],
    "gpt2": [
        "compress gpt2 out --rank 2 --method svd --no-latency",
        "evaluate gpt2 --task causal-lm --dataset texts.txt --block-length 16 --no-cost",
    ],
}

_TASKS = {
    "text-classification": "small",
    "text-regression": "small",
    "agreement": "small",
    "similarity": "small",
    "question-answering": "small",
    "masked-lm": "small",
    "causal-lm": "gpt2",
}
# lines that read a file of data
DATA_READERS = [
    *(f"evaluate {model} --task {task} --dataset DATA --no-cost" for task, model in _TASKS.items()),
    "compress dense out --rank 2 --method whitened_svd --fast --no-latency --calibration DATA",
    "compress dense out --keep-params 0.8 --method svd --no-latency --vocabulary DATA",
    LINES["compare"].replace("dev.tsv", "DATA"),
]

_ROWS = [{"sentence": f"a film of {'xyz'[i % 3]}", "label": i % 2, "score": i / 8} for i in range(8)]
_ANSWERS = [{"text": "film", "answer_start": 7}]
_QUESTION = {"context": "a long film", "qas": [{"id": "1", "question": "what", "answers": _ANSWERS}]}
DATA = {
    "rows.jsonl": "".join(json.dumps(row) + "\n" for row in _ROWS),
    "rows.json": json.dumps(_ROWS),
    "squad.json": json.dumps({"data": [{"paragraphs": [_QUESTION]}]}),
    "rows.csv": "sentence1,sentence2,score\n" + "".join(f'"a, film {i}",dull,0.{i}\n' for i in range(8)),
    "rows.tsv": "sentence\tlabel\n" + "".join(f"a film\t{i % 2}\n" for i in range(8)),
    "rows.txt": "a film that is dull\n\nbut never long\n" * 4,
}


def write_world(folder):
    """The models and data that the lines name."""
    build("BertForSequenceClassification", **_SIZES, max_position_embeddings=32).save_pretrained(folder / "dense")
    word_piece_tokenizer().save_pretrained(folder / "dense")
    tokens = byte_tokenizer()
    size = {"vocab_size": len(tokens), "n_positions": 32, "n_embd": 8, "n_head": 2, "n_layer": 1}
    build("GPT2LMHeadModel", **size).save_pretrained(folder / "gpt2")
    tokens.save_pretrained(folder / "gpt2")
    write_data(folder)
    for name, text in DATA.items():
        (folder / name).write_text(text, encoding="utf-8")
    line = LINES["compress"].replace("dense", str(folder / "dense")).replace("out", str(folder / "small"))
    assert main(line.split()) == 0


def copy_world(world, folder):
    """A world for a case to spoil; the code in it, which no command writes, is not copied but linked."""
    shutil.copytree(
        world, folder, copy_function=lambda a, b: (os.link if a.endswith(".py") else shutil.copyfile)(a, b)
    )


# --- lines of options ---

WORDS = ["", " ", "x", "-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e400", "10000000000000000000000", "None",
         "null", "[]", "{}", "\u00e9", "\ud800", "a\nb", "nowhere", "dense", "small", "dev.tsv", "svd",
         "a=b", "(a", "(a+)+$", "*", "%s", "x" * 5000]  # fmt: skip


@cache
def options_of(command):
    """The options and arguments of a command."""
    parsers = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [a for a in parsers.choices[command]._actions if not isinstance(a, argparse._HelpAction)]


@st.composite
def lines_of(draw, command):
    """A line of a command with up to three options more, or with one word spoiled."""
    words = LINES[command].split()
    for _ in range(draw(st.integers(0, 3))):
        option = draw(st.sampled_from(options_of(command)))
        if not option.option_strings:
            place = draw(st.integers(1, len(words) - 1))
            words[place] = draw(st.sampled_from(WORDS))
            continue
        values = st.sampled_from([*map(str, option.choices or ()), *WORDS])
        count = 0 if option.nargs == 0 else draw(st.integers(1, 3)) if option.nargs else 1
        words += [draw(st.sampled_from(option.option_strings)), *(draw(values) for _ in range(count))]
    return words


# --- damage to files ---

_WILD = st.sampled_from(
    [None, True, -1, 0, 1, 10**7, 10**30, -0.5, float("nan"), float("inf"), "", "x", "\ud800", "../x", "/etc/passwd",
     [], [None], [1, 2], {}, {"x": 1}, [[[[]]]], "x" * 5000]
)  # fmt: skip


def places(value, path=()):
    """The way to everything within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


@st.composite
def other_json(draw, text):
    """The JSON with a value replaced, left out or renamed."""
    value = json.loads(text)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(list(places(value))))
        if not path:
            value = draw(_WILD) if draw(st.integers(0, 9)) == 0 else value
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "drop", "rename"]))
        if kind == "replace" or not isinstance(holder, dict):
            holder[path[-1]] = draw(_WILD)
        elif kind == "drop":
            del holder[path[-1]]
        else:
            holder[draw(st.sampled_from(["", "x", "\ud800", "encoder.layer.7"]))] = holder.pop(path[-1])
        if not isinstance(value, (dict, list)):
            break
    return json.dumps(value).encode()


_WHOLES = [
    b"", b"\n", b"null", b"{", b"[]", b"{}", b"0", b"\xff\xfe", b"\x00" * 64, b"\x80\x04N.", b"---\n: [\n---\n",
    b"[" * 5000, b'{"a":' * 5000, b'"' + b"x" * 200_000 + b'"\n', b"\xef\xbb\xbf{}", b'{"a": "\\ud800"}\n',
    b"a\tb\n" + b"x" * 200_000 + b"\t1\n", b'sentence,label\n"\n',
]  # fmt: skip


@st.composite
def other_bytes(draw, content):
    """The bytes cut, with a bit turned, with some put in or all replaced."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "whole"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "whole" or not content:
        return draw(st.sampled_from(_WHOLES))
    if kind == "cut":
        return content[:place]
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << draw(st.integers(0, 7))]) + content[place + 1 :]
    piece = draw(st.sampled_from([b"\x00", b"\xff", b'"', b"\n", b"{", b",", b"\t", b"\xed\xa0\x80", b"\r"]))
    return content[:place] + piece + content[place:]


@st.composite
def other_weights(draw, content):
    """A safetensors file whose header lies, whose numbers are none, or that is damaged as any other file."""
    kind = draw(st.sampled_from(["header", "header", "length", "numbers", "bytes"]))
    size = struct.unpack("<Q", content[:8])[0]
    header, numbers = content[8 : 8 + size], content[8 + size :]
    if kind == "header":
        header = draw(other_json(header.decode()))
    elif kind == "numbers":
        number = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38]))
        place = 4 * draw(st.integers(0, len(numbers) // 4 - 1))
        numbers = numbers[:place] + struct.pack("<f", number) + numbers[place + 4 :]
    elif kind == "bytes":
        return draw(other_bytes(content))
    said = draw(st.sampled_from([0, 1, 2**40, 2**64 - 1])) if kind == "length" else len(header)
    return struct.pack("<Q", said) + header + numbers


@st.composite
def damaged(draw, path):
    """What a file holds after damage; None where it is gone."""
    content = path.read_bytes()
    if draw(st.integers(0, 19)) == 0:
        return None
    if path.suffix == ".safetensors":
        return draw(other_weights(content))
    if path.suffix == ".json" and draw(st.booleans()):
        return draw(other_json(content.decode()))
    if path.suffix == ".jsonl" and draw(st.booleans()):
        rows = content.splitlines()
        place = draw(st.integers(0, len(rows) - 1))
        rows[place] = draw(other_json(rows[place].decode()))
        return b"\n".join(rows)
    return draw(other_bytes(content))


def replace(path, content):
    """Put other bytes in a file's place, or nothing."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def files_in(folder):
    """The files of a model folder that are no code."""
    return sorted(path for path in Path(folder).iterdir() if path.is_file() and path.suffix != ".py")
