"""Train a small ViT on scikit-learn's handwritten digits, compress it by calibration images, print accuracies.

    python examples/digits_vit.py --out build/digits
    python examples/digits_vit.py --smoke        # a few steps, seconds

Accuracy is of 500 digits that neither the training nor the compression saw. `--out` keeps the dense model with its
image processor, and the digits as folders of images, one a class, so that the same can be had from the command line:

    hf-lowrank compress build/digits/dense build/digits/small --keep-targets 0.5 --calibration build/digits/calibration
    hf-lowrank evaluate build/digits/small --dense build/digits/dense --dataset build/digits/test \
        --task image-classification --record
    hf-lowrank verify build/digits/small
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_lowrank import compress, evaluate, recover

Row = dict[str, Any]

_SIDE, _TEST = 16, 500


def main() -> None:
    """Print one row a model."""
    options = parse()
    torch.manual_seed(options.seed)
    digits = rows_of_digits()
    rows = [digits[place] for place in torch.randperm(len(digits)).tolist()]
    parts = {"test": rows[:_TEST], "calibration": rows[_TEST : _TEST + 256], "train": rows[_TEST:]}
    processor = ViTImageProcessorPil(size={"height": _SIDE, "width": _SIDE})
    dense = vit(options.width, options.layers)
    learn(dense, processor, parts["train"], options.epochs)

    def accuracy(model: Any) -> float:
        found = evaluate(model, parts["test"], "image-classification", tokenizer=processor, cost=False)
        return found.model.scores["accuracy"]

    print(f"ViT on digits: {options.keep_targets:.0%} of the blocks' matrices stay; {_TEST} images")
    print(f"{'dense':<28}{accuracy(dense):>8.2%}")
    images: dict[str, Any] = {"calibration": parts["calibration"], "tokenizer": processor}
    ways = {"svd": {"method": "svd"}, "two_sided_svd, no images": {}, "two_sided_svd": images}
    for name, own in ways.items():
        small = compress(dense, keep_targets=options.keep_targets, seed=options.seed, **own)
        print(f"{name:<28}{accuracy(small):>8.2%}", flush=True)
        if name != "two_sided_svd, no images":
            recover(small, teacher=dense, dataset=parts["calibration"], tokenizer=processor, epochs=options.recovery)
            print(f"{name + ', recovered':<28}{accuracy(small):>8.2%}", flush=True)
    if options.out is not None:
        keep(options.out, dense, processor, parts)


def rows_of_digits() -> list[Row]:
    """Each digit as a grey image of 16 x 16 and its class."""
    digits = load_digits()
    images = [Image.fromarray((pixels * 15).astype("uint8")) for pixels in digits.images]
    return [
        {"image": image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), "label": int(label)}
        for image, label in zip(images, digits.target, strict=True)
    ]


def vit(width: int, layers: int) -> Any:
    """A ViT with random weights."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = ViTConfig(image_size=_SIDE, patch_size=4, num_attention_heads=4, num_labels=10, **sizes)
    return ViTForImageClassification(config)


def learn(model: Any, processor: Any, rows: list[Row], epochs: int) -> None:
    """Train a model on its own loss with a cosine from 1e-3."""
    pixels = processor(images=[row["image"].convert("RGB") for row in rows], return_tensors="pt")["pixel_values"]
    labels, size = torch.tensor([row["label"] for row in rows]), 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * -(-len(rows) // size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(rows)).split(size):
            optimizer.zero_grad()
            model(pixel_values=pixels[batch], labels=labels[batch]).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def keep(out: Path, dense: Any, processor: Any, parts: dict[str, list[Row]]) -> None:
    """Save the model with its processor, and the digits in folders, one a class."""
    dense.save_pretrained(out / "dense")
    processor.save_pretrained(out / "dense")
    for name, rows in parts.items():
        for number, row in enumerate(rows):
            file = out / name / str(row["label"]) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(file)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the model and the images")
    parser.add_argument("--keep-targets", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=40, help="of training the dense model")
    parser.add_argument("--recovery", type=float, default=10, help="epochs of recovery")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="sizes for a test")
    options = parser.parse_args()
    if options.smoke:
        options.epochs, options.recovery, options.width, options.layers = 1, 1, 16, 2
    return options


if __name__ == "__main__":
    main()
