"""How much memory the tensors of one forward pass take."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_memory(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """The most bytes held at one time by weights, buffers and what a forward pass makes.

    Counted tensor by tensor, so that two models in one process do not disturb each other and every device is counted
    alike; the scratch space of single kernels is not seen.
    """
    own: set[torch.UntypedStorage] = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
    counter = LiveBytes()
    with torch.no_grad(), counter:
        model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    weights: int = sum(storage.nbytes() for storage in own)
    return weights + counter.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, from their making to their end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in filter(_is_tensor, tree_leaves(result)):
            storage = leaf.untyped_storage()
            if storage._cdata not in before and storage._cdata not in self._seen and not leaf.is_meta:
                self._watch(storage)
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)
