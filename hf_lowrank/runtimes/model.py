"""An exported file in the place of the model it was made from: what scores and times models takes it as one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_lowrank.errors import InputError
from hf_lowrank.extras import load_part
from hf_lowrank.hosts.folder_contents import is_runtime_file
from hf_lowrank.runtimes.check import output_of
from hf_lowrank.runtimes.graphs import Tensors
from hf_lowrank.sharing.saving import load_skeleton_config

_RUNTIMES = {".onnx": "onnx", ".xml": "openvino"}
_PARTS = ("encoder_model", "decoder_model", "decoder_with_past_model")


class RuntimeModel(nn.Module):
    """A file in its runtime, called and answering as a model of transformers; without a past, if it can have one.

    Args:
        session: See `OnnxSession`.
        config: Of the model.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, session: Any, config: Any, main_input_name: str) -> None:
        super().__init__()
        self._session = session
        self.config = config
        self.main_input_name = main_input_name

    @property
    def base_model(self) -> nn.Module:
        """Itself: a file has no parts."""
        return self

    def can_generate(self) -> bool:
        """A call keeps nothing for the next."""
        return False

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, pixel_values: Any = None, **others: Any
    ) -> Any:
        named = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values, **others}
        given: Tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
        if input_ids is not None:
            mask = given.setdefault("attention_mask", torch.ones_like(input_ids))
            given.setdefault("token_type_ids", torch.zeros_like(input_ids))
            given.setdefault("position_ids", (mask.cumsum(-1) - 1).clamp_min(0))
            for name, (heads, width) in self._session.past.items():
                given[name] = torch.zeros(len(input_ids), heads, 0, width)
        return output_of(self._session(given))


def exported_files(folder: str | Path) -> list[Path]:
    """The files in a folder that run a whole model."""
    root = Path(folder)
    found = [path for kind in _RUNTIMES for path in sorted(root.glob(f"*/*{kind}"))]
    whole = [path for path in found if is_runtime_file(path.relative_to(root).as_posix())]
    return [path for path in whole if not path.name.removeprefix("openvino_").startswith(_PARTS)]


def load_exported(path: str | Path, num_threads: int | None = None) -> Any:
    """A file that `export` wrote, as the model it is of.

    Args:
        num_threads: Of one call; None leaves it to the runtime.

    Raises:
        InputError: If it is none, or its runtime is not installed.
    """
    file = Path(path)
    if file.suffix not in _RUNTIMES or not file.is_file():
        raise InputError(f"{path} is no file of {' or '.join(_RUNTIMES.values())}. Export the model first.")
    model_class, config = load_skeleton_config(file.parents[1])
    runtime = _RUNTIMES[file.suffix]
    session = load_part(f"hf_lowrank.runtimes.{runtime}_files", runtime).session(file, num_threads)
    named: Any = type(model_class.__name__, (RuntimeModel,), {})
    return named(session, config, model_class.main_input_name)
