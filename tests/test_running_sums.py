"""Sums on disk: memory holds a piece of them, and a kill loses one batch at most and changes no digit."""

import gc
import json
import multiprocessing
import os
import signal
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build

from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.statistics.collection import STATISTICS, collect_statistics
from hf_lowrank.statistics.running_sums import RunningSums

EVERY = frozenset(STATISTICS)
NUM_BATCHES = 4


def killed_at(number, path):
    torch.set_num_threads(1)  # OpenMP's threads are not forked
    dying_at(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    collect(build("BertForMaskedLM"), path)


def batches():
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(3, 97, (2, length), generator=generator) for length in (9, 5, 12, 7)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in draw]


def collect(model, path, **options):
    return collect_statistics(
        model, find_matrices(model), batches(), EVERY, path=path, **{"fingerprint": "abc", **options}
    )


def dying_at(number, die, patch=setattr):
    """Calls `die` in the place of that addition."""
    add, calls = RunningSums.add, []

    def add_or_die(self, key, value):
        calls.append(key)
        if len(calls) == number:
            die()
        add(self, key, value)

    patch(RunningSums, "add", add_or_die)
    return calls


def interrupt():
    raise KeyboardInterrupt


def same_files(first, second):
    one, other = load_file(first), load_file(second)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture
def num_additions(monkeypatch, tmp_path):
    """Additions of one whole batch."""
    with monkeypatch.context() as patch:
        calls = dying_at(0, interrupt, patch.setattr)
        collect(build("BertForMaskedLM"), tmp_path / "counted.safetensors")
    return len(calls) // NUM_BATCHES


@pytest.mark.parametrize("batch", [0, 1.5, 2, 3.9])
def test_statistics_of_an_interrupted_run_are_the_same_bit_for_bit(batch, num_additions, tmp_path, monkeypatch):
    model, path = build("BertForMaskedLM"), tmp_path / "resumed.safetensors"
    with monkeypatch.context() as patch:
        dying_at(1 + int(batch * num_additions), interrupt, patch.setattr)
        with pytest.raises(KeyboardInterrupt):
            collect(model, path)
    assert not path.exists()

    with monkeypatch.context() as patch:
        calls = dying_at(0, interrupt, patch.setattr)
        collect(model, path)

    assert len(calls) == (NUM_BATCHES - int(batch)) * num_additions  # no whole batch is run again
    assert same_files(path, collect(model, tmp_path / "whole.safetensors").paths[0])
    assert [file.name for file in tmp_path.glob("resumed*")] == ["resumed.safetensors"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_a_killed_process_leaves_what_the_next_one_needs(num_additions, tmp_path):
    model, path = build("BertForMaskedLM"), tmp_path / "resumed.safetensors"
    child = multiprocessing.get_context("fork").Process(target=killed_at, args=(int(2.5 * num_additions), path))

    child.start()
    child.join()

    assert child.exitcode == -signal.SIGKILL
    assert json.loads(path.with_suffix(".state.json").read_text())["num_batches"] == 2
    assert same_files(collect(model, path).paths[0], collect(model, tmp_path / "whole.safetensors").paths[0])


def test_what_another_run_left_is_not_gone_on_with(num_additions, tmp_path, monkeypatch):
    model, path = build("BertForMaskedLM"), tmp_path / "resumed.safetensors"
    with monkeypatch.context() as patch:
        dying_at(3 * num_additions, interrupt, patch.setattr)
        with pytest.raises(KeyboardInterrupt):
            collect(model, path, fingerprint="of other text")

    found = collect(model, path)

    assert same_files(found.paths[0], collect(model, tmp_path / "whole.safetensors").paths[0])


def test_what_was_thrown_away_is_not_gone_on_with_either(tmp_path):
    path = tmp_path / "sums.safetensors"
    for about in ({"text": 1}, {"text": 2}):
        with RunningSums(path, about) as sums:
            sums.add("a", torch.ones(2))
            if about["text"] == 1:
                sums.commit()

    with RunningSums(path, {"text": 1}) as sums:
        assert sums.num_batches == 0


def test_a_sum_that_a_batch_does_not_add_to_stays(tmp_path):
    one = torch.ones(2, 3)
    with RunningSums(tmp_path / "sums.safetensors", {}) as sums:
        for keys in (["a", "b"], ["a"], ["a", "a", "c"], []):
            for key in keys:
                sums.add(key, one)
            sums.commit()
        sums.save({})

    found = load_file(tmp_path / "sums.safetensors")

    assert {key: value.unique().tolist() for key, value in found.items()} == {"a": [4.0], "b": [1.0], "c": [1.0]}


def test_no_tensor_outlives_its_batch_and_no_sum_is_held(tmp_path, monkeypatch):
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = build("BertModel", **sizes)
    collect(model, tmp_path / "warm.safetensors")
    commit, alive = RunningSums.commit, []

    def watched_commit(self):
        commit(self)
        alive.append(sum(value.nbytes for value in gc.get_objects() if type(value) is torch.Tensor))

    monkeypatch.setattr(RunningSums, "commit", watched_commit)
    gc.collect()
    before = sum(value.nbytes for value in gc.get_objects() if type(value) is torch.Tensor)
    tracemalloc.start()
    try:
        found = collect(model, tmp_path / "sums.safetensors")
        _, peak = tracemalloc.get_traced_memory()  # of numpy's arrays: all that sums are held in
    finally:
        tracemalloc.stop()

    largest_panel = 256 * 1536 * 8
    assert found.paths[0].stat().st_size > 12 * largest_panel
    assert peak < 3 * largest_panel
    assert max(alive) - before < 10_000
