"""What enters as a model: what holds one is opened, and what cannot be used is refused in one line at every verb."""

import json
import re
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_models import build
from tiny_tokenizers import LETTERS, encoder_tokenizer
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_lowrank import InputError, analyze, compare, compress, decompress, evaluate, lpaf, recover, saved_report
from hf_lowrank.cli import main
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.sharing.saving import load_compressed
from hf_lowrank.sharing.verification import verify

# peft asks models of transformers for an attribute of theirs that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HEAD = "BertForSequenceClassification"
ROWS = [{"text": " ".join(LETTERS[number:]), "label": number % 2} for number in range(20)]
TOKENIZER = {"tokenizer": encoder_tokenizer()}

# verb -> what it makes of a dense model
VERBS = {
    "compress": lambda model: compress(model, rank=4, method="svd"),
    "analyze": lambda model: analyze(model, method="svd"),
    "compare": lambda model: compare(model, ROWS, "text-classification", methods=["svd"], **TOKENIZER),
    "evaluate": lambda model: evaluate(model, ROWS, "text-classification", cost=False, **TOKENIZER),
    "lpaf": lambda model: lpaf(model, dataset=ROWS, keep_targets=0.5, **TOKENIZER),
    "recover": lambda model: recover(
        compress(build(HEAD), rank=4, method="svd"), teacher=model, dataset=ROWS, **TOKENIZER
    ),
}
# verb -> what it makes of a compressed one
OF_COMPRESSED = {
    "evaluate": VERBS["evaluate"],
    "decompress": decompress,
    "recover": lambda model: recover(model, teacher=build(HEAD), dataset=ROWS, **TOKENIZER),
}
PLACES = {
    "matrix": "bert.encoder.layer.1.output.dense.weight",
    "embedding": "bert.embeddings.position_embeddings.weight",
    "norm": "bert.encoder.layer.0.output.LayerNorm.weight",
    "bias": "bert.encoder.layer.1.attention.self.key.bias",
    "head": "classifier.weight",
}
FACTORS = {"factor": "bert.encoder.layer.0.output.dense.down.weight", **{key: PLACES[key] for key in ("norm", "head")}}


def spoiled(model, name, value=float("nan")):
    state = model.state_dict()
    state[name].view(-1)[-1] = value
    return model


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("place", PLACES)
def test_a_weight_that_is_not_finite_is_named_before_any_work(verb, place):
    with pytest.raises(InputError, match=f"'{PLACES[place]}' of {HEAD} holds NaN or Inf"):
        VERBS[verb](spoiled(build(HEAD), PLACES[place]))


@pytest.mark.parametrize("verb", OF_COMPRESSED)
@pytest.mark.parametrize("place", FACTORS)
def test_a_compressed_weight_that_is_not_finite_is_named(verb, place):
    small = spoiled(compress(build(HEAD), rank=4, method="svd"), FACTORS[place], float("inf"))

    with pytest.raises(InputError, match=f"'{FACTORS[place]}' of LowRank{HEAD} holds NaN or Inf"):
        OF_COMPRESSED[verb](small)


@pytest.mark.parametrize("place", ["position_ids", "running"])
def test_a_buffer_that_is_not_finite_is_named(place):
    model = build(HEAD)
    model.bert.register_buffer(place, torch.full((3,), float("nan")), persistent=False)

    with pytest.raises(InputError, match=f"'bert.{place}' of {HEAD} holds NaN"):
        load_dense(model)


def test_a_mask_that_the_constructor_makes_may_hold_infinity():
    model = build(HEAD)
    model.bert.register_buffer("mask", torch.full((3,), float("-inf")), persistent=False)

    assert load_dense(model) is model


def test_saved_weights_that_are_not_finite_are_refused_on_loading_and_verifying(tmp_path):
    spoiled(build(HEAD), PLACES["bias"]).save_pretrained(tmp_path / "dense")
    spoiled(compress(build(HEAD), rank=4, method="svd"), FACTORS["factor"]).save_pretrained(tmp_path / "small")

    with pytest.raises(InputError, match="holds NaN or Inf"):
        load_dense(tmp_path / "dense")
    with pytest.raises(InputError, match="holds NaN or Inf"):
        load_compressed(tmp_path / "small")
    assert "holds NaN or Inf" in verify(tmp_path / "small").message


class Renamed(BertForSequenceClassification):
    """The user's own, with another forward pass and no weights of its own."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Extended(BertForSequenceClassification):
    """The user's own, with weights that no class of transformers has."""

    def __init__(self, config):
        super().__init__(config)
        self.crf = nn.Linear(2, 2)


class Foreign(nn.Module):
    """No transformers model."""


def sentence_encoder(folder):
    build("BertModel").save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    transformer = Transformer(str(folder))
    return SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())], device="cpu")


def loaded(folder, model_class=AutoModelForSequenceClassification):
    build(HEAD).save_pretrained(folder)
    return model_class.from_pretrained(folder)


