"""Files for other runtimes: what is in them, that they say what the model says, and that nothing else is written."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from every_structure import MIXTURE, OF_ANY_MODEL, build_every_structure, structures_with
from tiny_architectures import build_architecture
from tiny_files import word_piece_tokenizer, write_data, write_models
from tiny_models import build, heads_of
from torch import nn

from hf_lowrank import compress
from hf_lowrank.cli import main
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.latency import measure_latency
from hf_lowrank.hosts.outputs import run
from hf_lowrank.remote_code.lowrank_structures import named_structures
from hf_lowrank.runtimes import check as checking
from hf_lowrank.runtimes import onnx_files
from hf_lowrank.runtimes.export import export
from hf_lowrank.runtimes.graphs import make_graphs
from hf_lowrank.runtimes.model import exported_files, load_exported
from hf_lowrank.runtimes.onnx_graph import tidied
from hf_lowrank.runtimes.onnx_rounding import rounded
from hf_lowrank.runtimes.options import Draft
from hf_lowrank.runtimes.plain import plain_copy
from hf_lowrank.runtimes.stored import stored_grids
from hf_lowrank.sharing.saving import load_compressed, save_folder

# Written in Python that has neither torch nor this library.
ALONE = """
import sys
for name in ("torch", "transformers", "hf_lowrank"):
    sys.modules[name] = None
import numpy as np
given = dict(np.load("given.npz"))
"""
IN_OPENVINO = """
import openvino
model = openvino.Core().compile_model("small/openvino/openvino_model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
found = model({one.any_name: given[one.any_name] for one in model.inputs})
np.savez("found.npz", **{one.any_name: found[one] for one in model.outputs})
"""
IN_ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession("small/onnx/model.onnx", providers=["CPUExecutionProvider"])
names = [one.name for one in session.get_outputs()]
found = dict(zip(names, session.run(names, {one.name: given[one.name] for one in session.get_inputs()})))
np.savez("found.npz", **found)
"""
# What a graph without a factor does not do either.
_MOVES = ("Transpose", "Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "Reshape")
GENERATING = ("GPT2LMHeadModel", "LlamaForCausalLM", "OPTForCausalLM", "T5ForConditionalGeneration")


def small_folder(folder, head, **options):
    """A compressed model of a head as users have it: a folder, with a tokenizer where it reads text."""
    dense = build(head) if head.startswith(("Bert", "GPT2", "Llama", "OPT")) else build_architecture(head)
    model = compress(dense, method="svd", **{"keep_targets": 0.5, **options})
    return save_folder(model, folder)


def traced_nodes(model, folder):
    """Kinds of nodes of the graph of a model, and how many there are of each."""
    plain = plain_copy(model)
    graphs = make_graphs(plain)
    found = tidied(onnx_files.traced(graphs[0], plain, folder))
    return Counter(node.op_type for node in found.graph.node)


def worst(reference, plain, folder):
    """The largest difference between the graphs of a model, as saved, and their files, on inputs of other sizes."""
    found = []
    for graph, torch_graph in zip(make_graphs(plain), make_graphs(reference), strict=True):
        path = onnx_files.write(graph, plain, Draft("float32", folder)).path
        batches = [dummy_inputs(reference, *sizes) for sizes in ((3, 8), (1, 5), (6, 13))]
        found.append(checking.check(torch_graph, onnx_files.session(path), batches, reference, False).difference)
    return max(found)


@pytest.mark.parametrize("structure", OF_ANY_MODEL)
def test_a_structure_says_the_same_and_costs_its_products_and_moves_nothing(structure, tmp_path):
    model = build_every_structure("BertForMaskedLM", structures_with(structure))
    assert worst(model, plain_copy(model), tmp_path) < 1e-5
    dense = traced_nodes(build("BertForMaskedLM"), tmp_path)

    found = traced_nodes(model, tmp_path)

    replaced = [name for name, one in named_structures(model) if one.HOSTS == "linear"]
    assert found["MatMul"] - dense["MatMul"] <= len(replaced) + 3  # a decoder of a table has three at most
    if model.get_input_embeddings() not in dict(named_structures(model)).values():
        assert {kind: found[kind] - dense[kind] for kind in _MOVES} == dict.fromkeys(_MOVES, 0)
        assert found - dense <= Counter(MatMul=len(replaced))


@pytest.mark.parametrize("head", [*heads_of("bert"), *GENERATING, "BartForConditionalGeneration"])
def test_every_head_is_a_graph_of_any_size(head, tmp_path):
    folder = small_folder(tmp_path / "small", head)

    found = export(folder)

    assert found.ok
    assert max(one.check.difference for one in found.files) < 1e-4
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx")} == {
        f"onnx/{graph.stem}.onnx" for graph in make_graphs(load_compressed(folder))
    }


def test_names_of_inputs_outputs_and_axes_are_those_of_the_ecosystem(tmp_path):
    folder = small_folder(tmp_path / "small", "GPT2LMHeadModel")
    export(folder)
    graph = onnx.load(folder / "onnx" / "model.onnx").graph

    assert [one.name for one in graph.input] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")),
    ]
    assert [one.name for one in graph.output][:2] == ["logits", "present.0.key"]
    axes = [one.dim_param for one in graph.input[0].type.tensor_type.shape.dim]
    assert axes[0] == "batch_size"
    assert all(axes)


