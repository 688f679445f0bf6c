"""Mixed ranks: which weight a layer takes, and that a plain compressed model is left, however it was trained."""

import copy
import json

import peft
import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from tiny_training import StopAt, arguments, rows
from torch.nn import functional as F
from transformers import Trainer

from hf_lowrank import InputError, compress
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.remote_code.lowrank_structures import named_structures
from hf_lowrank.sharing.saving import load_compressed
from hf_lowrank.training.callbacks.mixed_rank import MixedRank, MixedRankCallback
from hf_lowrank.training.callbacks.schedules import Span

HEAD = "BertForSequenceClassification"


def sparse_pair(head=HEAD, **options):
    dense = tiny_models.build(head)
    with torch.no_grad():
        for matrix in find_matrices(dense):
            if matrix.role == "block":
                matrix.module.weight.mul_(torch.rand(matrix.module.weight.shape) < 0.3)
    return dense, compress(dense, rank=5, **{"method": "svd", **options})


def trainer_of(folder, model, callback, **options):
    return Trainer(
        model=model,
        args=arguments(folder, **{"max_steps": 8, **options}),
        train_dataset=rows(16, labels="class"),
        callbacks=[callback],
    )


def layers_of(mixed):
    return mixed._layers


@pytest.mark.parametrize("storage", ["low_rank", "pivoted"])
def test_each_draw_takes_its_weight_and_evaluation_is_low_rank(storage):
    dense, small = sparse_pair(storage=storage)
    inputs = torch.randn(4, 3, tiny_models.WIDTH)
    name = "encoder.layer.0.attention.self.query"
    query, wanted = small.bert.get_submodule(name), dense.bert.get_submodule(name)
    low = query(inputs)
    mixed = MixedRank(small, dense, max_steps=10)
    full = F.linear(inputs, wanted.weight, query.dense_bias())

    for draws, expected in (
        ((True,), full),
        ((False,), low),
        ((False, True), torch.cat([low[:2], full[2:]])),
    ):
        query.draws = draws
        assert torch.allclose(query.train()(inputs), expected, atol=1e-6)
        assert torch.equal(query.eval()(inputs), low)
    mixed.finish()


def test_draws_follow_the_probability_and_end_before_the_training():
    dense, small = sparse_pair()
    mixed = MixedRank(small, dense, max_steps=100, probability=0.8, span=Span(0, 0.5), seed=3)
    shares = []
    for step in range(100):
        mixed.draw(step)
        shares.append(sum(layer.draws[0] for layer in layers_of(mixed)) / len(layers_of(mixed)))

    assert sum(shares[:10]) / 10 == pytest.approx(0.8 * 0.91, abs=0.12)
    assert sum(shares[35:45]) / 10 == pytest.approx(0.8 * 0.2, abs=0.12)
    assert not any(shares[50:])


def test_the_same_step_has_the_same_draws_in_any_process():
    draws = []
    for order in ([0, 1, 2, 3], [3]):
        dense, small = sparse_pair()
        mixed = MixedRank(small, dense, max_steps=10, probability=1.0, seed=7)
        for step in order:
            torch.rand(step + 5)
            mixed.draw(step)
        draws.append([layer.draws for layer in layers_of(mixed)])

    assert draws[0] == draws[1]


