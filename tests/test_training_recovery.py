"""`recover` heals, whatever the head and the data, and never makes a model worse."""

import json

import pytest
import tiny_models
import tiny_tokenizers
import torch
from every_structure import OF_ANY_MODEL, build_every_structure, structures_with
from tiny_training import StopAt, arguments, rows
from torch.nn import functional as F
from transformers import TrainerCallback

from hf_lowrank import InputError, compress, lpaf, recover
from hf_lowrank.cli import main
from hf_lowrank.hosts.loading import find_tokenizer, load_dense
from hf_lowrank.sharing.saving import load_compressed, save_folder
from hf_lowrank.training.callbacks.best import BestStateCallback
from hf_lowrank.training.distillation import DistillationTrainer
from hf_lowrank.training.features import PaddingCollator, hold_out, make_features
from hf_lowrank.training.recovery import default_learning_rate

TEXTS = ["a b c d e", "f g h", "i j k l m n o p", "q r s t", "u v w x y z", "b d f h j l", "c e g", "k m o q s u"] * 4
LABELLED = [{"text": text, "label": index % 2} for index, text in enumerate(TEXTS)]
VOCABULARY = {"vocab_size": 30}


def pair(head, **options):
    teacher = tiny_models.build(head, **{**VOCABULARY, **options})
    return teacher, compress(teacher, rank=4, method="svd")


def tokenizer_for(head):
    return tiny_tokenizers.decoder_tokenizer() if "GPT2" in head else tiny_tokenizers.encoder_tokenizer()


@pytest.mark.parametrize(
    ("head", "config", "data", "has_task"),
    [
        ("BertForSequenceClassification", {}, LABELLED, True),
        ("BertForSequenceClassification", {}, TEXTS, False),
        ("BertForSequenceClassification", {"num_labels": 1}, LABELLED, True),
        ("BertForSequenceClassification", {"num_labels": 1}, TEXTS, False),
        ("BertForSequenceClassification", {"problem_type": "multi_label_classification"}, LABELLED, False),
        ("BertForMaskedLM", {}, TEXTS, False),
        ("GPT2LMHeadModel", {}, TEXTS, False),
        ("BertModel", {}, TEXTS, False),
        ("BertForTokenClassification", {}, TEXTS, False),
    ],
)
def test_it_lowers_the_held_out_loss_of_any_head(head, config, data, has_task):
    teacher, small = pair(head, **config)
    options = {"epochs": 8, "batch_size": 8, "max_seq_length": 16, "learning_rate": 5e-3}

    healed = recover(small, teacher=teacher, dataset=data, tokenizer=tokenizer_for(head), **options)
    found = healed.config.compression["provenance"]["recovery"]

    assert healed is small
    assert found["after"] < found["before"]
    assert found["step"] > 0
    assert ("task" in found["losses"]) is has_task
    assert found["losses"]["logits"] == (10 if head == "BertModel" else 1)
    assert not healed.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in healed.parameters())


