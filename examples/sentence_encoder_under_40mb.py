"""A sentence encoder of at most 40 MB on disk, tokenizer and code included, and what it cost on STS-B.

    python examples/sentence_encoder_under_40mb.py --model MODEL --text TEXT --pairs STSB_DEV --out small-encoder
    python examples/sentence_encoder_under_40mb.py --smoke     # a tiny model with random weights, seconds

Half of a small encoder is its token table. Long codes for frequent tokens and short ones for rare tokens take most of
that away; the blocks share what is left by how much each matrix matters. `MODEL` is a folder or Hub id such as
sentence-transformers/all-MiniLM-L6-v2, `TEXT` plain text like that the encoder is for, `STSB_DEV` pairs with scores.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from hf_lowrank import compress, make_report
from hf_lowrank.evaluation import make_task
from hf_lowrank.progress import progress_bar
from hf_lowrank.sharing.record import record_bytes
from hf_lowrank.sharing.saving import save_folder, side_file_bytes

LIMIT = 40_000_000


def encoder_under(limit: int, model: Any, tokenizer: Any, source: str | None, text: Any, out: Path) -> int:
    """Compress, save, and return the bytes of the folder.

    Args:
        source: Folder or Hub id of the tokenizer and other files, which the limit includes, as it does the card.
    """
    for_weights = limit - record_bytes(model) - (side_file_bytes(source) if source else 0)
    small = compress(
        model, target_size=for_weights, embeddings="autoencoder", calibration=text, tokenizer=tokenizer,
        text_column="text" if isinstance(text, Path) else None, progress=progress_bar,
    )  # fmt: skip
    report = make_report(small)
    table = small.get_input_embeddings()
    print(f"parameters: {report.dense_parameters:,} -> {report.parameters:,}")
    print(f"token table: {table}")
    folder = save_folder(small, out, source)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Compress one encoder and score both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sentence-transformers/all-MiniLM-L6-v2")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("small-encoder"))
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=20000, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
        )
        batches = [{"input_ids": torch.randint(20000, (4, 12)), "attention_mask": torch.ones(4, 12).long()}] * 4
        with tempfile.TemporaryDirectory() as folder:
            size = encoder_under(1_000_000, BertModel(config).eval(), None, None, batches, Path(folder) / "out")
        print(f"saved: {size:,} bytes")
        return
    dense = AutoModel.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    size = encoder_under(LIMIT, dense, tokenizer, arguments.model, arguments.text, arguments.out)
    print(f"saved: {size:,} bytes in {arguments.out}")
    small = AutoModel.from_pretrained(arguments.out, trust_remote_code=True).eval()
    task = make_task("similarity")
    found = task.compare({"dense": dense, "small": small}, task.steps(tokenizer, arguments.pairs, 32, dense))
    for name, scores in found.items():
        print(f"{name}: Spearman {100 * scores['spearman']:.2f}")


if __name__ == "__main__":
    main()