def test_a_causal_model_writes_on_from_its_past(tmp_path):
    folder = small_folder(tmp_path / "small", "GPT2LMHeadModel")
    export(folder)
    model, session = load_compressed(folder), onnx_files.session(folder / "onnx" / "model.onnx")
    ids = dummy_inputs(model, 1, 6)["input_ids"]
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)[0].tolist()

    graph = make_graphs(model)[0]
    given = graph.read({"input_ids": ids}, turn=1)
    written = ids[0].tolist()
    for _ in range(5):
        found = session(given)
        written.append(int(found["logits"][0, -1].argmax()))
        given = {
            "input_ids": torch.tensor([written[-1:]]),
            "attention_mask": torch.ones(1, len(written), dtype=torch.long),
            "position_ids": torch.tensor([[len(written) - 1]]),
        } | {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}

    assert written == wanted


@pytest.mark.parametrize(("runtime", "code"), [("onnx", IN_ONNX), ("openvino", IN_OPENVINO)])
def test_a_file_needs_its_runtime_alone(runtime, code, tmp_path):
    folder = small_folder(tmp_path / "small", "BertForSequenceClassification")
    export(folder, runtime=runtime)
    model = load_compressed(folder)
    batch = dummy_inputs(model, 3, 7)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    np.savez(tmp_path / "given.npz", **{name: value.numpy() for name, value in batch.items()})

    subprocess.run([sys.executable, "-c", ALONE + code], cwd=tmp_path, check=True)

    with torch.no_grad():
        assert np.allclose(np.load(tmp_path / "found.npz")["logits"], model(**batch).logits, atol=1e-5)


