"""Dense model <-> compressed model <-> auto class: finding classes, loading dense models, registering families."""

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Families whose compressed classes are registered with the auto classes, so that their models load without a flag
# where this library is imported. A new one is a word; the classes of every family are made by name.
FAMILIES = ("bert", "gpt2", "roberta", "distilbert", "llama")


_PREFIX = "LowRank"
_CONFIGURATIONS = "hf_lowrank.remote_code.configuration_lowrank"


class _ByName(dict[Any, Any]):
    """What is registered with an auto class: ours stand in it by name and are made when they are looked up.

    The auto classes may be imported in the middle of a host's module (`from transformers import BertModel`), whose
    classes do not exist yet.
    """

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_as_name(key))

    def __getitem__(self, key: Any) -> Any:
        return _as_class(super().__getitem__(_as_name(key)))

    def keys(self) -> Any:
        return [_as_class(key) for key in self]

    def values(self) -> Any:
        return [_as_class(value) for value in super().values()]

    def items(self) -> Any:
        return list(zip(self.keys(), self.values(), strict=True))


def _as_name(key: Any) -> Any:
    return key.__name__ if getattr(key, "__module__", None) == _CONFIGURATIONS else key


def _as_class(value: Any) -> Any:
    is_ours = isinstance(value, str) and value.startswith(_PREFIX)
    return getattr(importlib.import_module("hf_lowrank"), value) if is_ours else value


def register_configurations() -> None:
    """Make `AutoConfig` know the configurations of the compressed families."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    ours = {f"lowrank_{family}": _PREFIX + auto.CONFIG_MAPPING_NAMES[family] for family in FAMILIES}
    auto.CONFIG_MAPPING._extra_content = _ByName(auto.CONFIG_MAPPING._extra_content | ours)


def register_models() -> None:
    """Make every auto class know the heads of the compressed families."""
    configurations = importlib.import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    for name, auto_class in list(vars(auto).items()):
        mapping = getattr(auto_class, "_model_mapping", None) if name.startswith("Auto") else None
        if mapping is not None:
            hosts = mapping._model_mapping
            names = {family: hosts[family] for family in FAMILIES if family in hosts}
            ours = {
                _PREFIX + configurations[family]: _PREFIX + (host if isinstance(host, str) else host[0])
                for family, host in names.items()
            }
            mapping._extra_content = _ByName(mapping._extra_content | ours)


def register_push() -> None:
    """Give compressed models made or loaded with this library its `push_to_hub`, which verifies first."""
    mixin = importlib.import_module("hf_lowrank.remote_code.lowrank_model").LowRankMixin
    mixin.push_to_hub = _push_to_hub


def _push_to_hub(self: Any, repo_id: str, **options: Any) -> Any:
    """Publish this model; see `hf_lowrank.push_to_hub`.

    Args:
        options: Those of `hf_lowrank.push_to_hub`; and, as in the host, `tags` and `commit_description`.

    Returns:
        The commit.
    """
    return importlib.import_module("hf_lowrank.sharing.hub").push_model(self, repo_id, **options)


# `import hf_lowrank` must not import torch, and registering needs it: so each step waits for the module it registers
# with, which a user's first `AutoModel` or `AutoConfig` imports.
_WHEN_IMPORTED: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_configurations,
    "transformers.models.auto.modeling_auto": register_models,
    "hf_lowrank.remote_code.lowrank_model": register_push,
}


class _ThenRegister(Loader):
    """Loads a module as its own loader does, then runs one registration."""

    def __init__(self, loader: Loader, register: Callable[[], None]) -> None:
        self._loader = loader
        self._register = register

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._register()


class _Finder(MetaPathFinder):
    """Finds the modules of `_WHEN_IMPORTED` where the other finders do, with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _WHEN_IMPORTED:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, _WHEN_IMPORTED[fullname])
        return spec


def register_lazily() -> None:
    """Register the compressed families with the auto classes: now where those are loaded, else when they are."""
    for name, register in _WHEN_IMPORTED.items():
        if name in sys.modules:
            register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