@pytest.mark.parametrize("head", ["BertForMaskedLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("name", OF_ANY_MODEL)
def test_it_trains_every_structure(name, head):
    small = build_every_structure(head, structures_with(name))
    options = {"epochs": 2, "batch_size": 8, "learning_rate": 4e-3}

    recover(small, teacher=tiny_models.build(head), dataset=rows(32, length=11), **options)
    found = small.config.compression["provenance"]["recovery"]

    assert found["step"] > 0
    assert found["after"] < found["before"]


def test_it_keeps_the_model_as_it_was_where_training_harms():
    teacher, small = pair("BertForMaskedLM")
    before = {name: value.clone() for name, value in small.state_dict().items()}

    recover(
        small, teacher=teacher, dataset=TEXTS, tokenizer=tokenizer_for("Bert"), max_seq_length=16, learning_rate=10.0
    )

    assert small.config.compression["provenance"]["recovery"]["step"] == 0
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())


def test_where_no_step_helps_it_tries_a_quarter_of_the_rate_once():
    teacher, small = pair("BertForMaskedLM")
    rates = []

    class Rates(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            rates.append(args.learning_rate)

    options = {"max_seq_length": 16, "learning_rate": 10.0, "callbacks": (Rates(),)}
    recover(small, teacher=teacher, dataset=TEXTS, tokenizer=tokenizer_for("Bert"), **options)

    assert rates == [10.0, 2.5]


def test_pivoted_layers_are_trained_as_two_factors_and_stored_as_before():
    teacher = tiny_models.build("BertForMaskedLM", **VOCABULARY)
    small = compress(teacher, keep_targets=0.6, method="svd", storage="pivoted")
    seen = set()

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            seen.update(spec["structure"] for spec in model.config.plan["modules"].values())

    options = {"max_seq_length": 16, "learning_rate": 5e-3, "epochs": 8, "batch_size": 8, "callbacks": (Look(),)}
    recover(small, teacher=teacher, dataset=TEXTS, tokenizer=tokenizer_for("Bert"), **options)

    assert small.config.compression["provenance"]["recovery"]["step"] > 0
    assert seen == {"low_rank"}
    assert {spec["structure"] for spec in small.config.plan["modules"].values()} == {"pivoted"}


def test_dense_embedding_tables_are_left_alone():
    teacher, small = pair("GPT2LMHeadModel")
    table = small.get_input_embeddings().weight.clone()

    recover(small, teacher=teacher, dataset=TEXTS, tokenizer=tokenizer_for("GPT2"), max_seq_length=8)

    assert torch.equal(small.get_input_embeddings().weight, table)


def test_given_training_arguments_are_obeyed(tmp_path):
    teacher, small = pair("BertForMaskedLM")
    args = arguments(tmp_path, max_steps=3, learning_rate=2e-3, per_device_train_batch_size=4)

    recover(small, teacher=teacher, dataset=TEXTS, tokenizer=tokenizer_for("Bert"), args=args, max_seq_length=16)
    found = small.config.compression["provenance"]["recovery"]

    assert (found["steps"], found["learning_rate"]) == (3, 2e-3)
    assert args.eval_strategy == "no"


def test_what_was_trained_in_16_bits_is_not_used_in_them_afterwards(tmp_path):
    teacher, small = pair("BertForMaskedLM")
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, bf16=True)
    inputs = {"input_ids": torch.arange(1, 9)[None]}

    recover(small, teacher=teacher, dataset=TEXTS, tokenizer=tokenizer_for("Bert"), args=args, max_seq_length=16)
    small.eval().save_pretrained(tmp_path / "small")

    with torch.no_grad():
        assert torch.equal(small(**inputs).logits, load_compressed(tmp_path / "small").eval()(**inputs).logits)


def test_killed_and_resumed_it_ends_bit_identical(tmp_path):
    ends = []
    for name in ("whole", "resumed"):
        options = {
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 2,
        }
        args = arguments(tmp_path / name, **options)
        common = {"dataset": rows(16), "args": args}
        checkpoint = None
        if name == "resumed":
            teacher, small = pair("BertForSequenceClassification", vocab_size=97)
            recover(small, teacher=teacher, callbacks=(StopAt(4),), **common)
            checkpoint = str(tmp_path / name / "checkpoint-4")
        teacher, small = pair("BertForSequenceClassification", vocab_size=97)
        recover(small, teacher=teacher, resume_from_checkpoint=checkpoint, **common)
        ends.append((small.state_dict(), small.config.compression["provenance"]["recovery"]))

    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


def test_with_a_work_folder_a_killed_run_goes_on_and_ends_bit_identical(tmp_path):
    def run(name, *callbacks):
        teacher, small = pair("BertForSequenceClassification")
        options = {"batch_size": 8, "max_seq_length": 16, "learning_rate": 5e-3, "work_dir": str(tmp_path / name)}
        tokenizer = tokenizer_for("Bert")
        recover(small, teacher=teacher, dataset=LABELLED, tokenizer=tokenizer, callbacks=callbacks, **options)
        return small.state_dict(), small.config.compression["provenance"]["recovery"]

    whole, expected = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", Kill())
    resumed, found = run("cut")

    assert found == expected
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not (tmp_path / "cut" / "slower").exists()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("verb", ["recover", "lpaf"])
def test_it_learns_whatever_mode_the_caller_is_in(verb, mode):
    options = {"dataset": LABELLED, "tokenizer": tokenizer_for("Bert"), "batch_size": 8, "max_seq_length": 16}

    def learned():
        teacher, small = pair("BertForSequenceClassification")
        if verb == "lpaf":
            losses = {"logits": 1, "hidden": 1}
            small = lpaf(
                teacher, method="svd", rank=4, prune_epochs=1, tune_learning_rate=5e-3, losses=losses, **options
            )
        else:
            recover(small, teacher=teacher, learning_rate=5e-3, **options)
        provenance = small.config.compression["provenance"]
        return small.state_dict(), provenance.get("recovery") or provenance["lpaf"]["held_out_loss"]

    expected, outside = learned()
    with mode():
        found, inside = learned()

    assert inside == outside
    assert inside["step"] > 0
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_model_whose_loss_is_not_finite_is_not_trained(loss):
    with pytest.raises(InputError, match=f"held-out loss is {loss} before the first step"):
        BestStateCallback().on_evaluate(None, None, None, metrics={"eval_loss": loss})


def test_a_folder_without_a_tokenizer_has_none(tmp_path):
    teacher, small = pair("BertForMaskedLM")
    teacher.save_pretrained(tmp_path)  # of which transformers makes up a tokenizer of five words
    dense = load_dense(str(tmp_path))

    assert find_tokenizer(dense) is None
    small.config._name_or_path = str(tmp_path)
    recover(small, teacher=dense, dataset=TEXTS, tokenizer=tokenizer_for("Bert"), max_seq_length=16, epochs=1)


@pytest.mark.parametrize(
    ("head", "options", "rate"),
    [
        ("BertForMaskedLM", {"method": "svd", "rank": 4}, 5e-5),
        ("BertForMaskedLM", {"method": "svd", "rank": 4, "bits": 8}, 5e-4),
        ("BertForMaskedLM", {"method": "tucker", "keep_targets": 0.5}, 5e-4),
        ("BertModel", {"method": "svd", "rank": 4}, 5e-4),
        ("GPT2LMHeadModel", {"method": "svd", "rank": 4}, 5e-4),
    ],
)
def test_the_learning_rate_follows_the_method_and_the_head(head, options, rate):
    assert default_learning_rate(compress(tiny_models.build(head), **options)) == rate


def test_answers_become_the_tokens_that_hold_them():
    model = tiny_models.build("BertForQuestionAnswering", **VOCABULARY)
    question = {"question": "a b", "context": "c d e f g", "answers": {"text": ["e f"], "answer_start": [4]}}
    listed = {**question, "answers": [{"text": "e f", "answer_start": 4}]}

    for form in (question, listed):
        (row,) = make_features(model, tiny_tokenizers.encoder_tokenizer(), [form], max_seq_length=20)
        chosen = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
        assert tiny_tokenizers.encoder_tokenizer().decode(chosen) == "e f"


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (["a b c. d e! f g?", "a b c.\nd e!"], {}),
        ([{"text": "a b c. d e!", "title": "x"}, {"text": "f g?", "title": "y"}], {}),
        ([{"sentence1": "a b c.", "sentence2": "d e!"}, {"sentence1": "f g?", "sentence2": "a b c."}], {}),
        ([{"left": "a b c. d e! f g?", "right": "x y"}], {"text_column": "left"}),
    ],
)
def test_a_model_without_a_head_learns_from_every_sentence_once(rows, options):
    tokenizer = tiny_tokenizers.encoder_tokenizer()
    heads = {name: tiny_models.build(name, **VOCABULARY) for name in ("BertModel", "BertForSequenceClassification")}

    vectors = make_features(heads["BertModel"], tokenizer, rows, **options)

    found = {tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in vectors}
    assert found == {tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
                     for text in ("a b c.", "d e!", "f g?")}  # fmt: skip
    assert len(vectors) == 3
    if "sentence1" not in rows[0]:
        assert len(make_features(heads["BertForSequenceClassification"], tokenizer, rows, **options)) == len(rows)


