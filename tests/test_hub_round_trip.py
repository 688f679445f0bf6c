"""Published here, loaded by name in a process without this library: the same function, bit for bit."""

import json

import huggingface_hub
import pytest
import torch
from elsewhere import run_elsewhere
from every_structure import OF_ANY_MODEL, build_every_structure
from hub_server import HubServer
from tiny_models import build, family_of, inputs_for, largest_difference, outputs
from tiny_tokenizers import decoder_tokenizer, encoder_tokenizer
from transformers import GenerationConfig

import hf_lowrank
from hf_lowrank import compress, push_to_hub
from hf_lowrank.remote_code.lowrank_table import STRUCTURES
from hf_lowrank.sharing import hub
from hf_lowrank.sharing.saving import save_folder
from hf_lowrank.sharing.verification import Verification

# The client's own way to call its transport.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")

# saved head -> its auto class
HEADS = {"BertForMaskedLM": "AutoModelForMaskedLM", "GPT2LMHeadModel": "AutoModelForCausalLM"}
# What a structure needs is downloaded with it; of a second family, one is enough.
CASES = [*(("BertForMaskedLM", structure) for structure in OF_ANY_MODEL), ("GPT2LMHeadModel", "low_rank")]

LOADING = """
from tiny_models import inputs_for, outputs

found = {}
for repo, head, autos in jobs["cases"]:
    for auto in autos:
        load = getattr(transformers, auto).from_pretrained
        model, info = load(repo, trust_remote_code=True, output_loading_info=True)
        found[repo, auto] = {
            "class": (type(model).__name__, type(model).__module__),
            "missing": sorted(info["missing_keys"]),
            "outputs": outputs(model.eval(), inputs_for(head)),
        }
torch.save(found, jobs["results"])
"""


def name_of(head, structure):
    return f"user/{family_of(head)}-{structure}"


def drawn(head, structure):
    """A compressed model of that structure with random numbers; an embedding's needs a linear one beside it."""
    return build_every_structure(
        head, dict.fromkeys(["low_rank", structure] if is_embedding(structure) else [structure])
    )


def is_embedding(structure):
    return STRUCTURES[structure].HOSTS == "embedding"


@pytest.fixture(scope="module")
def server():
    with HubServer() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", server.token)
        patch.setenv("NO_PROXY", "127.0.0.1,localhost")
        # What is downloaded proves more than the folder that was pushed.
        patch.setattr(hub, "verify", lambda *_: Verification(True, "proved"))
        huggingface_hub.close_session()
        yield server
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def models():
    return {case: drawn(*case) for case in CASES}


@pytest.fixture(scope="module")
def loaded(server, models, tmp_path_factory):
    """What a process without this library downloaded, by repository and auto class."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for (head, structure), model in models.items():
        push_to_hub(model, name_of(head, structure), private=structure == "low_rank")
    cases = [(name_of(*case), case[0], ["AutoModel", HEADS[case[0]]]) for case in CASES]
    server.requests.clear()
    run_elsewhere(LOADING, folder, server.environment(), cases=cases, results=str(folder / "results.pt"))
    downloads = [path for method, path in server.requests if method == "GET" and path.startswith("/cdn/")]
    return {**torch.load(folder / "results.pt"), "downloads": downloads}


@pytest.mark.parametrize(("head", "structure"), CASES)
def test_the_saved_head_downloads_and_computes_the_same(loaded, models, head, structure):
    found = loaded[name_of(head, structure), HEADS[head]]

    expected = outputs(models[head, structure], inputs_for(head))

    assert found["class"][0] == f"LowRank{head}"
    assert found["class"][1].startswith("transformers_modules.user.")
    assert not found["missing"]
    assert largest_difference(found["outputs"], expected) == 0.0


@pytest.mark.parametrize(("head", "structure"), CASES)
def test_the_base_model_downloads_and_computes_the_same(loaded, models, head, structure, tmp_path):
    found = loaded[name_of(head, structure), "AutoModel"]
    models[head, structure].save_pretrained(tmp_path)
    here = getattr(hf_lowrank, found["class"][0]).from_pretrained(tmp_path).eval()
    drawn_anew = [name for name in found["missing"] if not name.startswith("pooler.")]

    there = {name: value for name, value in found["outputs"].items() if name != "pooler_output"}

    assert not drawn_anew
    assert there
    for name, value in there.items():
        assert torch.equal(value, outputs(here, inputs_for(head))[name])


def test_the_token_goes_to_the_hub_and_nowhere_else(loaded):
    assert len(loaded["downloads"]) == len(CASES)  # the content network refuses requests that bear a token


PUSHING = """
model = transformers.AutoModelForMaskedLM.from_pretrained(jobs["saved"], trust_remote_code=True)
model.push_to_hub("user/from-elsewhere")
again = transformers.AutoModelForMaskedLM.from_pretrained("user/from-elsewhere", trust_remote_code=True)
from tiny_models import inputs_for, largest_difference, outputs
inputs = inputs_for("BertForMaskedLM")
assert largest_difference(outputs(model.eval(), inputs), outputs(again.eval(), inputs)) == 0.0
"""


def test_where_this_library_is_not_a_model_pushes_its_weights_code_and_configuration(server, tmp_path):
    small = compress(build("BertForMaskedLM"), keep_params=0.6, method="svd")
    small.save_pretrained(tmp_path / "small")

    run_elsewhere(PUSHING, tmp_path, server.environment(), saved=str(tmp_path / "small"))

    files = server.repos["user/from-elsewhere"].files()
    shipped = {path.name for path in (tmp_path / "small").glob("*.py")}
    assert set(files) >= shipped | {"config.json", "model.safetensors", "README.md"}
    assert json.loads(files["config.json"])["compression"]["modules"]


ENCODING = """
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer(jobs["repo"], trust_remote_code=True, device="cpu")
torch.save(encoder.encode(["a b c", "d"], convert_to_tensor=True), jobs["results"])
"""


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory):
    """A dense sentence encoder as sentence-transformers saves one."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("encoder")
    build("BertModel").save_pretrained(folder / "bert")
    encoder_tokenizer().save_pretrained(folder / "bert")
    sentence_transformers.SentenceTransformer(str(folder / "bert"), device="cpu").save(str(folder / "encoder"))
    return folder / "encoder"


