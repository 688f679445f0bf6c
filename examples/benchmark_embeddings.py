"""What compressing the token table alone costs in perplexity, method by method, at equal size and without training.

    python examples/benchmark_embeddings.py --data DATA --models MODELS
    python examples/benchmark_embeddings.py --smoke        # tiny models with random weights, seconds

`DATA` and `MODELS` are folders with `lm-corpus` and `wikitext-2-raw`, and with the masked language model
`minilm-l6-mlm` and the causal one `gpt2-mini`. Compression is that of the papers: `V D` over the stored numbers, of
which the order of an autoencoder's rows is part. "Untied" decodes with the dense head, "tied" with the compressed
table. The cosine error `1 - cos` is the mean over the rows, and over the tokens as they occur in the calibration text.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_quality import beginning, detokenized
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hf_lowrank import compress
from hf_lowrank.data.rows import load_texts
from hf_lowrank.evaluation import make_task
from hf_lowrank.evaluation.base import Step
from hf_lowrank.methods import kronecker
from hf_lowrank.methods.matrix.svd import SVD, decompose
from hf_lowrank.methods.metric import identity, row_metric
from hf_lowrank.methods.tables.nonlinear_table import NonlinearTable
from hf_lowrank.methods.tables.token_tables import make_table
from hf_lowrank.methods.tables.trained_table import TrainedTable
from hf_lowrank.methods.tucker.tucker import TuckerRanks, tucker
from hf_lowrank.remote_code.lowrank_nonlinear_table import NonlinearAutoencoderTable
from hf_lowrank.statistics.token_counts import count_tokens

COMPRESSIONS = (2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Study:
    """One model with a tied head, its calibration text and the text it is reported on.

    Args:
        counts: How often each token occurs in the calibration text, (V).
        fisher: Sum of the squared gradients of each row of the table on some of that text, (V).
        cache: Folder where statistics are kept from one compression to the next.
    """

    name: str
    model: PreTrainedModel
    tokenizer: Any
    calibration: Any
    steps: Sequence[Step]
    counts: torch.Tensor
    fisher: torch.Tensor
    cache: Path

    @property
    def table(self) -> torch.Tensor:
        """The dense table, (V, D)."""
        embedding: Any = self.model.get_input_embeddings()
        weight: torch.Tensor = embedding.weight.detach()
        return weight


def rank_at(study: Study, compression: float, extra: int = 0) -> int:
    """The largest rank with `R (V + D) + extra` numbers at most."""
    rows, columns = study.table.shape
    return max(1, int((rows * columns / compression - extra) // (rows + columns)))


def plain_svd(study: Study, compression: float) -> torch.Tensor:
    """Least squared error."""
    return SVD().decompose(study.table).factors(rank_at(study, compression)).product


def row_normalized_svd(study: Study, compression: float) -> torch.Tensor:
    """SVD of the rows' directions, their lengths put back: they go into the codes and cost nothing."""
    lengths = study.table.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return SVD().decompose(study.table / lengths).factors(rank_at(study, compression)).product * lengths


def fisher_weighted_svd(study: Study, compression: float) -> torch.Tensor:
    """FWSVD (Hsu et al., ICLR 2022): rows weighted by the gradients they get."""
    metric = row_metric(study.fisher.double(), 0.01)
    return decompose(study.table, metric, identity()).factors(rank_at(study, compression)).product


