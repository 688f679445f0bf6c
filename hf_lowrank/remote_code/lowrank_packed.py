"""Rounded weights of a model: bytes in its folder, numbers in memory, and no difference between the two.

The plan says which parameters are rounded, and in how many bytes each:

    "packed": {"code": "grid", "tensors": {"encoder.layer.0.attention.self.query.weight": 31415, ...}, "outside": {}}

Names in `tensors` are relative to the base model, those in `outside`, of a head, to the whole one. In the file of the
weights such a parameter is a row of bytes (see `lowrank_codes`). It is one while a model is loaded, too; then it is
decoded, once or (`materialize="each_forward"`) whenever it is used. The bytes are kept beside it, so that what nobody
has changed since is saved as it was.
"""

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .lowrank_codes import Grid, unpack
from .lowrank_plan import PlanError

_logger = logging.getLogger(__name__)


class GridTensor(torch.Tensor):
    """A rounded weight as whole numbers and steps: decoded by whatever computes with it, and moved as it is."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way

    grid: Grid
    note: "Rounding"

    @staticmethod
    def __new__(cls: Any, grid: Grid, note: "Rounding", dtype: torch.dtype) -> "GridTensor":
        made: Any = torch.Tensor._make_wrapper_subclass(cls, note.shape, dtype=dtype, device=grid.codes.device)
        made.grid, made.note = grid, note
        found: GridTensor = made
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if str(func).split(".")[1] in ("detach", "clone", "alias", "_to_copy"):
            device, dtype = kwargs.get("device") or args[0].device, kwargs.get("dtype") or args[0].dtype
            return cls(args[0].grid.to(device), args[0].note, dtype)
        return func(*map(decoded, args), **{name: decoded(value) for name, value in kwargs.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = GridTensor(copy.deepcopy(self.grid, memo), self.note, self.dtype)
        return nn.Parameter(made, requires_grad=False)


def decoded(value: Any) -> Any:
    """The numbers of a `GridTensor`, any other value as it is."""
    return value.note.restored(value.grid.weight()).to(value.dtype) if isinstance(value, GridTensor) else value


class Packing:
    """What a model whose plan has rounded weights does with them."""

    @staticmethod
    def expect_(model: Any) -> None:
        """Put bytes in the place of each rounded parameter of a model that has no numbers yet."""
        for module, name, num_bytes in _places(model).values():
            parameter = module._parameters[name]
            if parameter is not None and parameter.is_meta:
                _notes(module)[name] = Rounding(parameter.shape, isinstance(module, Conv1D))
                content = torch.empty(num_bytes, dtype=torch.uint8, device="meta")
                _set_(model, parameter, nn.Parameter(content, requires_grad=False))
        for module in model.modules():  # some hosts look at the shape of what they would draw
            if any(p is not None and p.dtype == torch.uint8 for p in module._parameters.values()):
                module._is_hf_initialized = True

    @staticmethod
    def decode_(model: Any, mode: str | None) -> None:
        """Turn the bytes of a loaded model into numbers.

        Args:
            mode: `materialize`.

        Raises:
            PlanError: If they cannot be read, or are not here.
        """
        dtype = getattr(model.config, "dtype", None) or torch.get_default_dtype()
        places = [(module._parameters[name], _notes(module)[name]) for module, name, _ in _places(model).values()]
        if any(content.is_meta for content, _ in places):
            raise PlanError("Rounded weights cannot stay on disk while the model runs. Load without offloading.")
        keeps_grid = mode == "each_forward"
        for (content, note), grid in zip(places, unpack([(c, note.matrix) for c, note in places]), strict=True):
            note.content = content.detach().cpu()
            number: Any = GridTensor(grid.to(content.device), note, dtype)
            made = nn.Parameter(number if keeps_grid else decoded(number), requires_grad=not keeps_grid)
            _set_(model, content, made)

    @staticmethod
    def decoded_state(model: Any, state: dict[str, torch.Tensor], prefix: str) -> None:
        """Turn the bytes in a state that is loaded into a model with numbers into numbers."""
        notes = {prefix + key: _notes(module).get(name) for key, (module, name, _) in _places(model).items()}
        found = {
            key: (state[key], note)
            for key, note in notes.items()
            if note is not None and key in state and state[key].dtype == torch.uint8
        }
        for (key, (_, note)), grid in zip(
            found.items(), unpack([(c, n.matrix) for c, n in found.values()]), strict=True
        ):
            state[key] = note.restored(grid.weight())

    @staticmethod
    def packed_state(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state to be saved: bytes for weights as they were rounded, half precision where that loses nothing.

        A weight that has changed since leaves the plan and is saved in full.
        """
        packed, names, places = dict(state), _names(model), _places(model)
        notes = {key: _notes(module).get(name) for key, (module, name, _) in places.items()}
        known = {key: note for key, note in notes.items() if note is not None and len(note.content)}
        changed = {*places} - {*known}
        grids = unpack([(note.content, note.matrix) for note in known.values()])
        for (key, note), grid in zip(known.items(), grids, strict=True):
            parameter = places[key][0]._parameters[places[key][1]]
            if note.is_of(parameter, grid):
                packed |= {same: note.content for same in names[id(parameter)] if same in packed}
            else:
                changed.add(key)
        if changed:
            _logger.warning(_CHANGED, len(changed), min(changed))
            _forget_(model, changed)
        narrowed: dict[Any, torch.Tensor] = {}  # what was one tensor stays one
        for key, value in packed.items():
            same = (value.data_ptr(), value.shape, value.dtype)
            packed[key] = narrowed.setdefault(same, _narrowed(decoded(value)))
        return packed