def test_a_sentence_encoder_keeps_its_pooling(server, sentence_encoder, tmp_path):
    small = compress(sentence_encoder, keep_params=0.6, method="svd")
    folder = save_folder(small, tmp_path / "small", sentence_encoder)
    push_to_hub(folder, "user/encoder")

    run_elsewhere(ENCODING, tmp_path, server.environment(), repo="user/encoder", results=str(tmp_path / "r.pt"))

    batch = encoder_tokenizer()(["a b c", "d"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = small(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    assert torch.allclose(torch.load(tmp_path / "r.pt"), pooled, atol=1e-6)


PIPELINES = """
from transformers import pipeline

found = {}
for task, folder, text in jobs["cases"]:
    found[task] = pipeline(task, model=folder, trust_remote_code=True, device="cpu")(text)
tokenizer = transformers.AutoTokenizer.from_pretrained(jobs["answering"])
model = transformers.AutoModelForQuestionAnswering.from_pretrained(jobs["answering"], trust_remote_code=True).eval()
with torch.no_grad():
    answer = model(**tokenizer("a b", "c d e", return_tensors="pt"))
found["question-answering"] = [answer.start_logits.tolist(), answer.end_logits.tolist()]
with open(jobs["results"], "w") as file:
    json.dump(found, file)
"""
TASKS = {
    "fill-mask": ("BertForMaskedLM", "a [MASK] c"),
    "text-classification": ("BertForSequenceClassification", "a b c"),
    "feature-extraction": ("BertModel", "a b c"),
    "text-generation": ("GPT2LMHeadModel", "a b c"),
    "question-answering": ("BertForQuestionAnswering", ""),
}


@pytest.fixture(scope="module")
def piped(tmp_path_factory):
    """What pipelines answered, from folders that hold their tokenizer, in a process without this library."""
    root = tmp_path_factory.mktemp("pipelines")
    for task, (head, _) in TASKS.items():
        source = root / "dense" / task
        dense = build(head)
        if dense.can_generate():
            dense.generation_config = GenerationConfig(max_new_tokens=4)  # a pipeline's own default is more
        dense.save_pretrained(source)
        (decoder_tokenizer() if "GPT2" in head else encoder_tokenizer()).save_pretrained(source)
        save_folder(compress(source, keep_params=0.6, method="svd"), root / task, source)
    # The pipelines of transformers no longer include question answering; its head and tokenizer load all the same.
    cases = [(task, str(root / task), text) for task, (_, text) in TASKS.items() if task != "question-answering"]
    results = root / "results.json"
    run_elsewhere(PIPELINES, root, cases=cases, answering=str(root / "question-answering"), results=str(results))
    return json.loads(results.read_text())


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_runs_from_the_folder_alone(piped, task):
    found = piped[task]

    if task == "fill-mask":
        assert found[0]["sequence"].startswith("a ")
        assert found[0]["sequence"].endswith(" c")
    elif task == "text-classification":
        assert found[0]["label"].startswith("LABEL_")
    elif task == "feature-extraction":
        assert (len(found[0]), len(found[0][0])) == (5, 36)
    elif task == "text-generation":
        assert found[0]["generated_text"].startswith("a b c")
        assert len(found[0]["generated_text"].replace(" ", "")) <= 3 + 4
    else:
        assert [len(row) for side in found for row in side] == [8, 8]
