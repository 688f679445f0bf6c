"""A saved folder appears complete or not at all, with what belongs to it."""

import json

import pytest
from transformers import BertConfig, BertModel

from hf_lowrank import InputError, compress
from hf_lowrank.sharing import saving
from hf_lowrank.sharing.cards.card import KEPT_LINE
from hf_lowrank.sharing.saving import check_output, load_compressed, save_folder, side_file_bytes, side_files

CONFIG = BertConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    vocab_size=100,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def small():
    return compress(BertModel(CONFIG).eval(), keep_targets=0.5, method="svd")


@pytest.fixture
def source(tmp_path):
    """A sentence-transformers folder with a training run's leftovers in it."""
    folder = tmp_path / "source"
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    files = {
        "config.json": "{}",
        "README.md": "card",
        "vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n",
        "tokenizer_config.json": json.dumps({"tokenizer_class": "BertTokenizer"}),
        "modules.json": json.dumps(modules),
        "1_Pooling/config.json": "{}",
        "2_Dense/model.safetensors": "weights of a later module",
        "model.safetensors": "weights",
        "pytorch_model.bin": "weights",
        "optimizer.pt": "state",
        "modeling_lowrank.py": "code",
        "checkpoint-10/model.safetensors": "weights",
        "onnx/model.onnx": "weights",
        ".gitattributes": "lfs",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fail_at(monkeypatch, stage, error):
    def fail(*args, **kwargs):
        raise error

    if stage == "weights":
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    elif stage == "side files":
        monkeypatch.setattr(saving, "_copy_side_files", fail)
    else:
        rename = saving.Path.rename
        monkeypatch.setattr(saving.Path, "rename", lambda self, to: fail() if self.name == "new" else rename(self, to))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("stage", ["weights", "side files", "swap"])
def test_a_failed_save_leaves_the_old_folder_and_nothing_else(small, source, tmp_path, monkeypatch, stage, error):
    out = save_folder(small, tmp_path / "out")
    before, neighbours = tree(out), set(tmp_path.iterdir())
    fail_at(monkeypatch, stage, error)

    with pytest.raises(type(error)):
        save_folder(small, out, source, overwrite=True)

    assert tree(out) == before
    assert set(tmp_path.iterdir()) == neighbours


def test_a_failed_first_save_leaves_nothing_not_even_parents(small, tmp_path, monkeypatch):
    fail_at(monkeypatch, "weights", OSError(28, "No space left on device"))

    with pytest.raises(OSError, match="No space left"):
        save_folder(small, tmp_path / "a" / "b" / "out")

    assert not list(tmp_path.iterdir())


def test_overwriting_replaces_every_file(small, tmp_path):
    out = save_folder(small, tmp_path / "out")
    (out / "stale.txt").write_text("old")

    save_folder(small, out, overwrite=True)

    assert not (out / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_saved_folder_holds_equal_weights(small, tmp_path):
    again = load_compressed(save_folder(small, tmp_path / "out"))

    assert all(again.state_dict()[name].equal(value) for name, value in small.state_dict().items())


def test_every_file_of_a_saved_folder_has_the_same_mode(small, tmp_path):
    out = save_folder(small, tmp_path / "out")

    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_side_files_are_the_tokenizer_and_the_later_modules(source):
    assert set(side_files(source)) == {
        "vocab.txt", "tokenizer_config.json", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"
    }  # fmt: skip
    assert side_file_bytes(source) == sum(len(path.read_bytes()) for path in side_files(source).values())


def test_module_folder_outside_the_source_is_not_copied(source):
    (source / "modules.json").write_text(json.dumps([{"path": "../elsewhere"}]))
    (source.parent / "elsewhere").mkdir()
    (source.parent / "elsewhere" / "secret").write_text("")

    assert not [name for name in side_files(source) if "secret" in name]


def test_side_files_never_replace_what_the_model_saved(small, source, tmp_path):
    out = save_folder(small, tmp_path / "out", source)

    assert (out / "modeling_lowrank.py").read_text() != "code"
    assert (out / "2_Dense" / "model.safetensors").read_text() == "weights of a later module"
    assert KEPT_LINE in (out / "README.md").read_text()


def test_tokenizer_that_only_the_model_type_named_gets_its_class_written_down(small, source, tmp_path):
    (source / "tokenizer_config.json").unlink()
    BertConfig().save_pretrained(source)

    out = save_folder(small, tmp_path / "out", source)

    assert json.loads((out / "tokenizer_config.json").read_text())["tokenizer_class"].startswith("Bert")


def test_a_hub_id_out_of_reach_has_no_side_files():
    assert side_files("nobody/no-such-model") == {}


@pytest.mark.parametrize(
    ("out", "overwrite", "message"),
    [
        ("full", False, r"exists and is not empty.*--overwrite"),
        ("full", True, r"not a model folder \(no config.json\)"),
        ("file", True, r"is a file; the output must be a folder"),
        ("file/out", False, r"is a file; the output must be a folder"),
        ("source", True, r"overlap"),
        ("source/out", False, r"overlap"),
        (".", True, r"overlap"),
    ],
)
def test_output_that_must_not_be_written_is_refused(source, tmp_path, out, overwrite, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    (tmp_path / "file").write_text("")

    with pytest.raises(InputError, match=message):
        check_output(tmp_path / out, overwrite, source)


@pytest.mark.parametrize("out", ["new", "new/deep", "empty"])
def test_new_and_empty_outputs_are_fine(source, tmp_path, out):
    (tmp_path / "empty").mkdir()

    check_output(tmp_path / out, source=source)