_CHANGED = "%d weights, such as %s, have changed since they were rounded: they are saved in full. Compress again."


class Rounding:
    """What a module keeps of one of its rounded parameters.

    Args:
        shape: Of the parameter.
        is_turned: Whether the host keeps it (I, O).
        content: Its bytes; none while the model is loaded.
    """

    def __init__(self, shape: torch.Size, is_turned: bool, content: torch.Tensor | None = None) -> None:
        self.shape = shape
        self.is_turned = is_turned
        self.content = torch.empty(0, dtype=torch.uint8) if content is None else content

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the matrix that is rounded: (O, I), or all dimensions but the last, and that."""
        return (self.shape[1], self.shape[0]) if self.is_turned else (self.shape[:-1].numel(), self.shape[-1])

    def restored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The parameter that a matrix is of."""
        return matrix.T.contiguous() if self.is_turned else matrix.view(self.shape)

    def is_of(self, parameter: torch.Tensor, grid: Grid) -> bool:
        """Whether a parameter is still what its bytes, decoded, say."""
        if isinstance(parameter, GridTensor):
            return True
        return parameter.shape == self.shape and torch.equal(
            self.restored(grid.weight()).to(parameter.dtype), parameter.detach().cpu()
        )


def remember_(module: nn.Module, name: str, content: torch.Tensor) -> Rounding:
    """Note the bytes that a parameter of a module, which is to hold their numbers, is saved as."""
    note = _notes(module)[name] = Rounding(module.get_parameter(name).shape, isinstance(module, Conv1D), content)
    return note


def as_matrix(module: nn.Module, parameter: torch.Tensor) -> torch.Tensor:
    """The matrix of a parameter that is rounded; see `Rounding.matrix`."""
    return parameter.T if isinstance(module, Conv1D) else parameter.flatten(0, -2)


def packed_bytes(model: Any) -> dict[str, int]:
    """How many bytes each rounded parameter of a model is saved as, by its name."""
    return {key: size for key, (_, _, size) in _places(model).items()}


def _notes(module: Any) -> dict[str, Rounding]:
    notes: dict[str, Rounding] = module.__dict__.setdefault("rounded_parameters", {})
    return notes


def _places(model: Any) -> dict[str, tuple[Any, str, int]]:
    """Name in the model of each rounded parameter -> its module, its own name, and the number of its bytes."""
    packed, base = model.config.plan.get("packed") or {}, model.base_model
    prefix = "" if base is model else f"{model.base_model_prefix}."
    sizes = {prefix + key: size for key, size in (packed.get("tensors") or {}).items()}
    held = {name for name, _ in model.named_modules()}
    sizes |= {key: n for key, n in (packed.get("outside") or {}).items() if key.rpartition(".")[0] in held}
    found = {}
    for key, size in sizes.items():
        path, _, name = key.rpartition(".")
        module = model.get_submodule(path) if path in held else None
        if module is None or name not in module._parameters:
            raise PlanError(f"{key}: the plan says it is rounded, and the model has no such weight.")
        found[key] = (module, name, size)
    return found


def _names(model: Any) -> dict[int, list[str]]:
    """All names of each parameter, by its identity."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _forget_(model: Any, keys: Iterable[str]) -> None:
    packed, prefix = model.config.plan["packed"], f"{model.base_model_prefix}."
    for key in keys:
        for part in ("tensors", "outside"):
            for name in (key, key.removeprefix(prefix)):
                (packed.get(part) or {}).pop(name, None)


def _set_(model: nn.Module, old: torch.Tensor, new: nn.Parameter) -> None:
    """Put a parameter in the place of another, wherever that is tied to."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new


def _narrowed(value: torch.Tensor) -> torch.Tensor:
    narrow = value.half() if value.dtype == torch.float32 else value
    return narrow if narrow is value or torch.equal(narrow.float(), value) else value
