"""What compressing one kind of matrix in all layers costs in perplexity, method by method, at equal size, untrained.

    python examples/benchmark_modules.py --data DATA --models MODELS
    python examples/benchmark_modules.py --smoke        # tiny models with random weights, seconds

`DATA` and `MODELS` are those of `benchmark_embeddings.py`, which has the token tables. Compression is that of Banaei
et al. (Findings of EACL 2023): numbers before over numbers after, decoders and lengths of rows paid for. "Separate"
takes one matrix after the other, "together" those of all layers at once.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_embeddings import smoke_study
from benchmark_quality import beginning, detokenized
from torch.nn import functional as F
from transformers import AutoTokenizer, BertForMaskedLM, GPT2LMHeadModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_lowrank import compress
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.base import Step
from hf_lowrank.hosts.matrices import DenseMatrix
from hf_lowrank.hosts.targets import find_matrices, matching
from hf_lowrank.methods.matrix.svd import SVD
from hf_lowrank.methods.tucker.ranks import tucker_ranks
from hf_lowrank.methods.tucker.tucker import tucker

COMPRESSIONS = (3.0, 10.0, 25.0)
SMOKE_COMPRESSIONS = (2.0, 4.0)  # tiny matrices of rank 1 are not smaller
# Kinds of matrices, by their names.
KINDS = {
    "masked": {"keys": r".*self\.key", "output dense": r".*\d\.output\.dense"},
    "causal": {"queries, keys and values": r".*attn\.c_attn", "output dense": r".*mlp\.c_proj"},
}


@dataclass(frozen=True)
class Study:
    """One language model, its calibration text and the text it is reported on.

    Args:
        kind: `masked` or `causal`.
        cache: Folder where statistics are kept from one compression to the next.
    """

    kind: str
    model: PreTrainedModel
    tokenizer: Any
    calibration: Any
    steps: Sequence[Step]
    cache: Path


def separate(approximate: Callable[[torch.Tensor, float], torch.Tensor]) -> Callable[..., list[torch.Tensor]]:
    """A method that takes one matrix (O, I) after the other."""

    def approximations(study: Study, matrices: Sequence[DenseMatrix], compression: float) -> list[torch.Tensor]:
        return [approximate(matrix.weight, compression) for matrix in matrices]

    return approximations


def plain_svd(weight: torch.Tensor, compression: float) -> torch.Tensor:
    """Least squared error."""
    rank = max(1, int(weight.numel() / compression / sum(weight.shape)))
    return SVD().decompose(weight).factors(rank).product


def row_normalized_svd(weight: torch.Tensor, compression: float) -> torch.Tensor:
    """SVD of the rows' directions, their lengths put back: they go into the codes and cost nothing."""
    lengths = weight.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return plain_svd(weight / lengths, compression) * lengths