def test_a_large_model_keeps_its_weights_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_files, "_MOST_BYTES", 1 << 15)
    folder = small_folder(tmp_path / "small", "BertModel")

    found = export(folder)

    assert sorted(path.name for path in (folder / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    assert found.files[0].size_bytes == sum(path.stat().st_size for path in (folder / "onnx").iterdir())
    assert found.ok


def test_a_file_that_says_something_else_never_appears(tmp_path, capsys, monkeypatch):
    folder = small_folder(tmp_path / "small", "BertModel")
    before = sorted(folder.rglob("*"))

    def spoiled(model, keeps_rounding):
        made = plain_copy(model)
        with torch.no_grad():
            next(made.encoder.parameters()).add_(0.1)
        return made

    monkeypatch.setattr("hf_lowrank.runtimes.export.plain_copy", spoiled)

    assert main(["export", str(folder)]) == 1
    assert "refused" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before
    assert main(["export", str(folder), "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["check"]["is_within"] is False
    assert (folder / "onnx" / "model.onnx").is_file()


@pytest.fixture(scope="module")
def rounded_folder(tmp_path_factory):
    """A masked language model whose weights were rounded, some as pivoted rows."""
    dense = build("BertForMaskedLM", hidden_size=96, num_attention_heads=4, intermediate_size=160, vocab_size=300)
    model = compress(dense, method="svd", keep_targets=0.6, bits=4.5)
    return save_folder(model, tmp_path_factory.mktemp("rounded") / "small")


def test_openvino_runs_a_decoder_with_its_past(tmp_path):
    assert export(small_folder(tmp_path / "small", "GPT2LMHeadModel"), runtime="openvino").ok


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "GPT2LMHeadModel"])
def test_a_file_stands_for_its_model_where_models_are_scored(head, tmp_path):
    folder = small_folder(tmp_path / "small", head)
    export(folder)
    (path,) = exported_files(folder)
    model, ours = load_compressed(folder), load_exported(path)
    batch = dummy_inputs(model, 3, 9)

    assert type(ours).__name__ == type(model).__name__
    assert torch.allclose(run(ours, batch).rows, run(model, batch).rows, atol=1e-5)
    assert measure_latency({"torch": model, "file": ours}, 2, 8, rounds=1)["file"].median > 0


def test_evaluate_says_what_exported_files_score(tmp_path, capsys):
    write_data(tmp_path)
    folder = small_folder(tmp_path / "small", "BertForSequenceClassification")
    word_piece_tokenizer().save_pretrained(folder)
    argv = ["evaluate", str(folder), "--task", "text-classification", "--dataset", str(tmp_path / "dev.tsv")]
    export(folder)
    export(folder, precision="int8", force=True)

    assert main([*argv, "--json"]) == 0

    found = json.loads(capsys.readouterr().out)
    rows = found["runtimes"]
    assert [*rows] == ["onnx/model.onnx", "onnx/model_qint8_avx512_vnni.onnx"]
    assert rows["onnx/model.onnx"]["score"] == found["evaluation"]["model"]["scores"]["accuracy"]
    assert all(row["size_bytes"] > 0 and row["seconds"] > 0 for row in rows.values())


def test_the_folder_of_an_encoder_has_what_servers_read(tmp_path):
    """Names and keys that text-embeddings-inference and fastembed look for; the server itself cannot be had here."""
    write_models(tmp_path)
    folder = save_folder(
        compress(str(tmp_path / "my-encoder"), rank=4, method="svd"), tmp_path / "s", tmp_path / "my-encoder"
    )
    export(folder)

    config = json.loads((folder / "config.json").read_text())
    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    needed = {"architectures", "model_type", "max_position_embeddings", "hidden_size", "num_hidden_layers"}
    assert needed <= {*config}
    assert "pooling_mode_mean_tokens" in json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert (folder / "tokenizer.json").is_file()
    assert {one.name for one in graph.input} == {"input_ids", "attention_mask", "token_type_ids"}
    assert [one.name for one in graph.output] == ["last_hidden_state"]


ROUNDED = {
    ("onnx", "int8"): "onnx/model_qint8_avx512_vnni.onnx",
    ("onnx", "int4"): "onnx/model_q4.onnx",
    ("onnx", "as-stored"): "onnx/model_stored.onnx",
    ("openvino", "float32"): "openvino/openvino_model.xml",
    ("openvino", "int8"): "openvino/openvino_model_qint8_quantized.xml",
    ("openvino", "int4"): "openvino/openvino_model_qint4_quantized.xml",
    ("openvino", "as-stored"): "openvino/openvino_model_stored.xml",
}


@pytest.mark.parametrize(("runtime", "precision"), ROUNDED)
def test_each_precision_is_a_file_of_its_name_that_says_nearly_the_same(runtime, precision, rounded_folder):
    found = export(rounded_folder, runtime=runtime, precision=precision, force=True)

    (file,) = found.files
    agreement = file.check.agreement["top1_agreement"]
    assert file.path == str(rounded_folder / ROUNDED[runtime, precision])
    assert found.notes == ()
    assert agreement > {"float32": 0.999, "int8": 0.9, "int4": 0.4, "as-stored": 0.9}[precision]
    assert (file.check.difference < 1e-4) is (precision == "float32")


def test_stored_numbers_are_those_that_run(rounded_folder, tmp_path):
    model = load_compressed(rounded_folder)
    plain = plain_copy(model, keeps_rounding=True)
    graph, reference = make_graphs(plain)[0], make_graphs(model)[0]
    made = tidied(onnx_files.traced(graph, plain, tmp_path))
    large = [one for one in made.graph.initializer if len(one.dims) == 2 and one.dims[0] * one.dims[1] >= 1024]

    made, notes = rounded(made, "as-stored", stored_grids(model), is_dynamic=False)
    onnx_files.save_onnx(made, tmp_path / "stored.onnx")

    batches = [dummy_inputs(model, *sizes) for sizes in ((3, 8), (6, 13))]
    exact = onnxruntime.SessionOptions()
    exact.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # else inputs are rounded
    run_exactly = partial(onnxruntime.InferenceSession(tmp_path / "stored.onnx", exact).run, ["logits"])

    def in_file(given):
        return {"logits": torch.from_numpy(run_exactly({name: value.numpy() for name, value in given.items()})[0])}

    found = checking.check(reference, in_file, batches, model, False)
    held = [one for one in made.graph.initializer if one.data_type == onnx.TensorProto.INT8]
    assert found.difference < 1e-5
    assert notes == ()
    assert len(held) >= len(large) > 20


def test_numbers_too_wide_for_a_runtime_stay_as_they_are_and_are_named(rounded_folder, tmp_path):
    model = load_compressed(rounded_folder)
    plain = plain_copy(model, keeps_rounding=True)
    made = tidied(onnx_files.traced(make_graphs(plain)[0], plain, tmp_path))
    grids = [replace(one, codes=one.codes * 1000) for one in stored_grids(model)]

    _, notes = rounded(made, "as-stored", grids)

    assert any("layer.0.attention.self.query.down: in float32" in note and "8 bits" in note for note in notes)


def test_as_stored_needs_what_is_stored_rounded(tmp_path):
    folder = small_folder(tmp_path / "small", "BertModel")

    with pytest.raises(InputError, match="not rounded"):
        export(folder, precision="as-stored")


def test_a_rounded_file_takes_a_byte_for_each_number(tmp_path):
    wide = {"hidden_size": 128, "vocab_size": 16000, "intermediate_size": 256, "num_attention_heads": 4}
    model = build_every_structure("BertModel", ("low_rank",), **wide)
    folder = save_folder(model, tmp_path / "small")

    found = export(folder, precision="int8", force=True)

    sizes = [p.numel() * (1 if p.dim() > 1 else 4) for n, p in model.named_parameters() if "pooler" not in n]
    assert found.files[0].size_bytes == pytest.approx(sum(sizes) + 4 * 16000, rel=0.03)


def test_inputs_of_several_matrices_are_rounded_once(tmp_path):
    folder = small_folder(tmp_path / "small", "BertModel", storage="low_rank")
    export(folder, precision="int8", force=True)
    nodes = onnx.load(folder / "onnx" / "model_qint8_avx512_vnni.onnx").graph.node

    read = [node.input[0] for node in nodes if node.op_type == "DynamicQuantizeLinear"]
    assert len(read) == len(set(read))
    assert 0 < len(read) < sum(node.op_type == "MatMulInteger" for node in nodes)


@pytest.mark.parametrize("kind", ["dense", "experts", "none"])
def test_what_cannot_be_a_graph_is_refused_in_one_line(kind, tmp_path):
    if kind == "dense":
        build("BertModel").save_pretrained(tmp_path / "model")
    if kind == "experts":
        save_folder(build_every_structure(MIXTURE, ("low_rank", "low_rank_experts")), tmp_path / "model")

    with pytest.raises(InputError, match={"dense": "not a compressed", "experts": "experts", "none": "folder"}[kind]):
        export(tmp_path / "model")


def test_what_others_hold_of_a_folder_is_never_its_runtime_files(tmp_path):
    folder = small_folder(tmp_path / "small", "BertModel")
    export(folder)

    again = save_folder(load_compressed(folder), tmp_path / "again", folder)

    assert not (again / "onnx").exists()


def test_a_linear_layer_of_any_structure_has_the_rank_of_its_weight_or_is_dense():
    for structure in OF_ANY_MODEL:
        model = build_every_structure("BertModel", structures_with(structure))
        plain = plain_copy(model)
        for name, one in named_structures(model):
            made = plain.get_submodule(name)
            if one.HOSTS == "linear" and isinstance(made, nn.Linear):
                rank = int(torch.linalg.matrix_rank(one.to_dense().double(), rtol=1e-6))
                assert rank * (one.in_features + one.out_features) >= one.in_features * one.out_features
