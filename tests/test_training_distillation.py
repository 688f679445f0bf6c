"""A student learns from its teacher: what the losses are, and that the Trainer around them stays the Trainer."""

import math
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from tiny_training import StopAt, arguments, rows
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention
from transformers import set_seed

from hf_lowrank import InputError, compress
from hf_lowrank.training import losses as distances
from hf_lowrank.training.distillation import DistillationTrainer, repeated_blocks, spread_layers
from hf_lowrank.training.preparation import fast_attention

HEADS = ["BertForSequenceClassification", "BertForMaskedLM", "GPT2LMHeadModel", "BertForQuestionAnswering"]


def pair(head="BertForSequenceClassification"):
    teacher = tiny_models.build(head)
    return teacher, compress(teacher, rank=5, method="svd")


def trainer_of(folder, student, teacher, data=None, options=None, **kwargs):
    data = data or rows()
    args = arguments(folder, **(options or {}))
    return DistillationTrainer(model=student, args=args, train_dataset=data, teacher=teacher, **kwargs)


def loss_of(trainer, data):
    batch = trainer.data_collator(data)
    with torch.no_grad():
        return float(trainer.compute_loss(trainer.model.eval(), batch))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["logits", "hidden", "attention"])
def test_a_teacher_has_no_distance_from_itself(head, name, tmp_path):
    teacher = tiny_models.build(head)
    same, other = tiny_models.build(head), tiny_models.build(head, seed=1)

    losses = [loss_of(trainer_of(tmp_path, one, teacher, losses={name: 1}), rows()) for one in (same, other)]

    assert losses[0] == pytest.approx(0, abs=1e-6)
    assert losses[1] > 1e-2


def test_a_model_without_a_head_is_judged_by_its_vectors_alone(tmp_path):
    teacher, student = pair("BertModel")
    judged, alone = (
        loss_of(trainer_of(tmp_path, student, teacher, losses=losses), rows())
        for losses in ({"logits": 10, "hidden": 1}, {"logits": 10})
    )

    assert judged == alone > 0


def test_logits_loss_is_the_divergence_at_the_temperature(tmp_path):
    teacher, student = pair()
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch).logits / 2.0 for model in (student, teacher))
    wanted = 4 * F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")

    trainer = trainer_of(tmp_path, student, teacher, losses={"logits": 1}, temperature=2.0)

    assert loss_of(trainer, rows()) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_attention_scores_are_those_of_the_last_layer_before_the_softmax(head, tmp_path):
    teacher = tiny_models.build(head)
    student = tiny_models.build(head, seed=1)
    data = [{"input_ids": row["input_ids"], "attention_mask": torch.ones(9, dtype=torch.long)} for row in rows()]
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    logs = []
    for model in (student, teacher):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            logs.append(model(**batch, output_attentions=True).attentions[-1].log())
        model.set_attn_implementation("sdpa")
    allowed = torch.ones(9, 9, dtype=torch.bool)
    allowed = allowed.tril() if model.can_generate() else allowed
    trainer = trainer_of(tmp_path, student, teacher, losses={"attention": 1})

    with torch.no_grad():
        compared = trainer._compare(student.eval(), student, batch)
    difference = compared.student.attention.scores() - compared.teacher.attention.scores()

    # The softmax forgets what all scores of a query have in common.
    expected = (logs[0] - logs[1]).masked_fill(~allowed, 0)
    free = (difference - expected).masked_fill(~allowed, 0).sum(-1) / allowed.sum(-1)
    assert torch.allclose((difference - free[..., None]).masked_fill(~allowed, 0), expected, atol=1e-4)


def test_attention_loss_counts_scores_by_their_variance(tmp_path):
    teacher, student = pair("BertForMaskedLM")
    batch = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    trainer = trainer_of(tmp_path, student, teacher, losses={"attention": 1})
    with torch.no_grad():
        compared = trainer._compare(student.eval(), student, batch)
    real = batch["attention_mask"].bool()
    found, wanted = (side.attention.scores() for side in (compared.student, compared.teacher))
    allowed = (real[:, None, :, None] & real[:, None, None, :]).expand_as(found)
    expected = (found - wanted)[allowed].square().mean() / wanted[allowed].var(correction=0)

    assert loss_of(trainer, rows()) == pytest.approx(float(expected), rel=1e-4)


