"""Images and sounds, and what reads them, tiny and made from constructors."""

import numpy as np
from PIL import Image
from transformers import Wav2Vec2FeatureExtractor
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE, RATE = 16, 8000
_DRAW = np.random.default_rng(0)
PICTURES = [Image.fromarray(_DRAW.integers(0, 256, (SIDE, SIDE), dtype=np.uint8)) for _ in range(20)]
IMAGES = [{"image": picture, "label": number % 2} for number, picture in enumerate(PICTURES)]
SOUNDS = [
    {"audio": {"array": _DRAW.standard_normal(300 + 20 * number).astype(np.float32), "sampling_rate": RATE}}
    for number in range(20)
]


def image_processor():
    """One that makes `pixel_values` (B, 3, 16, 16)."""
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def feature_extractor():
    """One that makes `input_values` and a mask."""
    return Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
