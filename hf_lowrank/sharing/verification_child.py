"""Loads a saved folder where hf_lowrank cannot be imported and writes down what comes out; run by path.

    python -I verification_child.py REQUEST.json

The request names the folder, the auto class (null for a head that has none), the inputs and where to put the answer.
"""

import ctypes
import json
import sys
from importlib.abc import MetaPathFinder
from typing import Any

LIBRARY = "hf_lowrank"
# Of Linux: namespaces of the network's interfaces, and of users, in which anyone may make the other.
_NEW_NETWORK, _NEW_USER = 0x40000000, 0x10000000
_CALLS_OUT = ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname")


class _Blocked(MetaPathFinder):
    """Makes the library impossible to import, wherever it is installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.partition(".")[0] == LIBRARY:
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)


def _leave_network() -> None:
    """Take this process off the network: into a namespace without one where the system lets it, and by refusal."""
    if sys.platform == "linux":
        leave = ctypes.CDLL(None).unshare
        if leave(_NEW_NETWORK) != 0:
            leave(_NEW_USER | _NEW_NETWORK)

    def refuse(event: str, arguments: Any) -> None:
        if event in _CALLS_OUT:
            raise PermissionError(f"{event} is refused: nothing in a folder that is verified may reach the network")

    sys.addaudithook(refuse)  # which nothing can take away again


def tensors_of(output: Any) -> dict[str, Any]:
    """Every tensor of a model's output by its place in it, as `save_file` wants them."""
    found: dict[str, Any] = {}
    for name, value in output.items():
        for index, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if hasattr(part, "detach"):
                found[f"{name}.{index}"] = part.detach().clone().contiguous()
    return found


def realigned(model: Any) -> Any:
    """The model with its weights moved to where tensors are made.

    In a mapped file they lie anywhere, and on some processors MKL rounds a product by the addresses of its operands.
    """
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()
    return model


def _loads_without_trust(auto_class: Any, folder: str) -> bool:
    try:
        auto_class.from_pretrained(folder, trust_remote_code=False)
    except Exception:
        return False
    return True


def _load(request: dict[str, Any]) -> tuple[Any, dict[str, Any], bool]:
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder = request["folder"]
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if request["auto_class"] is not None:
        source = trusting = getattr(transformers, request["auto_class"])
    else:
        source, trusting = transformers.AutoModel, get_class_from_dynamic_module(request["class_reference"], folder)
    loads_untrusted = _loads_without_trust(source, folder)
    model, info = trusting.from_pretrained(folder, trust_remote_code=True, dtype="auto", output_loading_info=True)
    return realigned(model.eval()), info, loads_untrusted


def main() -> None:
    """Answer one request."""
    with open(sys.argv[1], encoding="utf-8") as file:  # noqa: PTH123
        request = json.load(file)
    sys.meta_path.insert(0, _Blocked())
    _leave_network()
    sys.path += [path for path in request["packages"] if path not in sys.path]
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(request["num_threads"])
    answer: dict[str, Any] = {}
    try:
        model, info, loads_untrusted = _load(request)
        with torch.inference_mode():
            output = model(**load_file(request["inputs"]))
        save_file(tensors_of(output), request["outputs"])
        answer = {
            "class_name": type(model).__name__,
            "class_module": type(model).__module__,
            "missing_keys": sorted(info["missing_keys"]),
            "unexpected_keys": sorted(info["unexpected_keys"]),
            "loads_untrusted": loads_untrusted,
        }
    except Exception as error:
        answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    with open(request["answer"], "w", encoding="utf-8") as file:  # noqa: PTH123
        json.dump(answer, file)


if __name__ == "__main__":
    main()
