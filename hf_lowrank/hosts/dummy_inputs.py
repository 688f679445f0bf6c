"""One small input of whatever a model reads, made from its own description."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.hosts.outputs import longest_input

Inputs = dict[str, torch.Tensor]

_TOKENS = 12
_SAMPLES = 16_000  # a second of sound
_FRAMES = 64  # of features of sound, and of what a model does not say
_SIDE = 32  # of an image, likewise


def dummy_inputs(model: PreTrainedModel, batch_size: int = 2, num_tokens: int = _TOKENS) -> Inputs:
    """The first of several small inputs that the model takes: random, and the same each time.

    Rows of tokens, the last of several padded, where it takes that; images and sounds of the size that its
    configuration says.

    Args:
        num_tokens: Of each text, and of what a decoder writes; frames of a sound, where it comes as samples.

    Raises:
        InputError: If the model takes none of them.
    """
    first: Exception | None = None
    for inputs in _proposals(model, batch_size, num_tokens):
        try:
            run_quietly(model, inputs)
        except Exception as error:  # hosts of all families, each with errors of its own
            first = first or error
        else:
            return inputs
    why = "it reads nothing known" if first is None else one_line(first)
    raise InputError(f"{type(model).__name__} takes no input made from its configuration: {why}") from first


def run_quietly(model: PreTrainedModel, inputs: Inputs) -> Any:
    """What a model returns, without gradients; in training mode it would draw: the caller's generators are kept."""
    with torch.no_grad(), torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        placed = {name: value.to(model.device) for name, value in inputs.items()}
        return model(**{name: v.to(model.dtype) if v.is_floating_point() else v for name, v in placed.items()})


def _proposals(model: Any, batch_size: int, num_tokens: int) -> Iterator[Inputs]:
    """Inputs to try: of what it reads first, of what it must have, of one kind, of tokens and one, of everything."""
    taken = inspect.signature(model.forward).parameters
    required = [name for name, one in taken.items() if one.default is inspect.Parameter.empty]
    pairs = [["input_ids", name] for name in _MEDIA]
    sets = [[model.main_input_name], required, *([name] for name in ("input_ids", *_MEDIA)), *pairs, list(_SHAPES)]
    tried: list[list[str]] = []
    for wanted in sets:
        extras = ["attention_mask"] if "input_ids" in wanted else []
        extras += ["decoder_input_ids"] if getattr(model.config, "is_encoder_decoder", False) else []
        names = [name for name in _SHAPES if name in taken and name in (*wanted, *extras)]
        if names and names not in tried:
            tried.append(names)
            yield from _of_shapes(model, names, batch_size, num_tokens)


def _of_shapes(model: Any, names: Sequence[str], batch_size: int, num_tokens: int) -> Iterator[Inputs]:
    shapes = {name: _SHAPES[name](model, num_tokens) for name in names}
    # With padding, where a model cannot batch, and two choices a row.
    for rows in ((batch_size,), (1,), (max(batch_size // 2, 1), 2)):
        for turn in range(max(map(len, shapes.values()))):
            generator = torch.Generator().manual_seed(0)
            yield {
                name: _DRAWN.get(name, _normal)(model, (*rows, *some[min(turn, len(some) - 1)]), generator)
                for name, some in shapes.items()
            }


def _normal(model: Any, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _tokens(model: Any, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Tokens that mean nothing special, and the end of the sequence at the end where there is one."""
    size = _said(model.config, "vocab_size", "vocabulary_size") or _TOKENS
    special = set(_special_tokens(model.config))
    usual = [token for token in range(size) if token not in special]
    tokens = torch.tensor(usual or [0])[torch.randint(len(usual or [0]), shape, generator=generator)]
    end = _said(model.config, "eos_token_id")
    if end is not None and 0 <= end < size:
        tokens[..., -1] = end
    return tokens


def _mask(model: Any, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    mask = torch.ones(shape, dtype=torch.long)
    if shape[0] > 1:
        mask[-1, ..., -2:] = 0
    return mask


def _nowhere(model: Any, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape)


def _text(model: Any, num_tokens: int) -> list[tuple[int, ...]]:
    return [(min(num_tokens, longest_input(model)),)]


def _images(model: Any, num_tokens: int) -> list[tuple[int, ...]]:
    channels = _said(model.config, "num_channels", "in_channels", "in_chans", "num_input_channels") or 3
    side = _side(model.config)
    frames = _said(model.config, "num_frames") or 2
    return [(channels, *side), (frames, channels, *side), (channels, frames, *side)]


def _waves(model: Any, num_tokens: int) -> list[tuple[int, ...]]:
    strides: Any = next(_find(model.config, lambda name: name == "conv_stride"), None)
    # A frame is as many samples as all convolutions step over; the first one takes a little more.
    samples = _SAMPLES if strides is None else math.prod(strides) * (num_tokens + 2)
    return [(samples,), (1, samples), *_features(model, num_tokens)]


def _features(model: Any, num_tokens: int) -> list[tuple[int, ...]]:
    bins = _said(model.config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel") or 80
    frames = _said(model.config, "max_source_positions", "max_length") or _FRAMES
    return [(bins, 2 * frames), (frames, bins), (_FRAMES, bins), (1, _FRAMES, bins)]


def _side(config: Any) -> tuple[int, int]:
    found = _find(config, lambda name: name in ("image_size", "img_size"))
    size: Any = next((value for value in found if isinstance(value, (int, list, tuple))), _SIDE)
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


_MEDIA = ("pixel_values", "input_values", "input_features", "bbox")
# Argument of a model's forward -> shapes after the rows that it may want.
_SHAPES: dict[str, Callable[[Any, int], list[tuple[int, ...]]]] = {
    "input_ids": _text,
    "attention_mask": _text,
    "pixel_values": _images,
    "input_values": _waves,
    "input_features": _features,
    "decoder_input_ids": _text,
    "bbox": lambda model, num_tokens: [(*_text(model, num_tokens)[0], 4)],
}
_DRAWN = {"input_ids": _tokens, "decoder_input_ids": _tokens, "attention_mask": _mask, "bbox": _nowhere}


def _said(config: Any, *names: str) -> int | None:
    """The first whole number that a configuration or one inside it has under one of the names."""
    return next((value for value in _find(config, lambda name: name in names) if type(value) is int), None)


def _special_tokens(config: Any) -> Iterator[int]:
    for value in _find(config, lambda name: name.endswith(("token_id", "token_index"))):
        yield from (one for one in (value if isinstance(value, (list, tuple)) else [value]) if type(one) is int)


def _find(config: Any, is_wanted: Callable[[str], bool]) -> Iterator[Any]:
    """Values of fields, of the configuration first and then of those inside it."""
    yield from (value for name, value in vars(config).items() if is_wanted(name))
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield from _find(getattr(config, name), is_wanted)