HOLDERS = {
    "a subclass": lambda folder: loaded(folder, Renamed),
    "a compiled model": lambda folder: torch.compile(loaded(folder), backend="eager"),
    "a model compiled in place": lambda folder: (model := loaded(folder)).compile(backend="eager") or model,
    "DataParallel": lambda folder: nn.DataParallel(loaded(folder)),
    "a compiled subclass, in parallel": lambda folder: nn.DataParallel(
        torch.compile(loaded(folder, Renamed), backend="eager")
    ),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_what_holds_a_model_is_compressed_as_that_model(holder, tmp_path):
    held = HOLDERS[holder](tmp_path / "dense")
    before = type(held)

    small = compress(held, rank=4, method="svd")
    small.save_pretrained(tmp_path / "small")

    expected = compress(loaded(tmp_path / "dense"), rank=4, method="svd").state_dict()
    found = load_compressed(tmp_path / "small")
    assert type(found).__name__ == f"LowRank{HEAD}"
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert type(held) is before


def test_the_transformer_of_a_sentence_encoder_is_compressed_and_can_be_put_back(tmp_path):
    encoder = sentence_encoder(tmp_path)
    texts = [row["text"] for row in ROWS]
    before = torch.tensor(encoder.encode(texts))

    encoder[0].model = compress(encoder, rank=36, method="svd")

    assert type(encoder[0].auto_model).__name__ == "LowRankBertModel"
    assert torch.allclose(torch.tensor(encoder.encode(texts)), before, atol=1e-4)


def with_adapter(model):
    try:
        model.add_adapter(LoraConfig(target_modules=["query"]))
    except ValueError as error:
        if "version of PEFT you are using is not compatible" not in str(error):
            raise
        pytest.skip("this transformers asks for a newer peft than is installed")
    return model


def adapter_folder(folder):
    get_peft_model(build(HEAD), LoraConfig(target_modules=["query"])).save_pretrained(folder)
    return folder


def adapter_beside(folder):
    loaded(folder)
    adapter_folder(folder)
    return folder


REFUSED = {
    "an adapter attached": (
        lambda folder: with_adapter(loaded(folder)),
        "adapter attached. Merge it first: .*merge_and",
    ),
    "a PEFT model": (lambda folder: get_peft_model(loaded(folder), LoraConfig(target_modules=["query"])), "Merge it"),
    "an adapter alone": (adapter_folder, "is an adapter without its model. Merge it first"),
    "an adapter beside a model": (adapter_beside, "holds an adapter beside the model. Merge it first"),
    "weights of its own": (lambda _: Extended(build(HEAD).config), f"Extended has other weights than {HEAD}"),
    "another module": (lambda _: Foreign(), "Foreign holds no transformers model. Pass one, its folder or a Hub id"),
    "a number": (lambda _: 7, "int holds no transformers model"),
    "a name that is nowhere": (lambda _: "no/model", "no folder 'no/model', and the Hub gave no model of that name"),
}


@pytest.mark.filterwarnings("ignore:Could not find a config file in")  # of peft 0.19
@pytest.mark.parametrize("verb", ["compress", "analyze", "compare", "lpaf", "recover"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_to_compress_is_one_line_before_any_work(verb, case, tmp_path):
    make, message = REFUSED[case]

    with pytest.raises(InputError, match=message) as caught:
        VERBS[verb](make(tmp_path / "model"))

    assert "\n" not in str(caught.value)


WRONG_TYPES = {
    "tokenizer of compress": lambda dense: compress(dense, method="whitened_svd", keep_targets=0.5, tokenizer="x"),
    "tokenizer of lpaf": lambda dense: lpaf(dense, dataset=[{"sentence": "a"}], keep_targets=0.5, tokenizer=3),
    "task": lambda dense: evaluate(dense, task=3, dataset="x"),
    "tasks": lambda dense: evaluate(dense, task=["agreement"], dataset="x"),
    "folder of a report": lambda dense: saved_report(3),
    "model to decompress": lambda dense: decompress(dense),
}


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_a_wrong_type_is_one_line_in_python(case):
    with pytest.raises(InputError) as caught:
        WRONG_TYPES[case](build(HEAD))

    assert "\n" not in str(caught.value)


def edited(folder, **config):
    build(HEAD).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


def pickled(folder):
    build(HEAD).save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": Foreign()}, folder / "pytorch_model.bin")


DAMAGED = {
    "a refused pickle": (pickled, "cannot be loaded"),
    "an odd dtype": (lambda folder: edited(folder, dtype="floot"), "floot"),
    "odd architectures": (lambda folder: edited(folder, architectures=[7]), "is a 7, which|no usable model"),
    "architectures of text": (lambda folder: edited(folder, architectures="pipeline"), "which this|no usable model"),
    "no class but a function": (lambda folder: edited(folder, architectures=["pipeline"]), "is a pipeline, which"),
    "too many layers": (lambda folder: edited(folder, num_hidden_layers=10**7), "num_hidden_layers 10000000"),
    "no width": (lambda folder: edited(folder, hidden_size=0), "cannot be loaded"),
    "heads of text": (lambda folder: edited(folder, num_attention_heads="many"), "num_attention_heads"),
    "deep nesting": (lambda folder: edited(folder) or (folder / "config.json").write_text("[" * 10**5), "not a JSON"),
}


@pytest.mark.parametrize("case", DAMAGED)
@pytest.mark.parametrize("command", ["compress", "evaluate"])
def test_a_damaged_folder_is_one_line_on_the_command_line(command, case, tmp_path, capsys):
    make, message = DAMAGED[case]
    make(tmp_path / "model")
    (tmp_path / "x.txt").write_text("a b\n")
    rest = {
        "compress": [str(tmp_path / "out"), "--rank", "2", "--method", "svd"],
        "evaluate": ["--task", "agreement", "--dataset", str(tmp_path / "x.txt"), "--dense", str(tmp_path / "model")],
    }
    shutil.rmtree(tmp_path / "out", ignore_errors=True)

    assert main([command, str(tmp_path / "model"), *rest[command]]) == 2

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


INDEXES = [
    "{}",
    '{"weight_map": 3}',
    '{"weight_map": {"a": 1}}',
    '{"weight_map": {"a": "../secret.safetensors"}}',
    "[",
]


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_that_cannot_be_read_is_one_line_of_every_saved_model(index, tmp_path):
    compress(build(HEAD), method="svd", keep_targets=0.5).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)

    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_compressed(tmp_path)

    assert "\n" not in str(caught.value)
