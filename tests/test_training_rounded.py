"""`recover` through rounding: what it ends in is the packed model there was, in no more bytes, and better."""

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_training import rows
from transformers import TrainerCallback

from hf_lowrank import InputError, compress, recover
from hf_lowrank.remote_code.lowrank_codes import unpack
from hf_lowrank.remote_code.lowrank_packed import packed_bytes
from hf_lowrank.remote_code.modeling_lowrank import LowRankBertForMaskedLM
from hf_lowrank.sharing.saving import load_compressed

# What stands behind the numbers that are rounded.
ROUNDED = {
    "dense": ("BertForMaskedLM", {"bits": 3.0}),
    "pivoted rows and a table of two factors": (
        "BertForMaskedLM",
        {"bits": 4.0, "keep_targets": 0.6, "storage": "pivoted", "method": "svd", "embeddings": "low_rank"},
    ),
    "a bank that layers share": ("BertForMaskedLM", {"bits": 4.0, "keep_targets": 0.5, "method": "tucker"}),
    "turned matrices and a tied table": ("GPT2LMHeadModel", {"bits": 2.5}),
}
each_rounded = pytest.mark.parametrize("name", ROUNDED)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory):
    """What gives a teacher, and the folder of its rounded model, which is made once."""
    made = {}

    def get(name):
        head, options = ROUNDED[name]
        wide = {"n_embd": 48, "n_inner": 96} if "GPT2" in head else {"hidden_size": 48, "intermediate_size": 96}
        teacher = tiny_models.build(head, **wide)
        if name not in made:
            made[name] = tmp_path_factory.mktemp("rounded")
            compress(teacher, **options).save_pretrained(made[name])
        return teacher, made[name]

    return get


def taught(teacher, small, **options):
    options = {"epochs": 4, "batch_size": 5, "learning_rate": 3e-3, **options}
    recover(small, teacher=teacher, dataset=rows(20, length=9), **options)
    return small.config.compression["provenance"]["recovery"]


@each_rounded
def test_it_ends_in_the_packed_model_there_was_and_a_better_one(name, rounded, tmp_path, caplog):
    teacher, folder = rounded(name)
    small = load_compressed(folder)
    before = packed_bytes(small)

    found = taught(teacher, small)
    small.eval().save_pretrained(tmp_path)
    again = load_compressed(tmp_path)

    assert found["after"] < found["before"]
    assert packed_bytes(small).keys() == before.keys()
    assert sum(packed_bytes(small).values()) <= sum(before.values())
    assert not caplog.records  # nothing is saved in full
    sizes = [(one / "model.safetensors").stat().st_size for one in (folder, tmp_path)]
    assert sizes[1] <= sizes[0] + 8 * len(before)  # headers count digits, and are filled up
    ours, theirs = small.state_dict(), again.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_where_training_harms_not_a_byte_is_changed(rounded, tmp_path):
    teacher, folder = rounded("dense")
    small = load_compressed(folder)

    found = taught(teacher, small, learning_rate=10.0, epochs=1)
    small.save_pretrained(tmp_path)
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path))

    assert found["step"] == 0
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_every_pass_is_made_by_weights_on_their_grid(rounded):
    teacher, folder = rounded("dense")
    small = load_compressed(folder)
    linear = small.get_submodule("bert.encoder.layer.0.intermediate.dense")
    note = linear.rounded_parameters["weight"]
    (grid,) = unpack([(note.content, note.matrix)])
    off_grid, seen = [], set()

    def look(module, inputs):
        codes = module.weight.detach() / grid.rows[:, None] / grid.columns
        off_grid.append(float((codes - codes.round()).abs().max()))
        seen.add(float(codes.round().abs().sum()))

    linear.register_forward_pre_hook(look)
    taught(teacher, small, epochs=1)

    assert len(seen) > 1
    assert max(off_grid) < 1e-3


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


def test_killed_and_begun_again_it_ends_bit_identical(rounded, tmp_path):
    ends = []
    for name, callbacks in (("whole", ()), ("cut", (Kill(),)), ("cut", ())):
        teacher, folder = rounded("dense")
        small = load_compressed(folder)
        if callbacks:
            with pytest.raises(KeyboardInterrupt):
                taught(teacher, small, work_dir=tmp_path / name, callbacks=callbacks)
            continue
        ends.append((taught(teacher, small, work_dir=tmp_path / name), small.state_dict()))

    assert ends[0][0] == ends[1][0]
    assert ends[0][0]["step"] > 6
    assert all(torch.equal(ends[0][1][key], ends[1][1][key]) for key in ends[0][1])


def test_weights_that_are_decoded_whenever_they_are_used_do_not_learn(rounded):
    teacher, folder = rounded("dense")
    small = LowRankBertForMaskedLM.from_pretrained(folder, materialize="each_forward")

    with pytest.raises(InputError, match=r"do not learn\. Load with materialize='once'"):
        taught(teacher, small)
