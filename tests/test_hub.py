"""Publishing: everything in one commit or nothing, whatever goes wrong; a rerun completes; no token in any text."""

import json
import logging

import huggingface_hub
import pytest
from hub_server import HubServer, Refused
from tiny_models import build
from tiny_tokenizers import encoder_tokenizer

from hf_lowrank import InputError, compress, push_to_hub
from hf_lowrank.cli import main
from hf_lowrank.sharing import hub
from hf_lowrank.sharing.saving import save_folder
from hf_lowrank.sharing.verification import Verification

# The client's own way to call its transport.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

REPO = "user/small"


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        yield server


@pytest.fixture(autouse=True)
def client(server, monkeypatch):
    """The client of this process talks to the server, without waiting between tries."""
    server.repos.clear()
    server.stored.clear()
    server.faults.clear()
    server.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A dense sentence encoder with tokenizer, pooling and what a training run left."""
    folder = tmp_path_factory.mktemp("dense") / "encoder"
    build("BertModel").save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    modules = [{"idx": 0, "name": "0", "path": "", "type": "T"}, {"idx": 1, "name": "1", "path": "1_P", "type": "P"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_P").mkdir()
    (folder / "1_P" / "config.json").write_text('{"word_embedding_dimension": 36}')
    return folder


@pytest.fixture(scope="module")
def small(source):
    return compress(source, keep_params=0.6, method="svd", storage="low_rank")


@pytest.fixture
def folder(small, source, tmp_path):
    folder = save_folder(small, tmp_path / "small", source)
    for left in ("optimizer.pt", ".env", "trainer_state.json"):
        (folder / left).write_text("left by a run")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "model.safetensors").write_text("an old one")
    return folder


@pytest.fixture
def verified(monkeypatch):
    """Skips the proof in another process, which other tests see."""
    monkeypatch.setattr(hub, "verify", lambda *_: Verification(True, "proved"))


def published(server, ref="main"):
    return {name: content for name, content in server.repos[REPO].files(ref).items() if name != ".gitattributes"}


def test_push_publishes_every_file_in_one_commit(server, folder):
    push = push_to_hub(folder, REPO, commit_message="Smaller\n\nBy half.")

    repo = server.repos[REPO]
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "modules.json"}
    assert list(repo.messages.values())[1:] == [("Smaller", "By half.")]
    assert set(published(server)) == set(push.files) >= expected | {"1_P/config.json", "modeling_lowrank.py"}
    assert not {"optimizer.pt", ".env", "trainer_state.json"} & set(push.files)
    same = {name for name in push.files if published(server)[name] == (folder / name).read_bytes()}
    assert set(push.files) - same == {"README.md"}  # which names the repository
    assert f'"{REPO}", trust_remote_code=True' in published(server)["README.md"].decode()
    assert push.url == f"{server.endpoint}/{REPO}/commit/{repo.refs['main']}"


def test_a_second_push_of_the_same_folder_changes_nothing(server, folder, verified):
    first = push_to_hub(folder, REPO)
    second = push_to_hub(folder, REPO)

    assert first.commit.oid == second.commit.oid
    assert len(server.repos[REPO].commits) == 2


def test_a_model_in_memory_is_pushed_with_the_tokenizer_it_came_with(server, small):
    commit = small.push_to_hub("small", private=True, commit_description="why")

    assert server.repos[REPO].private
    assert commit.oid == server.repos[REPO].refs["main"]
    assert server.repos[REPO].messages[commit.oid] == ("Upload compressed model with hf_lowrank", "why")
    assert {"tokenizer.json", "1_P/config.json", "modeling_lowrank.py"} <= set(published(server))


def test_the_class_and_the_function_publish_the_same(server, folder, small, verified):
    small.push_to_hub(REPO)
    by_class = published(server)
    server.repos.clear()
    push_to_hub(folder, REPO)

    assert by_class == published(server)


def test_max_shard_size_is_no_option_of_a_push(small):
    with pytest.raises(InputError, match="option of save_pretrained"):
        small.push_to_hub(REPO, max_shard_size="1MB")


@pytest.mark.parametrize("create_pr", [False, True])
def test_other_branches_and_pull_requests_leave_main_alone(server, folder, verified, create_pr):
    huggingface_hub.HfApi().create_repo(REPO)
    before = published(server)

    push = push_to_hub(folder, REPO, **({"create_pr": True} if create_pr else {"revision": "v2"}))

    assert published(server) == before == {}
    assert set(published(server, "refs/pr/1" if create_pr else "v2")) == set(push.files)
    assert push.url.endswith("/discussions/1") == create_pr


def test_a_dry_run_lists_the_files_and_sends_nothing(server, folder, capsys):
    status = main(["push", str(folder), REPO, "--dry-run"])

    printed = capsys.readouterr().out
    assert status == 0
    assert not server.requests
    assert "model.safetensors" in printed
    assert f"{len(push_to_hub(folder, REPO, dry_run=True).files)} files" in printed


def test_what_does_not_pass_verify_is_not_pushed(server, folder):
    shipped = folder / "lowrank_linear.py"
    shipped.write_text(shipped.read_text().replace("self.up(", "2 * self.up("))

    with pytest.raises(InputError, match=r"does not pass `verify`.*differ by up to"):
        push_to_hub(folder, REPO, trust_remote_code=True)

    assert not server.requests


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "modeling_lowrank.py", "config.json"])
def test_what_changes_while_it_is_verified_is_not_published(server, folder, monkeypatch, name):
    def change(*_):
        with (folder / name).open("ab") as file:
            file.write(b"\n")
        return Verification(True, "proved")

    monkeypatch.setattr(hub, "verify", change)

    with pytest.raises(InputError, match=f"nothing was published: {name} changed while it was verified"):
        push_to_hub(folder, REPO)

    assert not published(server)


def test_what_is_left_out_is_named_and_taken_where_it_is_asked_for(folder, capsys):
    (folder / "NOTES.md").write_text("notes")

    assert main(["push", str(folder), REPO, "--dry-run"]) == 0
    assert (
        "left out (--include PATTERN takes more): NOTES.md, checkpoint-1/model.safetensors" in capsys.readouterr().out
    )
    assert "NOTES.md" in push_to_hub(folder, REPO, dry_run=True, include=["*.md"]).files


@pytest.mark.parametrize(
    ("place", "error"),
    [("nowhere", "is not a folder"), (".", "is not a model folder")],
)
def test_what_is_no_compressed_model_is_not_pushed(server, tmp_path, place, error):
    with pytest.raises(InputError, match=error):
        push_to_hub(tmp_path / place, REPO)

    assert not server.requests


@pytest.mark.parametrize(
    ("options", "error"),
    [({"repo_id": "a/b/c"}, "cannot name a repository"), ({"create_pr": True, "revision": "v2"}, "one of the two")],
)
def test_what_cannot_be_asked_for_is_refused_at_once(server, folder, options, error):
    with pytest.raises(InputError, match=error):
        push_to_hub(folder, **{"repo_id": REPO, **options})

    assert not server.requests


PREUPLOAD, UPLOAD, COMMIT = "/preupload/", "^/lfs/", "/commit/"


@pytest.mark.parametrize(
    ("method", "pattern", "status", "reason"),
    [
        ("POST", "/repos/create", 401, "no valid token.*hf auth login"),
        ("POST", "/repos/create", 403, "does not let this token write"),
        ("POST", PREUPLOAD, 404, "no such repository"),
        ("POST", COMMIT, 409, "changed meanwhile"),
        ("POST", COMMIT, 412, "changed meanwhile"),
        ("POST", COMMIT, 503, "in trouble .status 503"),
        ("PUT", UPLOAD, 503, "in trouble .status 503"),
        ("PUT", UPLOAD, None, "connection broke"),
        ("POST", COMMIT, None, "connection broke"),
        ("POST", "validate-yaml", 400, "metadata"),
    ],
)
def test_a_failure_is_one_line_publishes_nothing_and_a_rerun_completes(
    server, folder, verified, method, pattern, status, reason
):
    (folder / "README.md").write_text("---\ntags: [a]\n---\n")
    server.fail(method, pattern, status, times=99)

    with pytest.raises(InputError, match=reason) as raised:
        push_to_hub(folder, REPO)

    assert "\n" not in str(raised.value)
    assert "nothing was published" in str(raised.value)
    assert REPO not in server.repos or not published(server)
    server.faults.clear()
    push = push_to_hub(folder, REPO)
    assert set(published(server)) == set(push.files)


@pytest.mark.parametrize(
    ("method", "pattern", "status"),
    [("POST", "/repos/create", 500), ("POST", PREUPLOAD, 502), ("PUT", UPLOAD, 503), ("PUT", UPLOAD, None),
     ("POST", COMMIT, 504), ("POST", COMMIT, None)],
)  # fmt: skip
def test_trouble_that_passes_is_waited_out(server, folder, verified, method, pattern, status):
    server.fail(method, pattern, status, times=2)

    push = push_to_hub(folder, REPO)

    assert set(published(server)) == set(push.files)
    assert len(server.repos[REPO].commits) == 2


def test_what_is_uploaded_is_not_sent_twice(server, folder, verified):
    server.fail("POST", COMMIT, 503, times=99)
    with pytest.raises(InputError):
        push_to_hub(folder, REPO)
    server.faults.clear()
    server.requests.clear()

    push_to_hub(folder, REPO)

    assert "PUT" not in {method for method, _ in server.requests}


@pytest.mark.parametrize("where", ["offline", "unreachable"])
def test_without_a_hub_the_line_says_so(folder, verified, monkeypatch, where):
    if where == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    huggingface_hub.close_session()

    with pytest.raises(InputError, match="HF_HUB_OFFLINE" if where == "offline" else "cannot be reached"):
        push_to_hub(folder, REPO)


@pytest.mark.parametrize("token", ["hf_readertokenreadertoken", "hf_unknowntokenunknown", "no-prefix-at-all"])
def test_no_token_is_in_an_error_or_a_log(server, folder, verified, caplog, capsys, monkeypatch, token):
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, logger="huggingface_hub")
    monkeypatch.setattr("hub_server._Handler._create_repo", lambda handler: refuse(f"no rights for {token}"))
    monkeypatch.setenv("HF_TOKEN", token)

    status = main(["push", str(folder), REPO])

    printed = capsys.readouterr()
    assert status == 2
    assert "no rights for" in printed.err or "no valid token" in printed.err
    for text in (printed.err, printed.out, caplog.text):
        assert token not in text
        assert server.token not in text


def refuse(message):
    raise Refused(403, message=message)


def test_the_command_publishes_and_prints_what_to_do_next(server, folder, verified, capsys):
    assert main(["push", str(folder), REPO, "--private", "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["url"].startswith(server.endpoint)
    assert set(found["files"]) == set(published(server))
    assert server.repos[REPO].private