def test_batches_lose_their_padding_and_get_it_back():
    batch = {"input_ids": torch.tensor([[5, 6, 0], [7, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}

    features = make_features(tiny_models.build("BertModel"), None, [batch])
    again = PaddingCollator(0)(features)

    assert [len(row["input_ids"]) for row in features] == [2, 3]
    assert all(torch.equal(again[name], batch[name]) for name in batch)


def test_what_is_held_out_is_not_trained_on():
    kept, held_out = hold_out([{"input_ids": torch.tensor([index])} for index in range(40)])

    assert (len(kept), len(held_out)) == (36, 4)
    assert not {int(row["input_ids"]) for row in kept} & {int(row["input_ids"]) for row in held_out}


def test_bad_input_is_one_clear_line(tmp_path):
    teacher, small = pair("BertForMaskedLM")
    other = tiny_models.build("BertForMaskedLM", vocab_size=31)
    common = {"dataset": TEXTS, "tokenizer": tokenizer_for("Bert")}

    for model, of, options, message in (
        (teacher, teacher, {}, "not a compressed model"),
        (small, other, {}, "another vocabulary: 31 tokens, the model 30"),
        (small, teacher, {"epochs": 0}, "epochs must be a number above 0"),
        (small, teacher, {"epoch": 1}, "recover has no option 'epoch'. Closest: 'epochs'"),
        (small, teacher, {"losses": {"logit": 1}}, "losses must be one of .*, got 'logit'. Closest: 'logits'"),
        (small, teacher, {"losses": {"logits": float("nan")}}, "losses must be a number by name"),
        (small, teacher, {"losses": {"logits": 0}}, "losses must give a weight"),
        (small, teacher, {"learning_rate": -1}, "learning_rate must be a number at least 0, got -1"),
        (small, teacher, {"epochs": float("inf")}, "epochs must be a number above 0 and at most 10000, got inf"),
        (small, teacher, {"epochs": 1, "args": arguments(tmp_path)}, "epochs does not go with args"),
        (small, teacher, {"dataset": ["a b c"]}, "two examples at least"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            recover(model, teacher=of, **{**common, **options})
        assert "\n" not in str(caught.value)


@pytest.fixture
def folders(tmp_path):
    teacher, small = pair("BertForSequenceClassification")
    teacher.save_pretrained(tmp_path / "dense")
    small.save_pretrained(tmp_path / "small")
    for name in ("dense", "small"):
        tiny_tokenizers.encoder_tokenizer().save_pretrained(tmp_path / name)
    data = "sentence\tlabel\n" + "".join(f"{row['text']}\t{row['label']}\n" for row in LABELLED)
    (tmp_path / "train.tsv").write_text(data)
    return tmp_path


def test_the_command_recovers_a_folder(folders, capsys):
    command = ["recover", folders / "small", folders / "out", "--teacher", folders / "dense", "--dataset",
               folders / "train.tsv", "--learning-rate", "5e-3", "--losses", "logits=1", "task=0.5",
               "--json"]  # fmt: skip

    status = main([str(part) for part in command])
    found = json.loads(capsys.readouterr().out)

    assert status == 0
    assert found["recovery"]["losses"] == {"logits": 1.0, "task": 0.5}
    assert found["recovery"]["after"] <= found["recovery"]["before"]
    healed = load_compressed(folders / "out")
    assert healed.config.compression["provenance"]["recovery"] == found["recovery"]
    provenance = load_compressed(folders / "out").config.compression["provenance"]
    assert provenance["command"].startswith("hf-lowrank recover small out --teacher @MODEL@ --dataset train.tsv")


def test_the_command_goes_on_after_a_kill_and_ends_as_it_would_have(folders, monkeypatch):
    step, steps = DistillationTrainer.training_step, []

    def run(name, last):
        def counted(self, *args, **kwargs):
            if self.state.global_step == last:
                raise KeyboardInterrupt
            steps.append(name)
            return step(self, *args, **kwargs)

        monkeypatch.setattr(DistillationTrainer, "training_step", counted)
        out = folders / f"out-{name}"
        main([str(part) for part in (
            "recover", folders / "small", out, "--teacher", folders / "dense", "--dataset", folders / "train.tsv",
            "--work-dir", folders / f"run-{name}", "--batch-size", 8, "--learning-rate", "5e-3",
        )])  # fmt: skip
        return out

    whole, cut = run("whole", None), run("cut", 6)
    assert not cut.exists()
    resumed = load_compressed(run("cut", None)).state_dict()

    assert steps.count("cut") < steps.count("whole") + 6  # it has not begun at the beginning
    expected = load_compressed(whole).state_dict()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_the_command_refuses_a_teacher_with_other_words(folders, capsys):
    tiny_models.build("BertForSequenceClassification", vocab_size=40).save_pretrained(folders / "other")
    command = ["recover", folders / "small", folders / "out", "--teacher", folders / "other", "--dataset",
               folders / "train.tsv"]  # fmt: skip

    assert main([str(part) for part in command]) == 2
    assert "another vocabulary" in capsys.readouterr().err
    assert not (folders / "out").exists()


@pytest.mark.parametrize("given", [True, False])
def test_processes_that_know_nothing_of_each_other_are_refused(given, tmp_path, monkeypatch):
    teacher, small = pair("BertForMaskedLM", vocab_size=97)
    args = arguments(tmp_path) if given else None
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(InputError, match=r"2 processes, and each would train alone.*ACCELERATE_USE_CPU=1"):
        recover(small, teacher=teacher, dataset=rows(8), args=args)


def test_what_a_sentence_encoder_holds_is_taught_in_place_by_what_another_holds(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    teacher, small = pair("BertModel")
    encoders = []
    for name, model in (("teacher", teacher), ("small", small)):
        folder = tmp_path / name
        (save_folder if model is small else type(model).save_pretrained)(model, folder)
        tokenizer_for("Bert").save_pretrained(folder)
        encoders.append(sentence_transformers.SentenceTransformer(str(folder), device="cpu", trust_remote_code=True))
    dense, encoder = encoders
    before = encoder.encode(TEXTS[:4])

    recover(encoder, teacher=dense, dataset=TEXTS, epochs=4, batch_size=8, max_seq_length=16, learning_rate=5e-3)
    encoder.save(str(tmp_path / "taught"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "taught"), device="cpu", trust_remote_code=True)

    wanted, after = dense.encode(TEXTS[:4]), encoder.encode(TEXTS[:4])
    cosines = [F.cosine_similarity(*map(torch.from_numpy, (one, wanted))).mean() for one in (before, after)]
    assert cosines[1] > cosines[0]
    assert torch.equal(torch.from_numpy(again.encode(TEXTS[:4])), torch.from_numpy(after))
