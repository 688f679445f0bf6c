"""A training run writes itself down: into each checkpoint, and into whatever is saved later."""

import json

import pytest
import torch
from tiny_models import VOCABULARY, build
from transformers import Trainer, TrainingArguments

from hf_lowrank import CardCallback, InputError, compress, saved_report
from hf_lowrank.records.report import make_report
from hf_lowrank.sharing.record import write_record
from hf_lowrank.sharing.saving import load_compressed, save_folder


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(3, VOCABULARY, (6,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": torch.tensor(index % 2)}


def train(model, folder, callback, steps=4):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        save_steps=2,
        eval_steps=2,
        eval_strategy="steps",
        logging_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-3,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[callback])
    trainer.train()
    return trainer


@pytest.fixture
def small():
    return compress(build("BertForSequenceClassification"), keep_params=0.6, method="svd")


def test_each_checkpoint_has_a_card_of_the_training_so_far(small, tmp_path):
    train(small, tmp_path, CardCallback("owner/texts"))

    (halfway,), (end,) = (saved_report(tmp_path / f"checkpoint-{step}").training for step in (2, 4))
    assert (halfway["steps"], end["steps"]) == (2, 4)
    assert {"training_loss", "eval_loss", "learning_rate", "seed"} <= set(end)
    card = (tmp_path / "checkpoint-4" / "README.md").read_text()
    assert "Trained after compression: dataset owner/texts, steps 4" in card
    assert f"eval loss {end['eval_loss']:.4g}" in card
    assert "- owner/texts" in card  # among the data sets of the front matter


def test_what_is_saved_after_training_says_so(small, tmp_path):
    train(small, tmp_path / "run", CardCallback())

    folder = save_folder(small, tmp_path / "small")
    small.save_pretrained(tmp_path / "plain")

    assert saved_report(folder).training == saved_report(tmp_path / "plain").training == make_report(small).training
    assert make_report(load_compressed(folder)).training[0]["steps"] == 4


def test_runs_are_kept_one_after_the_other(small, tmp_path):
    for name, steps in (("one", 2), ("two", 4)):
        train(small, tmp_path / name, CardCallback(name), steps)

    assert [(run["dataset"], run["steps"]) for run in make_report(small).training] == [("one", 2), ("two", 4)]


def test_the_record_is_plain_json_without_timings(small, tmp_path):
    train(small, tmp_path, CardCallback())

    (run,) = json.loads(json.dumps(small.config.plan["provenance"]["training"]))

    assert not [name for name in run if "runtime" in name or "per_second" in name]


def test_scores_from_before_training_are_not_kept(small, tmp_path):
    folder = save_folder(small, tmp_path / "small")
    report = saved_report(folder)
    write_record(folder, report)
    loaded = load_compressed(folder)

    train(loaded, tmp_path / "run", CardCallback())

    assert report.training == ()
    assert saved_report(tmp_path / "run" / "checkpoint-4").quality == ()


def test_a_dense_model_has_no_record(tmp_path):
    with pytest.raises(InputError, match="record of a compressed model, got BertForSequenceClassification"):
        train(build("BertForSequenceClassification"), tmp_path, CardCallback())