def tucker_heads(study: Study, matrices: Sequence[DenseMatrix], compression: float) -> list[torch.Tensor]:
    """Tucker decomposition of the matrices cut into heads, of all layers in one stack, at the best ranks that fit."""
    config: Any = study.model.config
    height = config.hidden_size // config.num_attention_heads
    stack = torch.cat([matrix.weight.unflatten(0, (-1, height)) for matrix in matrices])
    ranks = tucker_ranks(stack, stack.numel() / compression)
    assert ranks is not None  # the compressions are far from what there is no Tucker decomposition for
    blocks = tucker(stack, ranks).blocks()
    return [part.flatten(0, 1) for part in blocks.split(len(blocks) // len(matrices))]


def library(method: str, **options: Any) -> Callable[..., PreTrainedModel]:
    """A method of `compress`, without refinement."""

    def compressed(study: Study, matrices: Sequence[DenseMatrix], compression: float) -> PreTrainedModel:
        names = [matrix.name for matrix in matrices]
        small: PreTrainedModel = compress(
            study.model, method=method, keep_targets=1 / compression, target_modules=names, text_column="text",
            calibration=study.calibration, tokenizer=study.tokenizer, cache_dir=str(study.cache), **options,
        )  # fmt: skip
        return small

    return compressed


_ONE_BY_ONE = {"allocation": "uniform", "storage": "low_rank", "anchored": False, "refine_passes": 0}

METHODS: dict[str, Callable[..., Any]] = {
    "plain SVD, separate": separate(plain_svd),
    "row-normalised SVD, separate": separate(row_normalized_svd),
    "Fisher-weighted SVD, separate": library("weighted_svd", **_ONE_BY_ONE),
    "Kronecker sum, separate": library("kronecker_sum"),
    "Tucker, heads together": tucker_heads,
    "two-sided SVD, separate": library("two_sided_svd", **_ONE_BY_ONE),
    "non-linear autoencoder, separate": library("separated_nonlinear_autoencoder"),
    "non-linear autoencoder, together": library("nonlinear_autoencoder"),
    "offline autoencoder, together": library("offline_autoencoder"),
    "Fisher autoencoder, together": library("fisher_autoencoder"),
    "autoencoder, separate": library("separated_autoencoder"),
    "autoencoder, together": library("autoencoder"),
}


@torch.inference_mode()
def perplexity(model: PreTrainedModel, steps: Sequence[Step]) -> float:
    """Over the tokens that are to be predicted."""
    total, count = 0.0, 0
    for step in steps:
        inputs = {name: value for name, value in step.inputs.items() if name != "labels"}
        labels = step.inputs["labels"]
        logits = model(**inputs).logits[labels != -100]
        total += float(F.cross_entropy(logits, labels[labels != -100], reduction="sum"))
        count += len(logits)
    return math.exp(total / count)


def scored(study: Study, matrices: Sequence[DenseMatrix], method: str, compression: float) -> float:
    """Perplexity with these matrices compressed."""
    found = METHODS[method](study, matrices, compression)
    if isinstance(found, PreTrainedModel):
        return perplexity(found, study.steps)
    kept = [matrix.weight.clone() for matrix in matrices]
    try:
        _put_(matrices, found)
        return perplexity(study.model, study.steps)
    finally:
        _put_(matrices, kept)


@torch.no_grad()
def _put_(matrices: Sequence[DenseMatrix], weights: Sequence[torch.Tensor]) -> None:
    for matrix, weight in zip(matrices, weights, strict=True):
        module: Any = matrix.module
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)


def language_study(kind: str, arguments: argparse.Namespace) -> Study:
    """A language model on the test set of WikiText-2."""
    data, models = arguments.data, arguments.models
    is_masked = kind == "masked"
    name, model_class = ("minilm-l6-mlm", BertForMaskedLM) if is_masked else ("gpt2-mini", GPT2LMHeadModel)
    model = model_class.from_pretrained(models / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    length = 98 if is_masked else 128
    task = make_task("masked-lm" if is_masked else "causal-lm", block_length=length)
    test = beginning(detokenized(data / "wikitext-2-raw" / "wiki.test.raw"), tokenizer, arguments.blocks, length)
    steps = task.steps(tokenizer, test, 32, model)
    return Study(kind, model, tokenizer, data / "lm-corpus" / "train.jsonl", steps, arguments.work_dir / name)


def print_table(study: Study, methods: Sequence[str], compressions: Sequence[float]) -> None:
    """One block of rows for each kind of matrix."""
    print(f"\n## {study.kind}\ndense: perplexity {perplexity(study.model, study.steps):.2f}", flush=True)
    for title, pattern in KINDS[study.kind].items():
        matrices = matching(find_matrices(study.model), pattern, "kind")
        rows, columns = matrices[0].shape
        print(f"\n{title}: {len(matrices)} of {rows} x {columns}\n{'':34}" + "".join(f"{c:12g}" for c in compressions))
        for method in methods:
            found = [scored(study, matrices, method, compression) for compression in compressions]
            print(f"{method:34}" + "".join(f"{value:12.2f}" for value in found), flush=True)


def main() -> None:
    """Run the studies asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("build/modules"))
    parser.add_argument("--studies", nargs="+", default=["causal", "masked"], choices=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="ROW")
    parser.add_argument("--blocks", type=int, default=100, help="of text to report on")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    for kind in arguments.studies:
        if arguments.smoke:
            tiny = smoke_study(kind, arguments.work_dir)
            study = Study(kind, tiny.model, None, tiny.calibration, tiny.steps, tiny.cache)
        else:
            study = language_study(kind, arguments)
        print_table(study, arguments.methods, SMOKE_COMPRESSIONS if arguments.smoke else COMPRESSIONS)


if __name__ == "__main__":
    main()
