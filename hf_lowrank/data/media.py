"""Images and sounds as a processor reads them: from files, folders, columns of data sets; needs Pillow."""

import inspect
import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import ProcessorMixin

from hf_lowrank.errors import InputError, one_line
from hf_lowrank.hosts.outputs import Batch

FILE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".wav")
# What a processor calls each kind of content, and whether a value is of it is asked in this order.
_IMAGES, _SOUNDS, _TEXT = "images", "audio", "text"


def folder_rows(folder: Path) -> list[dict[str, Any]]:
    """A row for each image or sound in a folder or in folders in it, whose names are then labels."""
    found = [path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern))]
    files = [path for path in found if path.suffix.lower() in FILE_ENDINGS and path.is_file()]
    return [{"file": path, **({} if path.parent == folder else {"label": path.parent.name})} for path in files]


def media_batch(rows: Sequence[Mapping[str, Any]], processor: Any) -> Batch:
    """What a processor makes of images, sounds and, where it reads them beside those, texts.

    A row holds each in a column of any name: an image as Pillow's, as an array or as encoded bytes, a sound as an
    array with its rate (`{"array": ..., "sampling_rate": ...}`), as a decoder or as WAV, each also as a path.

    Raises:
        InputError: If a row holds nothing the processor reads, or that cannot be read.
    """
    contents = [_contents(row) for row in rows]
    if not holds_media(rows[0]):
        columns = ", ".join(map(str, rows[0]))
        raise InputError(f"{type(processor).__name__} reads images or sounds, and no column is one: {columns}.")
    given = {kind: [content.get(kind) for content in contents] for kind in contents[0]}
    try:
        found = _processed(processor, given)
    except Exception as error:  # processors of all families, each with errors of its own
        raise InputError(f"{type(processor).__name__} cannot read the data: {one_line(error)}") from error
    # Labels of some processors hold padding that counts.
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor) and name != "labels"}


def holds_media(row: Mapping[str, Any]) -> bool:
    """Whether a row holds an image or a sound."""
    return bool(_contents(row).keys() - {_TEXT})


def _processed(processor: Any, given: dict[str, list[Any]]) -> Any:
    taken = inspect.signature(processor.__call__).parameters
    extra: dict[str, Any] = {"return_tensors": "pt"}
    if _SOUNDS in given:
        samples, rates = zip(*given[_SOUNDS], strict=True)
        if len(set(rates)) > 1:
            raise InputError(f"sounds have several rates: {', '.join(map(str, sorted(set(rates))))}. Resample them.")
        given, extra["sampling_rate"] = {_SOUNDS: list(samples)}, rates[0]
    if isinstance(processor, ProcessorMixin):
        texts = {"padding": True, "truncation": True} if _TEXT in given else {}
        return processor(**{kind: values for kind, values in given.items() if kind in taken}, **extra, **texts)
    if "padding" in taken and taken["padding"].default is False:  # others fill up to what their model needs
        extra["padding"] = True
    return processor(next(values for kind, values in given.items() if kind != _TEXT), **extra)


def _contents(row: Mapping[str, Any]) -> dict[str, Any]:
    """The image, the sound and the text of a row, by what a processor calls them."""
    found: dict[str, Any] = {}
    for value in row.values():
        if (known := _content(value)) is not None:
            found.setdefault(*known)
    return found


def _content(value: Any) -> tuple[str, Any] | None:
    if isinstance(value, (str, Path)):
        is_file = str(value).lower().endswith(FILE_ENDINGS)
        return _opened(Path(value).read_bytes()) if is_file else (_TEXT, str(value))
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        return _opened(value["bytes"])
    if isinstance(value, Mapping) and value.get("path"):
        return _content(str(value["path"]))
    if isinstance(value, Mapping) and "array" in value:
        return _SOUNDS, (np.asarray(value["array"], dtype=np.float32), value.get("sampling_rate"))
    if hasattr(value, "get_all_samples"):  # as data sets hold sounds
        samples = value.get_all_samples()
        return _SOUNDS, (samples.data.mean(dim=0).numpy(), samples.sample_rate)
    if isinstance(value, Image.Image) or (hasattr(value, "ndim") and value.ndim in (2, 3)):
        return _IMAGES, _rgb(value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value)))
    return None


def _opened(content: bytes) -> tuple[str, Any]:
    try:
        if content.startswith(b"RIFF") and content[8:12] == b"WAVE":
            return _SOUNDS, _wave(content)
        return _IMAGES, _rgb(Image.open(io.BytesIO(content)))
    except (OSError, ValueError, wave.Error, EOFError) as error:
        raise InputError(f"A file is neither an image nor 16-bit WAV: {one_line(error)} Convert it.") from error


def _rgb(image: Any) -> Any:
    return image.convert("RGB")


def _wave(content: bytes) -> tuple[NDArray[np.float32], int]:
    with wave.open(io.BytesIO(content)) as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"it has {8 * file.getsampwidth()} bits a sample.")
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").reshape(-1, file.getnchannels())
        return (samples.mean(axis=1) / 32768).astype(np.float32), file.getframerate()
