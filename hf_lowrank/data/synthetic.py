"""What a model is watched on where there are no data: tokens by the law of Zipf, noise with natural spectra."""

from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.data.batches import special_frame
from hf_lowrank.data.rows import READY
from hf_lowrank.errors import InputError
from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.loading import vocabulary_size
from hf_lowrank.hosts.outputs import Batch, longest_input

# Token `k` is drawn in proportion to `1 / (k + offset)`: learned vocabularies are ordered by frequency, roughly.
_ZIPF_OFFSET = 20
_SYNTHETIC_LENGTH = 64
_SYNTHETIC_SAMPLES = 144


def synthetic_batches(model: PreTrainedModel, tokenizer: Any, batch_size: int, seed: int) -> list[Batch]:
    """Batches of whatever a model reads, made up.

    Raises:
        InputError: If it reads something else than tokens, images and sounds.
    """
    try:
        inputs = dummy_inputs(model, batch_size, _SYNTHETIC_LENGTH)
    except InputError:
        if model.main_input_name != "input_ids":
            raise
        inputs = {}
    shapes = {name: inputs[name].shape for name in READY if name in inputs and name != "input_ids"}
    if not shapes:
        return _zipf_batches(model, tokenizer, batch_size, seed)
    count = len(next(iter(shapes.values())))
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = [{}] * (_SYNTHETIC_SAMPLES // count)
    if model.main_input_name == "input_ids":
        batches = _zipf_batches(model, tokenizer, count, seed)
    return [
        {**batch, **{name: natural_noise(shape, generator).to(model.dtype) for name, shape in shapes.items()}}
        for batch in batches
    ]


def natural_noise(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Noise of mean 0 and variance 1 whose amplitudes fall with frequency, `1 / f`, as those of photographs and music.

    Field (1987) of images, Voss and Clarke (1975) of music; networks learn to see by it (Baradad et al., 2021). White
    noise would use what a model has for what it never meets.

    Args:
        shape: (..., H, W) of images and spectrograms, (B, S) of sounds.
    """
    axes = (-2, -1) if len(shape) > 2 else (-1,)
    spectrum = torch.fft.rfftn(torch.randn(shape, generator=generator), dim=axes)
    squares = torch.fft.rfftfreq(shape[-1], 1 / shape[-1]).square()  # of whole waves, (W / 2 + 1)
    if len(axes) > 1:
        squares = squares + torch.fft.fftfreq(shape[-2], 1 / shape[-2]).square()[:, None]
    noise: torch.Tensor = torch.fft.irfftn(spectrum / squares.clamp_min(1).sqrt(), s=shape[-len(axes) :], dim=axes)
    return noise.sub_(noise.mean()).div_(noise.std())


def _zipf_batches(model: PreTrainedModel, tokenizer: Any, batch_size: int, seed: int) -> list[Batch]:
    """Sequences of independent tokens with the frequencies of a natural vocabulary.

    Nothing is known of the language, but the model's own weights decide where such tokens go: that alone finds most of
    what its layers use. With a tokenizer, special and unused tokens are left out and sequences begin and end as usual.
    """
    size = vocabulary_size(model)
    generator = torch.Generator().manual_seed(seed)
    weights = 1 / (torch.arange(size) + _ZIPF_OFFSET)
    start, end = torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)
    if tokenizer is not None and len(_usable_tokens(tokenizer, size)):
        # The order of the usable tokens counts, not their ids: WordPiece begins with a thousand unused ones.
        usable = _usable_tokens(tokenizer, size)
        weights = torch.zeros(size).index_copy(0, usable, 1 / (torch.arange(len(usable)) + _ZIPF_OFFSET))
        start, end = (torch.tensor(part, dtype=torch.long) for part in special_frame(tokenizer))
    length = min(_SYNTHETIC_LENGTH, longest_input(model)) - len(start) - len(end)
    drawn = torch.multinomial(weights, _SYNTHETIC_SAMPLES * length, replacement=True, generator=generator)
    rows = drawn.view(_SYNTHETIC_SAMPLES, length)
    ids = torch.cat([start.expand(len(rows), -1), rows, end.expand(len(rows), -1)], dim=1)  # (N, T)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch_size)]


def _usable_tokens(tokenizer: Any, vocab_size: int) -> torch.Tensor:
    special = set(tokenizer.all_special_ids)
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index < vocab_size)
    usable = [index for index, token in vocabulary if index not in special and not token.startswith("[unused")]
    return torch.tensor(usable, dtype=torch.long)