def test_a_target_that_does_not_vary_has_a_finite_loss():
    compared = SimpleNamespace(average=lambda value: value)

    assert float(distances._relative_square(torch.ones(1), torch.ones(1), compared)) == 0


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_student_has_no_dropout_unless_asked_for(head, dropout, tmp_path):
    rates = {"attention_dropout": 0.5} if "Llama" in head else {}
    rates |= {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5} if "GPT2" in head else {}
    teacher, student = tiny_models.build(head, **rates), tiny_models.build(head, **rates)
    options = {"max_steps": 1, "learning_rate": 0.0, "eval_strategy": "no", "logging_steps": 1}
    trainer = trainer_of(tmp_path, student, teacher, rows(), options, losses={"logits": 1}, dropout=dropout)

    trainer.train()
    losses = [entry["loss_logits"] for entry in trainer.state.log_history if "loss_logits" in entry]
    student.train()
    with torch.no_grad():
        kept = float(trainer.compute_loss(student, trainer.data_collator(rows())))

    assert (losses[0] > 1e-3) is dropout
    assert kept > 1e-3  # the model has its own again


def test_padding_does_not_count(tmp_path):
    teacher, student = pair("BertForMaskedLM")
    losses = {"logits": 1, "hidden": 1, "attention": 1}
    trainer = trainer_of(tmp_path, student, teacher, losses=losses)
    changed = [{**row, "input_ids": row["input_ids"] + (1 - row["attention_mask"])} for row in rows()]

    assert loss_of(trainer, changed) == pytest.approx(loss_of(trainer, rows()), rel=1e-5)


def test_training_lowers_every_loss_and_logs_each(tmp_path):
    teacher, student = pair()
    losses = {"task": 0.1, "logits": 1, "hidden": 1, "attention": 0.1}
    options = {"max_steps": 30, "learning_rate": 5e-3, "eval_strategy": "no"}
    trainer = trainer_of(tmp_path, student, teacher, rows(labels="class"), options, losses=losses)

    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss_logits" in entry]

    for entry in history:
        total = sum(weight * entry[f"loss_{name}"] for name, weight in losses.items())
        assert total == pytest.approx(entry["loss"], rel=1e-3)
    for name in ("logits", "hidden"):
        assert sum(e[f"loss_{name}"] for e in history[-5:]) < 0.8 * sum(e[f"loss_{name}"] for e in history[:5])
    assert not teacher.training
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_other_widths_and_depths_learn_through_projections_that_do_not_stay(tmp_path):
    teacher = tiny_models.build("BertForSequenceClassification", num_hidden_layers=4, hidden_size=48)
    student = tiny_models.build("BertForSequenceClassification")
    names = set(student.state_dict())
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    trainer = trainer_of(tmp_path, student, teacher, options=options, losses={"hidden": 1})
    start = [module.weight.clone() for module in trainer._projections.values()]

    trainer.train()

    assert trainer.layer_map == [("bert.encoder.layer.0", "bert.encoder.layer.1"),
                                 ("bert.encoder.layer.1", "bert.encoder.layer.3")]  # fmt: skip
    assert all(not torch.equal(a, b.weight) for a, b in zip(start, trainer._projections.values(), strict=True))
    assert set(student.state_dict()) == names


def test_unlabelled_data_have_an_evaluation_loss(tmp_path):
    teacher, student = pair("BertForMaskedLM")
    trainer = trainer_of(tmp_path, student, teacher)

    found = trainer.evaluate(rows(seed=3))

    assert math.isfinite(found["eval_loss"])
    assert found["eval_loss"] > 0


