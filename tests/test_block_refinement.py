"""Training one block after the other: guarded, confined to the block, and the same each time."""

import json

import pytest
import torch
from tiny_models import VOCABULARY, build

from hf_lowrank import InputError, compress
from hf_lowrank.compression.block_refinement import refine_blocks_
from hf_lowrank.data.calibration import Calibration
from hf_lowrank.hosts.blocks import block_name, find_blocks
from hf_lowrank.hosts.outputs import mean_distance
from hf_lowrank.hosts.targets import find_matrices

each_head = pytest.mark.parametrize("head", ["BertModel", "GPT2LMHeadModel", "LlamaForCausalLM"])


def text(count=6):
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(3, VOCABULARY, (4, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draw]


def pair(head):
    dense = build(head)
    return compress(dense, keep_targets=0.3, method="svd"), dense


def refined(head, **options):
    small, dense = pair(head)
    batches = text()
    found = refine_blocks_(small, dense, Calibration(tuple(batches[:-2]), tuple(batches[-2:])), passes=2, **options)
    return small, dense, found


@each_head
def test_no_block_takes_the_model_further_away_on_text_set_aside(head):
    small, dense, found = refined(head)

    distances = [distance for block in found.values() for distance in (block.before, block.after)]
    assert list(found) == find_blocks(dense, find_matrices(dense))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] == mean_distance(small, dense, text()[-2:]) < distances[0]


@each_head
def test_nothing_outside_the_blocks_is_changed(head):
    before = pair(head)[0].state_dict()
    small, _, found = refined(head)

    changed = {name for name, value in small.state_dict().items() if not torch.equal(before[name], value)}
    assert {block_name(name) for name in changed} == {name for name, block in found.items() if block.passes}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in small.parameters())


def test_a_hopeless_rate_leaves_every_block_as_it_was():
    before = pair("BertModel")[0].state_dict()
    small, _, found = refined("BertModel", learning_rate=1e6)

    assert {block.passes for block in found.values()} == {0}
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_a_seed_is_an_order():
    first, second, other = (refined("BertModel", seed=seed)[0].state_dict() for seed in (0, 0, 1))

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_compress_refines_blocks_before_the_whole_and_keeps_the_record():
    options = {"keep_targets": 0.3, "storage": "low_rank", "calibration": text(), "anchored": True, "refine_passes": 1}
    small = compress(build("BertModel"), refine_block_passes=2, **options)

    record = small.config.plan["provenance"]
    steps = [record["anchoring"], *record["block_refinement"].values(), record["refinement"]]
    assert [step["after"] for step in steps[:-1]] == [step["before"] for step in steps[1:]]
    assert set(record["block_refinement"]) == {"encoder.layer.0", "encoder.layer.1"}
    assert record["refinement"]["before"] != record["anchoring"]["after"]
    assert json.dumps(record)


def test_in_place_there_is_no_dense_block_to_learn_from():
    with pytest.raises(InputError, match="refine_block_passes needs the dense model"):
        compress(build("BertModel"), keep_targets=0.5, refine_block_passes=1, inplace=True)
