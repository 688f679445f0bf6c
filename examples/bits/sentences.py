"""A sentence encoder at some sizes, beside what other quantizers make of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bits.rivals import Encoder, in_torch, make_rival, missing
from bits.rows import Row, kept, slug
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from hf_lowrank import compress
from hf_lowrank.evaluation.base import Step
from hf_lowrank.evaluation.metrics import rank_correlation
from hf_lowrank.planning.sizes import overhead_bytes
from hf_lowrank.sharing.saving import save_folder

_DRAWS = 1000


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
    found = []
    for step in steps:
        mask = step.inputs["attention_mask"][..., None]
        hidden = encoder.encode(step.inputs)
        found.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(found).double()


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


def scored(study: Study, encoder: Encoder, dense: Mapping[str, torch.Tensor] | None) -> Row:
    """What a table says of an encoder."""
    found = {name: embeddings(encoder, steps) for name, steps in study.reports.items()}
    cosines = torch.cat([(found[name] * dense[name]).sum(1) for name in found]) if dense else torch.ones(1)
    return {
        "megabytes": encoder.num_bytes / 1e6,
        "folder": (encoder.folder_bytes or encoder.num_bytes) / 1e6,
        "cosine": float(cosines.mean()),
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


def print_sentences(study: Study, rivals: Sequence[str]) -> None:
    """One row an encoder, the rivals by name."""
    numbers = sum(parameter.numel() for parameter in study.model.parameters())
    dense = Encoder(in_torch(study.model), 4 * numbers)
    vectors = {name: embeddings(dense, steps) for name, steps in study.reports.items()}
    makers: dict[str, Callable[[], Encoder]] = {"dense, float32": lambda: dense}
    for name in rivals:
        if absent := missing(name):
            print(f"left out: {name} (not installed: {', '.join(absent)})")
        else:
            makers[name] = lambda name=name: make_rival(name, study.model, study.work_dir / slug(name))
    makers |= {f"**hf_lowrank, {size:g} MB**": lambda size=size: ours(study, size) for size in study.sizes}
    print("\n| | MB | whole folder | " + " | ".join(study.reports) + " | cosine to dense |")
    print("|---" * (4 + len(study.reports)) + "|")
    for name, make in makers.items():
        file = study.work_dir / "rows" / f"{slug(name)}.json"
        row = kept(file, lambda make=make: scored(study, make(), vectors))
        shown = [f"{s:.2f} ({low:.2f} to {high:.2f})" for s, low, high in row["scores"].values()]
        sizes = f"{row['megabytes']:.2f} | {row['folder']:.2f}"
        print(f"| {name} | {sizes} | {' | '.join(shown)} | {row['cosine']:.4f} |", flush=True)
