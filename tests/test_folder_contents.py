"""Only what a model folder is made of counts as part of it: weights, links, side files and code each have one rule."""

import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_scratch import full_disk
from tiny_models import build
from tiny_tokenizers import encoder_tokenizer

from hf_lowrank import InputError, compress
from hf_lowrank.cli import main
from hf_lowrank.errors import Note
from hf_lowrank.files.redaction import config_without_tokens
from hf_lowrank.hosts.folder_contents import links_out, side_files_of, weight_files
from hf_lowrank.sharing import shipped_code
from hf_lowrank.sharing.cards.usage import snippet
from hf_lowrank.sharing.inspection import saved_report
from hf_lowrank.sharing.record import read_record
from hf_lowrank.sharing.saving import folder_files, load_compressed, save_folder
from hf_lowrank.sharing.verification import verify


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    build("ElectraForMaskedLM").save_pretrained(folder / "dense")
    encoder_tokenizer().save_pretrained(folder / "dense")
    small = compress(folder / "dense", keep_params=0.6, method="svd")
    return save_folder(small, folder / "small", folder / "dense")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "small")


def index_of(*files):
    return json.dumps({"metadata": {}, "weight_map": {f"weight {number}": name for number, name in enumerate(files)}})


def with_index(text):
    def change(folder):
        (folder.parent / "secret.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(text.replace("OUTSIDE", str(folder.parent)))

    return change


def as_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def as_link_out(folder):
    (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "secret.safetensors")


def with_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


NO_WEIGHTS = {
    "a pickle": (as_pickle, "has no model.safetensors; pytorch_model.bin is not loaded"),
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors. Save"),
    "a link out": (as_link_out, "is a link that leads out"),
    "index to a neighbour": (with_index(index_of("../secret.safetensors")), "beside it, got '../secret.safetensors'"),
    "index to a path": (with_index(index_of("OUTSIDE/secret.safetensors")), "beside it, got '/"),
    "index to a pickle": (with_index(index_of("pytorch_model.bin")), "beside it, got 'pytorch_model.bin'"),
    "index of numbers": (with_index('{"weight_map": {"a": 1}}'), "beside it, got 1"),
    "index without a map": (with_index("{}"), "no readable weight_map"),
    "index of a list": (with_index('{"weight_map": ["a"]}'), "no readable weight_map"),
    "index that is no JSON": (with_index("{"), "no readable weight_map"),
    "index of nothing": (with_index('{"weight_map": {}}'), "names no file"),
    "index to what is missing": (
        with_index(index_of("model-2.safetensors")),
        "model-2.safetensors, a part .* missing",
    ),
    "named by the configuration": (with_config(transformers_weights="other.safetensors"), "names 'other.safetensors'"),
}


@pytest.mark.parametrize("name", list(NO_WEIGHTS))
def test_only_safetensors_inside_the_folder_are_weights(folder, name, capsys):
    change, message = NO_WEIGHTS[name]
    change(folder)

    with pytest.raises(InputError, match=message):
        weight_files(folder)
    assert re.search(message, verify(folder).message)
    assert main(["push", str(folder), "me/small", "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert main(["doctor", str(folder)]) == 1
    assert re.search(message, capsys.readouterr().out)


def test_what_lies_beside_the_weights_that_are_loaded_is_not_published(folder):
    (folder / "old.safetensors").write_bytes(b"of another model")
    (folder / "model.safetensors.index.json").write_text(index_of("old.safetensors"))

    files, left_out = folder_files(folder)

    assert "model.safetensors" in files
    assert {"old.safetensors", "model.safetensors.index.json"} <= set(left_out)


FOREIGN = (
    "id_rsa",
    "credentials.json",
    "train.tsv",
    "notes.txt",
    "optimizer.pt",
    "runs/events.out",
    "1_Pooling/id_rsa",
)


def test_what_is_no_part_of_a_model_is_neither_copied_nor_published_and_is_named(folder, tmp_path):
    for name in FOREIGN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (folder / "1_Pooling" / "config.json").write_text("{}")

    files, left_out = folder_files(folder)

    assert not set(FOREIGN) & {*files, *side_files_of(folder)}
    assert set(FOREIGN) <= set(left_out)
    assert {"1_Pooling/config.json", "modules.json", "tokenizer.json"} <= set(side_files_of(folder))
    assert "train.tsv" in folder_files(folder, ["*.tsv"])[0]


def test_a_link_that_leads_out_is_left_out_with_a_word(folder, tmp_path):
    private = tmp_path / "private"
    private.mkdir()
    (private / "id_rsa").write_text("secret")
    (private / "LICENSE").write_text("secret")
    (folder / "LICENSE").symlink_to("../private/LICENSE")
    (folder / "additional_chat_templates").symlink_to(private)
    (folder / "1_Pooling").symlink_to("../private")
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    small = compress(build("ElectraForMaskedLM"), keep_params=0.6, method="svd")

    with pytest.warns(Note, match=r"lead out of .*1_Pooling, LICENSE, additional_chat_templates"):
        out = save_folder(small, tmp_path / "out", folder)

    assert links_out(folder) == ["1_Pooling", "LICENSE", "additional_chat_templates"]
    for files in (folder_files(folder, ["*"])[0], folder_files(out, ["*"])[0]):
        assert not [name for name, path in files.items() if "secret" in path.read_text(errors="replace")]


@pytest.mark.parametrize("name", ["config.json", "modeling_lowrank.py", "README.md", ".eval_results/hf_lowrank.yaml"])
def test_what_a_model_cannot_do_without_is_no_link_that_leads_out(folder, tmp_path, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).touch()
    (folder / name).rename(tmp_path / "moved")
    (folder / name).symlink_to(tmp_path / "moved")

    with pytest.raises(InputError, match=f"{name} of .* is a link that leads out"):
        folder_files(folder)


def test_the_links_of_a_hub_cache_are_followed(saved, tmp_path):
    repository = tmp_path / "models--me--small"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(saved.iterdir())):
        if path.is_file():
            shutil.copyfile(path, repository / "blobs" / str(number))
            (snapshot / path.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))  # noqa: PTH118
    (tmp_path / "secret").write_text("secret")
    (snapshot / "LICENSE").symlink_to(tmp_path / "secret")

    assert set(folder_files(snapshot)[0]) == set(folder_files(saved)[0])
    assert links_out(snapshot) == ["LICENSE"]
    assert type(load_compressed(snapshot)).__name__ == "LowRankElectraForMaskedLM"


def add_code(folder):
    (folder / "helpers.py").write_text("")


def change_code(folder):
    with (folder / "lowrank_linear.py").open("a") as file:
        file.write("\nimport os\n")


def hide_code(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "code.py").write_text("")


def take_code_from_elsewhere(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModel"] = "someone/else--modeling_lowrank.Model"
    (folder / "config.json").write_text(json.dumps(config))


def tokenizer_code_from_elsewhere(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "someone/else--tokenization.T"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (add_code, "helpers.py"),
        (change_code, "lowrank_linear.py"),
        (hide_code, "deep/code.py"),
        (take_code_from_elsewhere, "someone/else--modeling_lowrank.Model"),
        (tokenizer_code_from_elsewhere, "someone/else--tokenization.T"),
    ],
)
def test_code_this_library_never_shipped_is_not_run(folder, process_of_its_own, monkeypatch, change, name):
    change(folder)
    monkeypatch.setattr("subprocess.run", None)

    found = verify(folder)

    assert not found.ok
    assert found.message.startswith(f"{name} is not code that hf_lowrank ships")


def test_code_of_every_version_is_known():
    assert shipped_code.shipped_digests() <= set(shipped_code.known_digests()), "run `make docs`"


def test_a_table_of_structures_may_have_some_lines_of_ours_and_no_other(folder, monkeypatch):
    (folder / "lowrank_table.py").write_text("from .lowrank_linear import LowRankLinear\nSTRUCTURES = {}\n")
    lines = shipped_code._digests_of(
        "lowrank_table.py", b"a = 1\nfrom .lowrank_linear import LowRankLinear\nSTRUCTURES = {}"
    )
    monkeypatch.setattr(shipped_code, "known_digests", lambda: lines)

    assert shipped_code.foreign_code(folder) == []
    (folder / "lowrank_table.py").write_text("from .lowrank_linear import LowRankLinear\nimport os\n")
    assert shipped_code.foreign_code(folder) == ["lowrank_table.py"]


SPY = """
import os, socket
def told():
    found = {name: value for name, value in os.environ.items() if "TOKEN" in name or "SECRET" in name or "KEY" in name}
    from huggingface_hub import get_token
    found["token"] = get_token()
    for name, call in {"connect": lambda: socket.create_connection(("127.0.0.1", PORT), 1),
                       "look up": lambda: socket.getaddrinfo("huggingface.co", 443)}.items():
        try:
            call()
            found[name] = "worked"
        except PermissionError:
            pass
    return found
open("FOUND", "w").write(repr(told()))
"""


def test_code_that_is_verified_gets_no_token_and_no_network(folder, process_of_its_own, tmp_path, monkeypatch):
    (tmp_path / "token").write_text("hf_storedstoredstored")
    secrets = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MY_API_KEY", "AWS_SECRET_ACCESS_KEY", "OMP_TOKEN")
    for name in secrets:
        monkeypatch.setenv(name, "hf_secretsecretsecret")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    spy = SPY.replace("FOUND", str(tmp_path / "found")).replace("PORT", "9")
    file = folder / "modeling_lowrank.py"
    file.write_text(file.read_text() + spy)

    assert verify(folder, trust_remote_code=True).ok

    found = eval((tmp_path / "found").read_text())
    kept = {name: value for name, value in found.items() if value is not None and name != "HF_TOKEN_PATH"}
    assert kept == {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    assert "hf_stored" not in str(found)


def change_plan(folder):
    config = json.loads((folder / "config.json").read_text())
    name = next(iter(config["compression"]["modules"]))
    config["compression"]["modules"][name] |= {"rank": 1}
    (folder / "config.json").write_text(json.dumps(config))


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def plan(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["compression"] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return change


# What is damaged -> the change, and what doctor says of it
DAMAGED = {
    "cut weights": (cut_weights, "incomplete|truncat|buffer|[Ee]rror"),
    "changed plan": (change_plan, "do not fit its plan: [0-9]+ of another shape"),
    "a plan of nothing": (plan(modules={}), "do not fit its plan: [0-9]+ missing"),
    "version 3": (plan(format_version=3), "format_version must be"),
    "no modules": (plan(modules=None), "compression.modules must be a JSON object"),
    "no plan": (with_config(compression={}), "compression"),
    "a text as plan": (with_config(compression="low_rank"), "compression"),
}


@pytest.mark.parametrize("name", list(DAMAGED))
def test_doctor_looks_at_weights_and_plan(folder, capsys, name):
    change, message = DAMAGED[name]
    change(folder)

    assert main(["doctor", str(folder)]) == 1
    assert re.search(f"problem .*({message})", capsys.readouterr().out)


@pytest.mark.parametrize("name", [*DAMAGED, *NO_WEIGHTS])
def test_no_command_believes_an_old_report_of_a_broken_folder(folder, capsys, name):
    (DAMAGED | NO_WEIGHTS)[name][0](folder)

    for command, *more in (["inspect"], ["card"], ["push", "me/small", "--dry-run"], ["decompress", f"{folder}-out"]):
        assert main([command, str(folder), *more]) == 2, command
        assert capsys.readouterr().err.count("\n") == 1


def change_a_number(folder):
    state = load_file(folder / "model.safetensors")
    name = next(name for name, value in state.items() if value.is_floating_point() and value.numel())
    save_file(state | {name: state[name] + 1}, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("change", [change_plan, change_a_number])
def test_a_report_is_believed_for_the_weights_and_the_plan_it_was_written_for(folder, change):
    assert read_record(folder) == saved_report(folder)

    change(folder)

    assert read_record(folder) is None


TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz"


def test_no_file_of_a_saved_folder_holds_a_token(tmp_path):
    build("BertModel").save_pretrained(tmp_path / TOKEN)
    encoder_tokenizer().save_pretrained(tmp_path / TOKEN)

    assert (
        main(["compress", str(tmp_path / TOKEN), str(tmp_path / "small"), "--keep-params", "0.6", "--method", "svd"])
        == 0
    )

    compress(tmp_path / TOKEN, keep_params=0.6, method="svd").save_pretrained(tmp_path / "saved")
    written = [path for name in ("small", "saved") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert len(written) > 10
    assert [path.name for path in written if TOKEN.encode() in path.read_bytes()] == []


def test_a_folder_that_was_saved_with_a_token_is_not_published_with_it(folder):
    config = json.loads((folder / "config.json").read_text())
    config["compression"]["provenance"]["command"] = f"compress {TOKEN}"

    hidden = json.loads(config_without_tokens(json.dumps(config)))

    assert hidden["compression"]["provenance"]["command"] == "compress hf_***"
    assert hidden["compression"]["modules"] == config["compression"]["modules"]


@pytest.mark.parametrize("kind", ["fast", "slow vocabulary", "no class named"])
def test_the_lines_of_a_card_run_without_a_question(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    small = compress(build("ElectraForQuestionAnswering"), keep_params=0.6, method="svd")
    folder = save_folder(small, tmp_path / "small", tokenizer=encoder_tokenizer())
    if kind == "no class named":
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings.pop("tokenizer_class", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if kind == "slow vocabulary":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nlow\n")
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    made = {}

    exec(snippet(saved_report(folder), str(folder)), made)

    assert made["tokenizer"]("low").input_ids


def provenance(value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config["compression"]["provenance"] = value
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "compression_report.json").unlink()

    return change


def foreign_readme(folder):
    (folder / "README.md").write_bytes(b"caf\xe9")


def own_notes_of_another_encoding(folder):
    with (folder / "README.md").open("ab") as file:
        file.write(b"caf\xe9")


def plain_file(name, content):
    return lambda folder: (folder / name).write_text(content)


# What a folder holds that cannot be used -> the change, and commands with what each says or, where it works, nothing
ODD = {
    "provenance of text": (provenance("text"), {"inspect": "must be a JSON object", "card": "must be a JSON object"}),
    "provenance of a list": (provenance([1]), {"inspect": "must be a JSON object", "card": "must be a JSON object"}),
    "settings of a number": (provenance({"settings": 5}), {"card": "damaged"}),
    "text of a number": (provenance({"text": 5}), {"card": "damaged"}),
    "versions of a list": (provenance({"versions": [1]}), {"card": "damaged"}),
    "training of text": (provenance({"training": "x"}), {"card": "damaged"}),
    "origin of text": (provenance({"origin": "x"}), {"inspect": "damaged", "card": "damaged"}),
    "a foreign README": (foreign_readme, {"card": "not written by hf_lowrank", "push": None, "inspect": None}),
    "notes of another encoding": (own_notes_of_another_encoding, {"card": "not UTF-8", "push": None}),
    "a report of a list": (plain_file("compression_report.json", "[]"), {"inspect": "damaged", "card": "damaged"}),
    "a report of nothing": (plain_file("compression_report.json", "{}"), {"inspect": "damaged", "push": "damaged"}),
}


@pytest.mark.parametrize("name", list(ODD))
def test_what_is_odd_in_a_folder_is_said_in_one_line(folder, capsys, name):
    change, said = ODD[name]
    change(folder)

    for command, message in said.items():
        status = main([command, str(folder), *(["me/small", "--dry-run"] if command == "push" else [])])
        error = capsys.readouterr().err
        assert (status, error.count("\n")) == ((0, 0) if message is None else (2, 1)), (command, error)
        assert message is None or message in error


@pytest.mark.parametrize("command", [["inspect", "PATH"], ["compress", "PATH", "OUT", "--keep-params", "0.5"]])
def test_a_folder_that_does_not_exist_is_said_not_to(tmp_path, capsys, command):
    places = {"PATH": str(tmp_path / "nowhere"), "OUT": str(tmp_path / "out")}

    assert main([places.get(part, part) for part in command]) == 2

    assert "no folder" in capsys.readouterr().err


def test_verify_on_a_full_disk_says_so_in_one_line(folder, capsys):
    with full_disk():
        status = main(["verify", str(folder)])

    assert (status, capsys.readouterr().err.count("\n")) == (2, 1)


@pytest.mark.parametrize("command", [["inspect", "PATH"], ["inspect", "PATH", "--json"], ["doctor", "PATH"]])
def test_a_reader_that_has_enough_is_no_error(folder, monkeypatch, command):
    reader, writer = os.pipe()
    os.close(reader)

    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert main([str(folder) if part == "PATH" else part for part in command]) == 0
