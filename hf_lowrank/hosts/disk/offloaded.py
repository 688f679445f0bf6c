"""Models that are not in memory: each weight stays in its file, and is there while its block runs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.files.scratch import scratch_folder, write_file
from hf_lowrank.files.tensors import StoredTensor, stored_tensors
from hf_lowrank.hosts.blocks import block_name
from hf_lowrank.hosts.disk.stored import bring_, can_leave, is_away, keep_in_, let_go_, nothing, numbers_of, source_of
from hf_lowrank.remote_code.lowrank_structures import named_structures

_STATE = "offloaded"  # where a model keeps its `Offloaded`
_WEIGHTS = "weights_map"  # where Accelerate's hooks, and so `save_pretrained`, look for weights that are elsewhere


class Offloaded(Mapping[str, torch.Tensor]):
    """The weights of one model, those of a block in memory while it runs; by name, whole and wherever they are.

    Args:
        model: Its parameters are in memory or `keep_in_` a file.
        dtype: Type that they are stored in, which may be narrower than the one it computes in.

    Attributes:
        kept: What owns folders that files of weights are in.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.kept: list[Any] = []
        self._model = model
        self._holders = WeakIdKeyDictionary()  # parameter -> how many have it brought at present
        self._hooks: list[Any] = []
        vars(model)[_STATE] = vars(model)["_hf_hook"] = self
        vars(model)["hf_device_map"] = {"": "disk"}
        self.attach()

    def attach(self) -> None:
        """Watch the modules that the model is made of now."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [self._model.register_state_dict_post_hook(_without_numbers)]
        for module, recurse in _units(self._model):
            parameters = list(module.parameters(recurse))  # now: who watches a mixture takes its own away for a while
            self._hooks.append(module.register_forward_pre_hook(partial(self._enter, parameters)))
            self._hooks.append(module.register_forward_hook(partial(self._leave, parameters), always_call=True))

    def _enter(self, parameters: Sequence[nn.Parameter], module: nn.Module, inputs: Any) -> None:
        if "forward" not in vars(module):  # one that something else stands in for computes with no weight
            self._bring(parameters)

    def _leave(self, parameters: Sequence[nn.Parameter], module: nn.Module, inputs: Any, output: Any) -> None:
        if "forward" not in vars(module):
            self._let_go(parameters)

    @property
    def weights_map(self) -> Mapping[str, torch.Tensor]:
        """See `_WEIGHTS`."""
        return self

    def __getitem__(self, name: str) -> torch.Tensor:
        return numbers_of(self._model.get_parameter(name))

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._model.named_parameters())

    def __len__(self) -> int:
        return len(list(self._model.parameters()))

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        """Within, the weights of a module are in memory."""
        parameters = list(module.parameters())
        self._bring(parameters)
        try:
            yield
        finally:
            self._let_go(parameters)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """Within, what comes stays: for every batch of one block, and for gradients, which are computed with it."""
        parameters = list(self._model.parameters())
        for parameter in parameters:
            self._count(parameter, 1)
        try:
            yield
        finally:
            self._let_go(parameters)

    def _bring(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            self._count(parameter, 1)
            bring_(parameter)

    def _let_go(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            if self._count(parameter, -1) == 0:
                let_go_(parameter)

    def _count(self, parameter: nn.Parameter, change: int) -> int:
        count: int = max(self._holders.get(parameter, 0) + change, 0)
        self._holders[parameter] = count
        return count


def offloaded(model: nn.Module) -> Offloaded | None:
    """Where the weights of a model are; None of one that is in memory."""
    return vars(model).get(_STATE)


def load_offloaded(
    model_class: Any, source: str | Path, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """A model whose weights stay in the files of its folder or Hub id, in evaluation mode.

    Those that transformers turns into others when it loads them, such as a mixture's experts, are in a temporary
    folder that goes when the model does.

    Args:
        dtype: Type that it computes in.
        device: Where it computes.

    Raises:
        InputError: If weights are missing.
    """
    owner = _Owner()
    place = {"device_map": {"": "disk"}, "offload_folder": scratch_folder(owner)}
    about = {"dtype": dtype, "output_loading_info": True, **place}
    stored = AutoConfig.from_pretrained(source, trust_remote_code=False).dtype or torch.float32
    model, info = model_class.from_pretrained(source, trust_remote_code=False, **about)
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{source} lacks {len(missing)} weights, such as {missing[0]!r}. Save the model again.")
    take_over_(model, stored, device).kept.append(owner)
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def take_over_(model: Any, stored: torch.dtype, device: torch.device | str) -> Offloaded:
    """Have a model whose weights Accelerate leaves on disk leave them there by itself.

    Args:
        stored: Type that they have there.
        device: Where the model computes.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        weights = getattr(getattr(module, "_hf_hook", None), _WEIGHTS, None)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta and id(parameter) not in made:
                source = _source(weights, name, parameter.dtype)
                made[id(parameter)] = nn.Parameter(nothing(parameter.shape, parameter.dtype, device), False)
                keep_in_(made[id(parameter)], source)
            setattr(module, name, made.get(id(parameter), parameter))
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        vars(module).pop("forward", None)  # its own, which Accelerate puts back as an attribute
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    return Offloaded(model, stored)