@pytest.mark.parametrize("options", [
    {}, {"gradient_accumulation_steps": 2}, {"activation_checkpointing": True}, {"bf16": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("consistency", [0.0, 0.5])
def test_nothing_dense_is_left_and_the_folder_has_no_trace(options, consistency, tmp_path):
    dense, small = sparse_pair()
    names, config = set(small.state_dict()), json.dumps(small.config.compression)
    parameters = sum(p.numel() for p in small.parameters())

    trainer = trainer_of(tmp_path, small, MixedRankCallback(dense, consistency=consistency), **options)
    trainer.train()
    small = trainer.accelerator.unwrap_model(small, keep_fp32_wrapper=False)
    small.save_pretrained(tmp_path / "out")

    assert set(small.state_dict()) == names
    assert sum(p.numel() for p in small.parameters()) == parameters
    assert json.dumps(small.config.compression) == config
    assert not any("full_rank" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    tiny_models.assert_same_function(small.eval(), load_compressed(tmp_path / "out"), tiny_models.inputs_for(HEAD))
    assert all(type(module).__name__ == "LowRankLinear" for _, module in named_structures(small))


def test_full_rank_weights_learn_where_they_are_not_pruned(tmp_path):
    dense, small = sparse_pair()
    callback = MixedRankCallback(dense, probability=1.0, end=8)
    trainer = trainer_of(tmp_path, small, callback, weight_decay=0.1)
    layer = small.bert.encoder.layer[0].output.dense
    start = layer.full_rank.detach().clone()
    seen = {}

    class Watch(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = (layer._full(torch.eye(layer.in_features)) - layer.dense_bias()).T.detach()

    trainer.add_callback(Watch(99))
    trainer.train()

    assert not torch.allclose(seen[8], start, atol=1e-4)
    assert not seen[8][start == 0].any()


def test_the_consistency_loss_is_the_divergence_of_two_draws():
    dense, small = sparse_pair()
    for module in small.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batch = {name: torch.stack([row[name] for row in rows(4, labels="class")]) for name in rows(1, labels="class")[0]}
    plain = copy.deepcopy(small)
    mixed = MixedRank(small, dense, max_steps=10, probability=0.5, consistency=2.0, seed=1)
    other = MixedRank(plain, dense, max_steps=10)
    mixed.draw(0)
    results = []
    for side in range(2):
        for ours, theirs in zip(layers_of(other), layers_of(mixed), strict=True):
            ours.draws = (theirs.draws[side],)
        results.append(plain.train()(**batch))
    logs = [result.logits.log_softmax(-1) for result in results]
    divergence = sum(F.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in (logs, logs[::-1])) / 2

    found = small.train()(**batch)

    expected = (results[0].loss + results[1].loss) / 2 + 2 * divergence
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(found.logits, results[0].logits, atol=1e-6)
    assert divergence > 1e-5


@pytest.mark.parametrize("head", ["GPT2LMHeadModel", "BertForQuestionAnswering", "BertForMaskedLM"])
def test_consistency_works_with_other_heads(head, tmp_path):
    dense, small = sparse_pair(head)
    data = rows(8)
    for row in data:
        if "Question" in head:
            row |= {"start_positions": torch.tensor(1), "end_positions": torch.tensor(2)}
        else:
            row["labels"] = row["input_ids"].masked_fill(row["attention_mask"] == 0, -100)
    callback = MixedRankCallback(dense, consistency=1.0)
    options = {"max_steps": 3, "gradient_accumulation_steps": 2}
    trainer = Trainer(model=small, args=arguments(tmp_path, **options), train_dataset=data, callbacks=[callback])

    assert trainer.train().training_loss > 0


@pytest.mark.parametrize("consistency", [0.0, 0.3])
def test_killed_and_resumed_it_ends_bit_identical(consistency, tmp_path):
    ends = []
    for name in ("whole", "resumed"):
        folder, options = tmp_path / name, {"save_strategy": "steps", "save_steps": 4}
        checkpoint = None
        if name == "resumed":
            dense, small = sparse_pair()
            cut = trainer_of(folder, small, MixedRankCallback(dense, consistency=consistency), **options)
            cut.add_callback(StopAt(4))
            cut.train()
            checkpoint = str(folder / "checkpoint-4")
        dense, small = sparse_pair()
        callback = MixedRankCallback(dense, consistency=consistency)
        trainer_of(folder, small, callback, **options).train(resume_from_checkpoint=checkpoint)
        ends.append(small.state_dict())

    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:fan_in_fan_out")  # of peft
def test_peft_goes_on_top(tmp_path):
    dense, small = sparse_pair()
    base = {name: value.clone() for name, value in small.state_dict().items()}
    tuned = peft.get_peft_model(small, peft.LoraConfig(r=2, target_modules=["up", "down"]))

    trainer_of(tmp_path, tuned, MixedRankCallback(dense, end=4)).train()
    tuned.unload()

    assert all(torch.equal(base[name], value) for name, value in small.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 0}, "probability must be above 0"),
        ({"consistency": -1}, "consistency must be a number of at least 0, got -1"),
        ({"end": 9}, "ends at step 9, the training at step 8"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, message, tmp_path):
    dense, small = sparse_pair()
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, small, MixedRankCallback(dense, **options)).train()


def test_models_that_do_not_fit_are_refused(tmp_path):
    dense, small = sparse_pair()
    wide = tiny_models.build(HEAD, intermediate_size=50)
    for model, of, message in ((dense, dense, "not factorized"), (small, wide, "has no 70 x 36 matrix")):
        with pytest.raises(InputError, match=message):
            trainer_of(tmp_path, model, MixedRankCallback(of))
    with pytest.raises(InputError, match="needs the number of steps"):
        MixedRank(small, dense).draw(0)
