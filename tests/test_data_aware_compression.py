"""Compressing with text: measured ranks, a guarded refinement, and nothing done twice."""

import gc
import json
import tempfile
from functools import partial

import pytest
import torch
from every_method import SOLVERS
from tiny_models import VOCABULARY, assert_same_function, build, inputs_for

from hf_lowrank import InputError, compress, make_report
from hf_lowrank.compression.refinement import refine_
from hf_lowrank.data.calibration import Text, make_calibration
from hf_lowrank.files.checkpoint import Checkpoint
from hf_lowrank.hosts.blocks import find_blocks, recorded_outputs, replayed_outputs
from hf_lowrank.hosts.outputs import run
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.matrix.decompositions import Decompositions
from hf_lowrank.methods.matrix.svd import Decomposition
from hf_lowrank.planning.probes import Probe
from hf_lowrank.planning.sizes import overhead_bytes, parameter_bytes
from hf_lowrank.statistics import evidence
from hf_lowrank.statistics.moments import MatrixStatistics

HEADS = ["BertModel", "BertForMaskedLM", "BertForMultipleChoice", "GPT2LMHeadModel", "LlamaForCausalLM"]
each_head = pytest.mark.parametrize("head", HEADS)


def text(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randint(3, VOCABULARY, (4, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draw]


@each_head
@pytest.mark.parametrize("method", [name for name in SOLVERS if SOLVERS[name].needs])
def test_every_method_compresses_every_kind_of_head_to_its_budget(head, method):
    small = compress(build(head), keep_targets=0.5, method=method, calibration=text(), fast=True)

    report = make_report(small)
    assert 0.45 < report.kept_targets_fraction <= 0.5
    assert all(torch.isfinite(value).all() for value in small.state_dict().values())


@each_head
def test_the_default_is_the_same_function_each_time(head):
    first, second = (compress(build(head), keep_params=0.7, calibration=text()) for _ in range(2))

    assert_same_function(first, second, inputs_for(head))


@each_head
def test_running_only_the_blocks_after_one_gives_the_same_outputs(head):
    model, batch = build(head), text(1)[0]
    blocks = find_blocks(model, find_matrices(model))
    with torch.no_grad(), recorded_outputs(model, blocks) as outputs:
        whole = run(model, batch)

    for first in range(len(blocks) + 1):
        with torch.no_grad(), replayed_outputs(model, blocks[:first], outputs):
            assert torch.equal(run(model, batch).rows, whole.rows)


@each_head
def test_a_probe_sees_no_damage_where_nothing_changes_and_some_where_it_does(head):
    model = build(head)
    matrices = find_matrices(model)
    probe = Probe(model, matrices, text(2))
    matrix = next(
        matrix for matrix in matrices if "value" in matrix.name or "v_proj" in matrix.name or "attn" in matrix.name
    )
    weight = SOLVERS["svd"].decompose(torch.randn(matrix.shape)).factors(min(matrix.shape)).product
    before = {name: value.clone() for name, value in model.state_dict().items()}

    assert probe.damage({}) == pytest.approx(0, abs=1e-6)
    assert probe.damage({matrix: lambda: 5 * weight}) > 1e-6
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@each_head
def test_of_many_weights_replaced_at_once_only_the_one_in_use_is_held(head):
    model = build(head)
    linear = [matrix for matrix in find_matrices(model) if matrix.role != "embedding"]
    own = {matrix: matrix.module.weight.data_ptr() for matrix in linear}
    used = []

    def make(matrix):
        assert all(other.module.weight.data_ptr() == own[other] for other in linear)
        used.append(matrix)
        return torch.zeros(matrix.shape)

    Probe(model, linear, text(1)).damage({matrix: partial(make, matrix) for matrix in linear})

    assert set(used) == set(linear)
    assert all(matrix.module.weight.data_ptr() == own[matrix] for matrix in linear)


def test_refining_never_makes_it_worse_on_text_set_aside():
    small = compress(build("BertForMaskedLM"), keep_targets=0.4, calibration=text(), refine_passes=3)

    found = small.config.plan["provenance"]["refinement"]
    assert found["after"] <= found["before"]
    assert found["passes"] <= 3


def test_where_only_a_table_became_smaller_there_is_nothing_to_train():
    dense = build("BertModel")
    small = compress(dense, rank=2, embeddings="low_rank", target_modules=["word_embeddings"], method="svd")
    found = refine_(small, dense, make_calibration(dense, text(), None, Text()), passes=1)

    assert (found.passes, found.after) == (0, found.before)


def test_refining_at_a_hopeless_rate_keeps_the_model_as_it_was():
    dense = build("BertModel")
    small = compress(dense, keep_targets=0.4, method="svd")
    before = {name: value.clone() for name, value in small.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in small.parameters()]
    calibration = make_calibration(dense, text(), None, Text())

    found = refine_(small, dense, calibration, passes=2, learning_rate=1e6)

    assert found.passes == 0
    assert found.after == found.before
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    assert trainable == [parameter.requires_grad for parameter in small.parameters()]


def test_refining_in_place_is_refused():
    with pytest.raises(InputError, match="refine_passes needs the dense model"):
        compress(build("BertModel"), keep_targets=0.5, refine_passes=1, inplace=True)


def test_a_second_budget_looks_at_the_text_no_more(tmp_path, monkeypatch):
    options = {"calibration": text(), "cache_dir": str(tmp_path), "refine_passes": 0}
    first = compress(build("BertModel"), keep_targets=0.5, **options)
    monkeypatch.setattr(evidence, "collect_statistics", lambda *args, **kwargs: pytest.fail("collected again"))

    again = compress(build("BertModel"), keep_targets=0.5, **options)
    compress(build("BertModel"), keep_targets=0.3, **options)

    assert_same_function(first, again, inputs_for("BertModel"))


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    options = {"keep_targets": 0.5, "calibration": text(), "cache_dir": str(tmp_path), "refine_passes": 0}
    whole = compress(build("BertModel"), **{**options, "cache_dir": None})
    damage, calls = Probe.damage, []

    def dying(self, changes):
        calls.append([matrix.name for matrix in changes])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return damage(self, changes)

    monkeypatch.setattr(Probe, "damage", dying)
    with pytest.raises(KeyboardInterrupt):
        compress(build("BertModel"), **options)
    resumed = compress(build("BertModel"), **options)

    singles = [call[0] for call in calls if len(call) == 1]
    finished = singles[:3]
    assert len(set(finished)) == 3
    assert not set(finished) & set(singles[4:])
    assert_same_function(whole, resumed, inputs_for("BertModel"))


@pytest.mark.parametrize("options", [{"method": "svd"}, {"fast": True}, {"refine_passes": 0}])
def test_no_matrix_is_decomposed_twice_not_even_after_a_kill(options, tmp_path, monkeypatch):
    options = {"keep_targets": 0.5, "calibration": text(), **options}
    whole = compress(build("BertModel"), **options)
    decompose, decomposed, killed = Decompositions.decompose, [], []

    def dying(self, matrix):
        if len(decomposed) == 3 and not killed:
            killed.append(matrix.name)
            raise KeyboardInterrupt
        decomposed.append(matrix.name)
        return decompose(self, matrix)

    monkeypatch.setattr(Decompositions, "decompose", dying)
    with pytest.raises(KeyboardInterrupt):
        compress(build("BertModel"), cache_dir=str(tmp_path), **options)
    resumed = compress(build("BertModel"), cache_dir=str(tmp_path), **options)

    assert killed
    assert len(decomposed) == len(set(decomposed))
    assert {m.name for m in find_matrices(build("BertModel")) if m.role == "block"} <= set(decomposed)
    assert_same_function(whole, resumed, inputs_for("BertModel"))


@pytest.mark.parametrize("learning", ["refine_block_passes", "anchored", "refine_passes"])
@pytest.mark.parametrize("num_finished", [0, 1, 2])
def test_no_block_is_anchored_and_no_pass_is_made_twice_after_a_kill(learning, num_finished, tmp_path, monkeypatch):
    options = {"keep_targets": 0.5, "calibration": text(), "anchored": False, "refine_passes": 0}
    options |= {learning: True if learning == "anchored" else 3, "refine_learning_rate": 1e-5}
    save, saved, lives = Checkpoint.save, [], [1000]

    def dying(self, state):
        if not lives[0]:
            raise KeyboardInterrupt
        lives[0] -= 1
        saved.append(self._file)
        save(self, state)

    def compressed(folder):
        return compress(build("BertModel", num_hidden_layers=3), cache_dir=str(tmp_path / folder), **options)

    monkeypatch.setattr(Checkpoint, "save", dying)
    whole = compressed("whole")
    num_steps = len(saved)
    lives[0] = num_finished
    with pytest.raises(KeyboardInterrupt):
        compressed("killed")
    lives[0] = num_steps - num_finished  # not one more
    resumed = compressed("killed")
    lives[0] = 0
    compressed("killed")

    assert num_steps > num_finished
    assert_same_function(whole, resumed, inputs_for("BertModel"))
    made, again = (small.config.compression["provenance"] for small in (whole, resumed))
    assert made.pop("settings") != again.pop("settings")  # the folder
    assert made == again


def test_of_all_matrices_only_one_is_in_hand_at_a_time(monkeypatch):
    damage, alive = Probe.damage, []

    def watched(self, changes):
        kinds = (Decomposition, MatrixStatistics)
        alive.append(sum(type(thing) in kinds for thing in gc.get_objects()))
        return damage(self, changes)

    monkeypatch.setattr(Probe, "damage", watched)
    gc.collect()
    compress(build("BertModel"), keep_targets=0.5, calibration=text(), refine_passes=0)

    assert alive
    assert max(alive) == 0


def test_without_a_cache_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    small = compress(build("BertModel"), keep_targets=0.5, calibration=text(), refine_passes=0)

    assert make_report(small).kept_targets_fraction <= 0.5
    assert list(tmp_path.iterdir()) == []


def test_other_text_is_not_taken_from_the_cache(tmp_path):
    compress(build("BertModel"), keep_targets=0.5, calibration=text(seed=0), cache_dir=str(tmp_path), fast=True)
    compress(build("BertModel"), keep_targets=0.5, calibration=text(seed=1), cache_dir=str(tmp_path), fast=True)

    assert len(list(tmp_path.glob("statistics-*.safetensors"))) == 2


def test_the_record_says_what_was_looked_at():
    small = compress(build("BertModel"), keep_targets=0.5, calibration=text(), refine_passes=0)

    found = small.config.plan["provenance"]["text"]
    assert (found["source"], found["num_tokens"]) == ("batches", 6 * 48)
    assert json.dumps(small.config.plan["provenance"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_16_bit_model_is_watched_in_32_bits_and_stays_16_bits(dtype):
    dense = build("BertForMaskedLM").to(dtype)

    asked = overhead_bytes(dense, ["pivoted"]) + 0.8 * parameter_bytes(dense)
    small = compress(dense, target_size=asked, calibration=text(), fast=True)

    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}


@pytest.mark.parametrize("step", ["anchor_", "refine_", "refine_blocks_"])
def test_the_fast_tier_learns_nothing(monkeypatch, step):
    monkeypatch.setattr(f"hf_lowrank.compression.compress.{step}", lambda *_, **__: pytest.fail(f"{step} was run"))

    small = compress(build("BertForMaskedLM"), keep_targets=0.5, calibration=text(), fast=True)

    assert "refinement" not in small.config.plan["provenance"]
    assert small.config.plan["provenance"]["settings"]["fast"]


def test_predicted_ranks_go_to_the_matrix_whose_errors_cost_most():
    dense = build("BertModel")
    with torch.no_grad():
        dense.encoder.layer[1].intermediate.dense.weight.mul_(1e-3)

    small = compress(dense, keep_targets=0.5, calibration=text(), allocation="first_order", refine_passes=0)

    modules = small.config.plan["modules"]
    ranks = [modules.get(f"encoder.layer.{i}.intermediate.dense", {"rank": 99})["rank"] for i in range(2)]
    assert ranks[1] < ranks[0]