def test_killed_and_resumed_it_ends_where_it_would_have(tmp_path):
    ends = []
    for name, resume in (("whole", None), ("resumed", True)):
        teacher, student = pair()
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "seed": 5}
        if resume:
            set_seed(77)
            cut = trainer_of(tmp_path / name, student, teacher, options=options)
            cut.add_callback(StopAt(3))
            cut.train()
            teacher, student = pair()
        trainer = trainer_of(tmp_path / name, student, teacher, options=options)
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-3") if resume else None)
        ends.append(student.state_dict())

    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_layers_are_spread_evenly_and_the_last_learns_from_the_last():
    assert spread_layers(2, 4) == [(0, 1), (1, 3)]
    assert spread_layers(3, 3) == [(0, 0), (1, 1), (2, 2)]
    assert spread_layers(4, 2) == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert repeated_blocks(tiny_models.build("GPT2LMHeadModel")) == ["transformer.h.0", "transformer.h.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"losses": {"hiden": 1}}, "there is no 'hiden'"),
        ({"losses": {"logits": -1}}, "must be positive"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"layer_map": [(0, 2)]}, "Count from 0"),
    ],
)
def test_options_that_cannot_be_used_are_named(options, message, tmp_path):
    teacher, student = pair()
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, student, teacher, **options)


def test_a_teacher_that_speaks_otherwise_is_refused(tmp_path):
    _, student = pair()
    for options, message in (({"vocab_size": 120}, "another vocabulary: 120"), ({"num_labels": 5}, "5 classes")):
        with pytest.raises(InputError, match=message):
            trainer_of(tmp_path, student, tiny_models.build("BertForSequenceClassification", **options))
    with pytest.raises(InputError, match="same head"):
        trainer_of(tmp_path, student, tiny_models.build("BertForMaskedLM"))


def test_a_task_loss_needs_labels(tmp_path):
    teacher, student = pair()
    with pytest.raises(InputError, match="needs labels"):
        trainer_of(tmp_path, student, teacher, losses={"task": 1}).train()


@pytest.mark.parametrize(
    ("kind", "length", "learns", "is_plain"),
    [("bf16", 9, True, True), ("bf16", 200, True, False), ("bf16", 9, False, False), ("no", 9, True, False)],
)
def test_short_rows_are_attended_without_the_fused_kernel_where_16_bits_learn_on_a_cpu(kind, length, learns, is_plain):
    accelerator, kernels = SimpleNamespace(device=torch.device("cpu"), mixed_precision=kind), torch.backends.cuda

    with torch.set_grad_enabled(learns), fast_attention(accelerator, length):
        assert kernels.flash_sdp_enabled() is not is_plain
        assert kernels.fp16_bf16_reduction_math_sdp_allowed() is is_plain  # the plain products stay in 16 bits

    assert kernels.flash_sdp_enabled()
    assert not kernels.fp16_bf16_reduction_math_sdp_allowed()


def test_the_plain_products_of_16_bits_have_the_gradients_of_32():
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
    torch.manual_seed(0)
    states = [torch.randn(2, 3, 24, 8).bfloat16() for _ in range(3)]
    mask = torch.arange(24)[None, None, None, :] < 20

    def gradients(dtype):
        given = [state.to(dtype).requires_grad_() for state in states]
        with fast_attention(accelerator, 24):
            output = scaled_dot_product_attention(*given, attn_mask=mask.expand(2, 1, 24, 24))
        return torch.autograd.grad(output.square().sum(), given)

    for ours, exact in zip(gradients(torch.bfloat16), gradients(torch.float32), strict=True):
        assert (ours.float() - exact).norm() < 2e-2 * exact.norm()


def test_the_teacher_computes_in_the_precision_of_the_training(tmp_path):
    teacher, student = pair()
    seen = []
    teacher.classifier.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer = trainer_of(tmp_path, student, teacher, options={"bf16": True, "max_steps": 1})

    trainer.train()

    assert set(seen) == {torch.bfloat16}


def test_a_teacher_can_still_be_trained_by_whoever_lent_it(tmp_path):
    teacher, student = pair()

    trainer_of(tmp_path, student, teacher).train()

    assert all(parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())
