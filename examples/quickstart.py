"""Compress a model, see what it gained and lost, save it, and prove that it loads without this library.

python examples/quickstart.py my-fine-tuned-bert small-bert --calibration texts.txt
python examples/quickstart.py --smoke        # a tiny model with random weights, seconds
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from transformers import BertConfig, BertForMaskedLM, BertTokenizer

from hf_lowrank import compress
from hf_lowrank.cli.tables import print_comparison
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.progress import progress_bar
from hf_lowrank.records.latency import compare_latency
from hf_lowrank.records.report import make_report
from hf_lowrank.sharing.saving import save_folder
from hf_lowrank.sharing.verification import verify


def main() -> int:
    """Run the example; 0 if the saved folder computes the same elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="Hub id or folder of a dense model")
    parser.add_argument("out", nargs="?", default="small-model", help="folder to write")
    parser.add_argument("--keep-params", type=float, default=0.6, help="fraction of the parameters that stay")
    parser.add_argument("--calibration", help="text like that the model is for")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.model = str(tiny_model(Path(tempfile.mkdtemp())))
    elif arguments.model is None:
        parser.error("name a model, or give --smoke")

    dense = load_dense(arguments.model)
    method = {"method": "svd"} if arguments.smoke else {}
    small = compress(
        dense, keep_params=arguments.keep_params, calibration=arguments.calibration, progress=progress_bar, **method
    )
    print_comparison(replace(make_report(small), latency=compare_latency(dense, small)))

    folder = save_folder(small, arguments.out, arguments.model, overwrite=True)  # weights, code, tokenizer, card
    print(f"saved: {folder}")
    verification = verify(folder, small)
    print(verification.message)
    return 0 if verification.ok else 1


def tiny_model(folder: Path) -> Path:
    """A BERT of two small layers with random weights and a tokenizer of letters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