def _source(weights: Any, name: str, dtype: torch.dtype) -> StoredTensor:
    """The file of a weight in what Accelerate keeps for a module."""
    loader = getattr(weights, "dataset", weights)
    entry = (
        loader.index.get(getattr(weights, "prefix", "") + name) if isinstance(loader, OffloadedWeightsLoader) else {}
    )
    if not entry or "safetensors_file" not in entry:
        raise InputError(f"The weight {name!r} is neither in memory nor in a safetensors file. Load the model again.")
    return StoredTensor(Path(entry["safetensors_file"]), entry.get("weight_name", name), dtype)


@torch.no_grad()
def move_out_(module: nn.Module, path: Path, prefix: str, dtype: torch.dtype, record: dict[str, str]) -> None:
    """Leave a module's weights on disk in some type: what is in no file yet is written to this one, by full name.

    Args:
        record: Kept with them.
    """
    new = {n: value.detach() for n, value in module.state_dict(keep_vars=True).items() if not can_leave(value)}
    state = {f"{prefix}.{n}": v.to(_type_in(dtype, v), copy=True).cpu().contiguous() for n, v in new.items()}
    write_file(path, lambda draft: save_file(state, draft, metadata=record))
    moved_out_(module, path, prefix, dtype, "cpu")


@torch.no_grad()
def moved_out_(module: nn.Module, path: Path, prefix: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Leave the weights of a module to the file that `move_out_` wrote.

    Args:
        device: Of those that are nowhere yet.
    """
    written = stored_tensors(path)
    for name, parameter in [*module.named_parameters()]:
        holder, _, leaf = name.rpartition(".")
        source = written.get(f"{prefix}.{name}") or source_of(parameter)
        if parameter.is_meta:
            parameter = nn.Parameter(nothing(parameter.shape, parameter.dtype, device), requires_grad=False)
            setattr(module.get_submodule(holder), leaf, parameter)
        keep_in_(parameter, replace(source, dtype=_type_in(dtype, parameter)))
    for name, buffer in [*module.named_buffers()]:
        if buffer.is_meta:
            holder, _, leaf = name.rpartition(".")
            module.get_submodule(holder)._buffers[leaf] = written[f"{prefix}.{name}"].read().to(device)


def retype_stored_(model: nn.Module, dtype: torch.dtype) -> None:
    """Have what of a model is in files read in some type."""
    for parameter in model.parameters():
        if can_leave(parameter):
            keep_in_(parameter, replace(source_of(parameter), dtype=_type_in(dtype, parameter)))


class _Owner:
    """What a folder goes with."""


def _type_in(dtype: torch.dtype, value: torch.Tensor) -> torch.dtype:
    return dtype if value.is_floating_point() else value.dtype


def _units(model: PreTrainedModel) -> Iterator[tuple[nn.Module, bool]]:
    """What comes and goes together: blocks, structures, and other modules with parameters of their own.

    Each with whether those of its children belong to it.
    """
    whole = {name for name, _ in named_structures(model)}
    whole |= {name for name, _ in model.named_modules() if name and block_name(name) == name}
    for name, module in model.named_modules():
        parents = (name[:end] for end, letter in enumerate(name) if letter == ".")
        if name in whole:
            yield module, True
        elif not any(parent in whole for parent in parents) and any(True for _ in module.parameters(recurse=False)):
            yield module, False


def _without_numbers(model: Any, state: dict[str, torch.Tensor], prefix: str, metadata: Any) -> None:
    """Of a weight that is away a state dict says the shape; who saves it reads it from its file."""
    for name, value in state.items():
        if is_away(value):
            state[name] = value.to("meta") if value.numel() < 2 else torch.empty_like(value, device="meta")
