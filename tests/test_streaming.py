"""Models that do not fit in memory: compressed a block at a time, to the same model."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from forks import run_forked
from tiny_architectures import ARCHITECTURES
from tiny_models import VOCABULARY, build

from hf_lowrank import compress
from hf_lowrank.compression.disk.costs import expected_cost
from hf_lowrank.compression.job import prepare
from hf_lowrank.compression.settled import settle_compression
from hf_lowrank.errors import InputError, Note
from hf_lowrank.evaluation.memory import LiveBytes
from hf_lowrank.files.scratch import write_file
from hf_lowrank.hosts.disk.offloaded import offloaded
from hf_lowrank.hosts.disk.stages import Stages
from hf_lowrank.hosts.disk.stored import is_away
from hf_lowrank.hosts.outputs import Said
from hf_lowrank.methods.table import METHODS, OF_MATRICES
from hf_lowrank.sharing.saving import load_compressed, save_folder
from hf_lowrank.statistics import collection

pytestmark = pytest.mark.filterwarnings("ignore:block by block:hf_lowrank.errors.Note")
FAMILIES = ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "DistilBertModel", "ElectraForMaskedLM"]
MIXTURES = ["MixtralForCausalLM", "GraniteMoeForCausalLM"]
OTHERS = ["Gemma3ForCausalLM", "GPTNeoXForCausalLM", "ViTForImageClassification"]
METHODS_OF_MATRICES = [name for name, row in METHODS.items() if row.takes == OF_MATRICES]
KINDS = ARCHITECTURES | {"AlbertForMaskedLM": {**ARCHITECTURES["ModernBertForMaskedLM"], "embedding_size": 8}}
HF_LOWRANK = shutil.which("hf-lowrank", path=str(Path(sys.executable).parent))
IN_MEMORY = {"anchored": False, "refine_passes": 0}


def model_of(head, **options):
    if head in KINDS:
        host = getattr(transformers, head)
        torch.manual_seed(0)
        return host(host.config_class(**{**KINDS[head], **options})).eval()
    return build(head, **options)


@pytest.fixture
def folder(tmp_path):
    """Saves a model in bfloat16, in shards of one or a few weights."""

    def save(head, **options):
        model_of(head, **options).bfloat16().save_pretrained(tmp_path / "dense", max_shard_size="9KB")
        return tmp_path / "dense"

    return save


def batches(count=5, size=3, vocabulary=61):
    draws = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, vocabulary, (size, 7), generator=draws) for _ in range(count)]
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


def both(path, head, **options):
    """The model compressed in memory, as far as it is block by block, and block by block."""
    about = {"calibration": None if "Image" in head else batches(), "allocation": "first_order", **options}
    about |= {"embeddings": "low_rank"} if "keep_params" in options else {}
    return compress(path, **about, **IN_MEMORY), compress(path, memory="1KB", **about)


def assert_same_model(one, other):
    plans = [{k: v for k, v in model.config.compression.items() if k != "provenance"} for model in (one, other)]
    assert plans[0] == plans[1]
    for record in ("relative_errors", "kept_dense", "dense_size_bytes", "untouched", "text"):
        assert one.config.compression["provenance"][record] == other.config.compression["provenance"][record]
    weights = offloaded(other) or other.state_dict()
    state = dict(one.named_parameters())
    assert state.keys() <= {*weights}
    for name, value in state.items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("head", [*FAMILIES, *MIXTURES, *OTHERS])
def test_block_by_block_gives_the_very_same_model(folder, tmp_path, head, monkeypatch):
    monkeypatch.setattr(collection, "_MOST_DRAWS", 1)  # block by block, a text is drawn for once
    path = folder(head)
    whole, small = both(path, head, method="two_sided_svd", keep_targets=0.6)

    assert offloaded(small) is not None
    assert all(is_away(p) for p in small.parameters() if p.dim())
    assert_same_model(whole, small)
    saved = save_folder(small, tmp_path / "small")
    assert_same_model(whole, load_compressed(saved))


@pytest.mark.parametrize("method", METHODS_OF_MATRICES)
@pytest.mark.parametrize("budget", [{"keep_params": 0.7}, {"rank": 3}])
def test_every_method_of_matrices_and_kind_of_budget_goes_block_by_block(folder, method, budget):
    assert_same_model(*both(folder("LlamaForCausalLM"), "LlamaForCausalLM", method=method, **budget))


@pytest.mark.parametrize("option", [{"bias_correction": True}, {"storage": "pivoted"}, {"dtype": "float32"}])
def test_options_mean_the_same_block_by_block(folder, option):
    path = folder("GPT2LMHeadModel")
    assert_same_model(*both(path, "GPT2LMHeadModel", method="two_sided_svd", keep_params=0.6, **option))


def peak(path, **options):
    text = batches(vocabulary=VOCABULARY)
    with LiveBytes() as counter:
        compress(path, calibration=text, keep_targets=0.5, target_modules="all-linear", **options)
    return counter.peak


def test_memory_does_not_grow_with_depth(folder):
    wide = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    shallow, deep = (peak(folder("LlamaForCausalLM", num_hidden_layers=n, **wide), memory="1KB") for n in (2, 6))

    assert deep < 1.05 * shallow


def test_a_large_head_is_run_a_sequence_at_a_time(folder, monkeypatch):
    path, text = folder("LlamaForCausalLM"), {"calibration": batches(), "keep_params": 0.7, "memory": "1KB"}
    at_once = compress(path, **text)
    lengths, take = [], Stages.run
    monkeypatch.setattr("hf_lowrank.hosts.disk.stages._MOST_LOGITS", 10)
    monkeypatch.setattr(Stages, "run", lambda *given, **rows: lengths.append(take(*given, **rows)) or lengths[-1])
    one_by_one = compress(path, **text)

    says = [said for _, said in lengths if isinstance(said, Said)]
    assert {len(said.rows) for said in says} == {7}
    assert at_once.config.compression["modules"].keys() == one_by_one.config.compression["modules"].keys()


def cost(path, **options):
    settings = settle_compression({"keep_targets": 0.6, "memory": "1KB", **options}, has_text=True)
    return expected_cost(prepare(path, settings, calibration=batches()).problem.evidence)


@pytest.mark.parametrize("method", ["svd", "two_sided_svd"])
def test_what_it_takes_is_told_before_and_grows_with_depth_but_for_memory(folder, tmp_path, method):
    path, cache = folder("LlamaForCausalLM", num_hidden_layers=2), tmp_path / "cache"
    told = cost(path, method=method)
    options = {"keep_targets": 0.6, "method": method, "memory": "1KB", "allocation": "first_order"}
    with pytest.warns(Note, match=r"block by block, in about .* of memory and .* on disk in .* free\)"):
        compress(path, calibration=batches(), cache_dir=str(cache), **options)

    data = {file: len(file.read_bytes()) for file in cache.rglob("*.safetensors") if "decompositions" in str(file)}
    assert sum(data.values()) / 2 < told.disk + 2000 * len(data)  # their headers
    shutil.rmtree(path)
    deeper = cost(folder("LlamaForCausalLM", num_hidden_layers=6), method=method)
    assert deeper.memory == told.memory
    assert 2 < deeper.disk / told.disk <= 3


def test_a_disk_that_is_too_small_is_refused_before_any_work(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"needs .* on disk, and .* has 1.0 KB. Give a cache_dir elsewhere"):
        compress(folder("LlamaForCausalLM"), calibration=batches(), keep_targets=0.6, memory="1KB")


class Killed(BaseException):
    """Ends a run as a kill does: nothing catches it."""


def killed_now_and_then(monkeypatch, draw, done):
    """From now on a run is killed before or after one of the files it writes; what is written is noted."""
    left = draw.randrange(1, 9)

    def counted(path, write):
        nonlocal left
        left -= 1
        if left == 0 and draw.random() < 0.5:
            raise Killed
        write_file(path, write)
        done.append(path)
        if left == 0:
            raise Killed

    for module in ("hosts.disk.stages", "hosts.disk.offloaded", "methods.matrix.stored", "statistics.running_sums"):
        monkeypatch.setattr(f"hf_lowrank.{module}.write_file", counted)


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("method", ["two_sided_svd", "whitened_svd"])
def test_a_run_that_was_killed_goes_on_and_nothing_is_done_twice(folder, tmp_path, monkeypatch, head, method):
    path, draw, done = folder(head), random.Random(f"{head} {method}"), []
    options = {"calibration": batches(), "keep_targets": 0.6, "method": method, "memory": "1KB"}
    expected, kills = compress(path, **options), 0
    while True:
        killed_now_and_then(monkeypatch, draw, done)
        try:
            small = compress(path, cache_dir=str(tmp_path / "cache"), **options)
            break
        except Killed:
            kills += 1

    assert_same_model_offloaded(expected, small)
    states = [path for path in done if path.parent.name == "states"]
    others = [path for path in done if path.parent.name != "states"]
    assert kills > 1
    assert len(others) == len(set(others)) > 20  # statistics, decompositions, blocks
    assert len(states) - len(set(states)) <= kills + 2  # of the batch that was run; and of the first, which was tried


def assert_same_model_offloaded(one, other):
    assert one.config.compression["modules"] == other.config.compression["modules"]
    first, second = offloaded(one), offloaded(other)
    assert {*first} == {*second}
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_was_left_on_disk_comes_in_as_it_is(folder, tmp_path):
    path = folder("LlamaForCausalLM")
    there = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded", "dtype": torch.float32}
    dense = transformers.LlamaForCausalLM.from_pretrained(path, **there)
    text = batches()

    small = compress(dense, calibration=text, keep_targets=0.6)

    again = compress(path, calibration=text, keep_targets=0.6, memory="1KB", dtype="float32")
    assert_same_model_offloaded(small, again)


def test_what_was_saved_in_shards_loads_with_its_weights_on_disk(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lowrank.sharing.saving._SHARD", "4KB")
    small = compress(folder("LlamaForCausalLM"), calibration=batches(), keep_targets=0.6, memory="1KB")

    saved = save_folder(small, tmp_path / "small")

    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    loaded = type(small).from_pretrained(saved, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    inputs = {"input_ids": batches()[0]["input_ids"]}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, small(**inputs).logits)


REFUSED = {
    "method=tucker": {"method": "tucker", "keep_targets": 0.5},
    "bits": {"bits": 4},
    "keep_latency": {"keep_latency": 0.5},
    "anchored": {"anchored": True, "keep_targets": 0.5},
    "refine_passes": {"refine_passes": 1, "keep_targets": 0.5},
    "refine_block_passes": {"refine_block_passes": 1, "keep_targets": 0.5},
    "allocation=measured": {"allocation": "measured", "keep_targets": 0.5},
    "embeddings=autoencoder": {"embeddings": "autoencoder", "keep_params": 0.5},
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_needs_the_whole_model_is_refused_by_name(folder, what):
    with pytest.raises(InputError, match=rf"^{what} needs the whole model in memory.*raise memory"):
        compress(folder("LlamaForCausalLM"), calibration=batches(), memory="1KB", **REFUSED[what])


@pytest.mark.parametrize("head", ["T5ForConditionalGeneration", "AlbertForMaskedLM"])
def test_a_model_whose_blocks_are_no_chain_is_refused_in_one_line(folder, head):
    with pytest.raises(InputError, match=r"cannot be run block by block: .* Raise memory"):
        compress(folder(head), keep_targets=0.5, memory="1KB")


def test_weights_that_are_not_finite_are_refused_by_name(folder):
    path = folder("LlamaForCausalLM")
    model = transformers.LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(path)

    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight.* holds NaN"):
        compress(path, calibration=batches(), keep_targets=0.6, memory="1KB")


def test_a_small_model_is_held_in_memory_by_default(folder):
    assert offloaded(compress(folder("LlamaForCausalLM"), method="svd", keep_targets=0.6)) is None


def test_two_processes_share_the_work_and_find_what_one_finds(folder, tmp_path):
    path, options = folder("LlamaForCausalLM"), ["--keep-targets", "0.6", "--memory", "1KB", "--no-latency"]
    for count in (1, 2):
        (tmp_path / f"{count}").mkdir()
        said = run_forked([HF_LOWRANK, "compress", path, "out", *options], tmp_path / f"{count}", processes=count)
        assert said.count("saved:") == 1
    alone, together = (load_compressed(tmp_path / f"{count}" / "out") for count in (1, 2))

    assert alone.config.compression["modules"] == together.config.compression["modules"]
    for one, other in zip(alone.parameters(), together.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