def kronecker_sum(study: Study, compression: float) -> torch.Tensor:
    """The best sum of Kronecker products; the tokens are filled up to the nearest product of two like factors."""
    rows, columns = study.table.shape
    inner = max(d for d in range(1, math.isqrt(columns) + 1) if columns % d == 0)
    outer_rows = math.isqrt(rows - 1) + 1
    pairs = (outer_rows, -(-rows // outer_rows)), (columns // inner, inner)
    each = sum(tokens * width for tokens, width in zip(*pairs, strict=True))
    return kronecker.kronecker_sum(study.table, max(1, int(rows * columns / compression) // each), pairs).matrix()


def tucker_slabs(study: Study, compression: float) -> torch.Tensor:
    """Tucker decomposition of the table cut into square slabs (Banaei et al., 2023), of half the slabs in the bank."""
    rows, columns = study.table.shape
    num_slabs = -(-rows // columns)
    stack = F.pad(study.table, (0, 0, 0, num_slabs * columns - rows)).view(num_slabs, columns, columns)
    budget = rows * columns / compression
    fitting = [
        TuckerRanks(rank, rank, bank)
        for bank in range(1, num_slabs + 1)
        for rank in range(1, columns + 1)
        if TuckerRanks(rank, rank, bank).num_weights(num_slabs, columns, columns) <= budget
    ]
    best = max((ranks for ranks in fitting if ranks.bank == num_slabs), key=lambda ranks: ranks.left)
    return tucker(stack, best).blocks().reshape(-1, columns)[:rows]


def two_sided(study: Study, compression: float, tied: bool) -> torch.Tensor:
    """The library's low-rank table, in the metrics of rows and columns."""
    return _compressed(study, tied, method="two_sided_svd", rank=rank_at(study, compression))


def published(study: Study, compression: float) -> torch.Tensor:
    """A linear autoencoder trained with the published loss and schedule (Balazy et al., RepL4NLP 2021)."""
    table = TrainedTable(study.table)
    return table.at_rank(rank_at(study, compression, study.table.shape[1])).product


def nonlinear(study: Study, compression: float) -> torch.Tensor:
    """The offline autoencoder with the published non-linear decoder (Banaei et al., Findings of EACL 2023)."""
    budget = study.table.numel() / compression
    cost = partial(NonlinearAutoencoderTable.num_weights, *study.table.shape)
    lengths = range(1, study.table.shape[1] + 1)
    longest = max(1, sum(cost(code_length=length) <= budget for length in lengths))
    return NonlinearTable(study.table).at_sizes({"code_length": longest}).products[0]


def directions(study: Study, compression: float) -> torch.Tensor:
    """The autoencoder for directions: relative errors, all columns alike."""
    table = make_table(study.table, None, study.counts, "direction")
    rows, columns = study.table.shape
    return table.at_rank(rank_at(study, compression, columns + rows // 2)).product


def autoencoder(study: Study, compression: float, tied: bool) -> torch.Tensor:
    """The library's autoencoder, as `embeddings="autoencoder"` makes it."""
    rank = rank_at(study, compression, study.table.shape[1])
    return _compressed(study, tied, method="svd", embeddings="autoencoder", rank=rank)


def _compressed(study: Study, tied: bool, **options: Any) -> torch.Tensor:
    model = study.model if tied else untied(study.model)
    name = next(n for n, module in model.base_model.named_modules() if module is model.get_input_embeddings())
    small = compress(
        model, target_modules=[name], calibration=study.calibration, tokenizer=study.tokenizer,
        text_column="text", refine_passes=0, cache_dir=str(study.cache / ("tied" if tied else "untied")), **options,
    )  # fmt: skip
    return small.get_input_embeddings().to_dense().detach()


def untied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose head has a table of its own."""
    config = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    copied = type(model)(config).eval()
    state = model.state_dict()
    copied.load_state_dict(state, strict=False)
    head: Any = copied.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    head.weight = nn.Parameter(table.weight.detach().clone())
    return copied


# Methods that look at how the table is used make one for each use.
METHODS: dict[str, tuple[Callable[..., torch.Tensor], bool]] = {
    "plain SVD": (plain_svd, False),
    "row-normalised SVD": (row_normalized_svd, False),
    "Fisher-weighted SVD": (fisher_weighted_svd, False),
    "Kronecker sum": (kronecker_sum, False),
    "Tucker, slabs": (tucker_slabs, False),
    "two-sided SVD": (two_sided, True),
    "autoencoder, published": (published, False),
    "autoencoder, non-linear": (nonlinear, False),
    "autoencoder, direction": (directions, False),
    "autoencoder": (autoencoder, True),
}


class _Recorder(nn.Module):
    """Stands at the head and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.inputs.append(hidden_states)
        return hidden_states.new_zeros(*hidden_states.shape[:-1], 1)


@torch.inference_mode()
def perplexity(study: Study, table: torch.Tensor, tied: bool) -> float:
    """Of the model that embeds by `table`, and decodes by it too or by the dense one."""
    embedding: Any = study.model.get_input_embeddings()
    head: Any = study.model.get_output_embeddings()
    recorder = _Recorder()
    dense = embedding.weight
    weight, bias = table if tied else dense, head.bias
    total, count = 0.0, 0
    place = next(name for name, module in study.model.named_modules() if module is head)
    try:
        embedding.weight = nn.Parameter(table, requires_grad=False)
        study.model.set_submodule(place, recorder)
        for step in study.steps:
            inputs = {name: value for name, value in step.inputs.items() if name != "labels"}
            study.model(**inputs)
            labels = step.inputs["labels"]
            seen, wanted = recorder.inputs.pop()[labels != -100], labels[labels != -100]
            for part, target in zip(seen.split(1024), wanted.split(1024), strict=True):
                total += float(F.cross_entropy(F.linear(part, weight, bias), target, reduction="sum"))
            count += len(wanted)
    finally:
        embedding.weight = dense
        study.model.set_submodule(place, head)
    return math.exp(total / count)


def row_fisher(model: PreTrainedModel, steps: Sequence[Step]) -> torch.Tensor:
    """Squared gradients of the rows of the table, summed over batches and columns, (V)."""
    embedding: Any = model.get_input_embeddings()
    found = torch.zeros(embedding.num_embeddings)
    for step in steps:
        model.zero_grad()
        model(**step.inputs).loss.backward()
        found += embedding.weight.grad.square().sum(dim=1)
    model.zero_grad(set_to_none=True)
    return found


def language_study(name: str, task_name: str, length: int, blocks: int, arguments: argparse.Namespace) -> Study:
    """A language model on the test set of WikiText-2."""
    data, models = arguments.data, arguments.models
    model_class = BertForMaskedLM if task_name == "masked-lm" else GPT2LMHeadModel
    model = model_class.from_pretrained(models / name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(models / name)
    corpus = data / "lm-corpus" / "train.jsonl"
    task = make_task(task_name, block_length=length)
    test = detokenized(data / "wikitext-2-raw" / "wiki.test.raw")
    steps = task.steps(tokenizer, beginning(test, tokenizer, arguments.blocks or blocks, length), 32, model)
    seen = beginning(load_texts(corpus, "text"), tokenizer, blocks, length)
    counts = count_tokens(corpus, tokenizer, model.config.vocab_size, "text")
    assert counts is not None
    fisher = row_fisher(model, task.steps(tokenizer, seen, 32, model))
    return Study(name, model, tokenizer, corpus, steps, counts, fisher, arguments.work_dir / name)


def smoke_study(head: str, work_dir: Path) -> Study:
    """Random weights and random token ids: shows that everything runs."""
    torch.manual_seed(0)
    if head == "masked":
        config = BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        model: PreTrainedModel = BertForMaskedLM(config).eval()
    else:
        model = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    ids = torch.randint(200, (4, 12))
    steps = [Step({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, None)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for _ in range(4)]
    counts = torch.bincount(ids.flatten(), minlength=200).double()
    fisher = row_fisher(model, steps)
    return Study(f"smoke, {head}", model, None, batches, steps, counts, fisher, work_dir / f"smoke-{head}")


def print_table(study: Study, methods: Sequence[str], compressions: Sequence[float]) -> None:
    """One block of rows a compression."""
    print(f"\n## {study.name}: {study.table.shape[0]} x {study.table.shape[1]}")
    print(f"dense: perplexity {perplexity(study, study.table, tied=True):.2f}", flush=True)
    occurring = study.counts / study.counts.sum()
    for compression in compressions:
        print(f"\ncompression {compression:g}\n{'':26}untied     tied   1-cos rows  1-cos tokens")
        for name in methods:
            make, has_uses = METHODS[name]
            uses = (False, True)
            tables = [make(study, compression, tied) for tied in uses] if has_uses else [make(study, compression)] * 2
            found = [perplexity(study, table, tied) for table, tied in zip(tables, uses, strict=True)]
            errors = 1 - F.cosine_similarity(study.table, tables[1], dim=1)
            tokens = float((errors * occurring).sum())
            print(f"{name:24}{found[0]:8.2f} {found[1]:8.2f} {float(errors.mean()):12.4f} {tokens:13.4f}", flush=True)


def main() -> None:
    """Run the studies asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("build/embeddings"))
    parser.add_argument("--studies", nargs="+", default=["causal", "masked"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="ROW")
    parser.add_argument("--compressions", nargs="+", type=float, default=COMPRESSIONS)
    parser.add_argument("--blocks", type=int, help="of text to report on (default: 256 masked, 200 causal)")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    sizes = {"masked": ("minilm-l6-mlm", "masked-lm", 98, 256), "causal": ("gpt2-mini", "causal-lm", 128, 200)}
    for name in arguments.studies:
        small = smoke_study(name, arguments.work_dir) if arguments.smoke else None
        study = small or language_study(*sizes[name], arguments)
        print_table(study, arguments.methods, arguments.compressions)


if __name__ == "__main__":
    main()
