"""A sentence encoder at some sizes, beside what other quantizers make of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bits.rivals import Encoder, in_torch, make_rival, missing
from bits.rows import Row, kept, slug
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, PreTrainedModel

from hf_lowrank import compress
from hf_lowrank.evaluation.base import Step
from hf_lowrank.evaluation.metrics import rank_correlation
from hf_lowrank.planning.sizes import overhead_bytes
from hf_lowrank.sharing.saving import save_folder

_DRAWS = 1000
_BATCH = 64


@dataclass(frozen=True)
class Study:
    """A sentence encoder, the text it is calibrated on, and the pairs it is reported on by name."""

    model: PreTrainedModel
    tokenizer: Any
    calibration: Any
    reports: Mapping[str, Sequence[Step]]
    sizes: Sequence[float]
    work_dir: Path


@torch.inference_mode()
def embeddings(encoder: Encoder, steps: Sequence[Step]) -> torch.Tensor:
    """Unit vectors of all sentences, the first ones of each step before its second ones, (N, D)."""
    masked = [(step.inputs["input_ids"], step.inputs["attention_mask"].bool()) for step in steps]
    texts = [tuple(ids[mask].tolist()) for step in masked for ids, mask in zip(*step, strict=True)]
    found: dict[tuple[int, ...], torch.Tensor] = {}
    each = sorted(set(texts), key=len)  # once, beside others as long
    for start in range(0, len(each), _BATCH):
        batch = [torch.tensor(text) for text in each[start : start + _BATCH]]
        mask = pad_sequence([torch.ones_like(ids) for ids in batch], batch_first=True)
        inputs = {"input_ids": pad_sequence(batch, batch_first=True), "attention_mask": mask}
        pooled = (encoder.encode(inputs) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        found |= dict(zip(each[start : start + _BATCH], F.normalize(pooled, dim=1).double(), strict=True))
    return torch.stack([found[text] for text in texts])


def spearman(vectors: torch.Tensor, steps: Sequence[Step]) -> tuple[float, float, float]:
    """100 times the rank correlation with the gold scores, and between what it lies in 95 of 100 draws of pairs."""
    pairs = vectors.split([len(step.inputs["input_ids"]) for step in steps])
    said = torch.cat([F.cosine_similarity(*part.chunk(2)) for part in pairs])
    both = torch.stack([said, torch.tensor([gold for step in steps for gold in step.targets]).double()], 1)
    generator = torch.Generator().manual_seed(0)
    draws = (torch.randint(len(both), (len(both),), generator=generator) for _ in range(_DRAWS))
    drawn = torch.tensor([rank_correlation(both[draw].numpy()) for draw in draws])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return 100 * rank_correlation(both.numpy()), 100 * low, 100 * high


def encoded(study: Study, encoder: Encoder) -> dict[str, torch.Tensor]:
    """Its vectors of all sentences, by report."""
    return {name: embeddings(encoder, steps) for name, steps in study.reports.items()}


def scored(study: Study, encoder: Encoder, dense: Encoder, vectors: Mapping[str, torch.Tensor]) -> Row:
    """What a table says of an encoder; `vectors` are those of the dense one."""
    found = vectors if encoder is dense else encoded(study, encoder)
    return {
        "megabytes": encoder.num_bytes / 1e6,
        "folder": (encoder.folder_bytes or encoder.num_bytes) / 1e6,
        "cosine": float(torch.cat([(found[name] * vectors[name]).sum(1) for name in found]).mean()),
        "scores": {name: spearman(found[name], steps) for name, steps in study.reports.items()},
    }


def ours(study: Study, megabytes: float) -> Encoder:
    """Saved by this library with that many megabytes of weights, and loaded as anyone loads it."""
    folder = study.work_dir / f"ours-{megabytes:g}"
    small = compress(
        study.model,
        target_size=int(megabytes * 1e6) + overhead_bytes(study.model, (), "grid"),
        calibration=study.calibration,
        tokenizer=study.tokenizer,
        text_column="text",
        cache_dir=str(study.work_dir / "cache"),
    )
    save_folder(small, folder, overwrite=True)
    loaded = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    whole = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Encoder(in_torch(loaded), (folder / "model.safetensors").stat().st_size, whole)


def encoders(study: Study, rivals: Sequence[str], dense: Encoder) -> dict[str, Callable[[], Encoder]]:
    """What makes the encoder of each row."""
    makers: dict[str, Callable[[], Encoder]] = {"dense, float32": lambda: dense}
    for name in rivals:
        if absent := missing(name):
            print(f"left out: {name} (not installed: {', '.join(absent)})")
        else:
            makers[name] = lambda name=name: make_rival(name, study.model, study.work_dir / slug(name))
    return makers | {f"**hf_lowrank, {size:g} MB**": lambda size=size: ours(study, size) for size in study.sizes}


def print_sentences(study: Study, rivals: Sequence[str]) -> None:
    """One row an encoder, the rivals by name."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in study.model.parameters())
    dense = Encoder(in_torch(study.model), size)
    makers = encoders(study, rivals, dense)
    file = study.work_dir / "dense.pt"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(encoded(study, dense), file)
    vectors = torch.load(file)
    print("\n| | MB | whole folder | " + " | ".join(study.reports) + " | cosine to dense |")
    print("|---" * (4 + len(study.reports)) + "|")
    for name, make in makers.items():
        file = study.work_dir / "rows" / f"{slug(name)}.json"
        row = kept(file, lambda make=make: scored(study, make(), dense, vectors))
        shown = [f"{s:.2f} ({low:.2f} to {high:.2f})" for s, low, high in row["scores"].values()]
        sizes = f"{row['megabytes']:.2f} | {row['folder']:.2f}"
        print(f"| {name} | {sizes} | {' | '.join(shown)} | {row['cosine']:.4f} |", flush=True)
