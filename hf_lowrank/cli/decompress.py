"""`hf-lowrank decompress PATH OUT`."""

import argparse

from hf_lowrank.cli import tables
from hf_lowrank.compression.compress import decompress
from hf_lowrank.sharing.saving import load_compressed, save_folder


def run(arguments: argparse.Namespace) -> int:
    """Turn a compressed model into the stock model it stands for, and save that."""
    dense = decompress(load_compressed(arguments.path))
    folder = save_folder(dense, arguments.out, arguments.path, arguments.overwrite)
    name, parameters = type(dense).__name__, sum(p.numel() for p in dense.parameters())
    if arguments.json:
        tables.print_json({"path": arguments.path, "out": str(folder), "class": name, "parameters": parameters})
        return 0
    tables.print_line(f"saved: {folder}, a stock {name} of {parameters:,} parameters (what was lost stays lost)")
    tables.print_steps([f"transformers.{name}.from_pretrained('{arguments.out}')"])
    return 0
