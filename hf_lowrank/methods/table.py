"""Every method by its name, and how one comes in from outside. Importing this imports no torch and no method.

A method of another package is a `MethodRow` that its distribution names as an entry point, under the method's name:

    [project.entry-points."hf_lowrank.methods"]
    my_method = "my_package:ROW"

Then Python and the command line know it like those below. `register_method` does the same for one process.
"""

import importlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from hf_lowrank.errors import InputError
from hf_lowrank.methods import papers
from hf_lowrank.methods.papers import Paper
from hf_lowrank.options import checked
from hf_lowrank.remote_code.lowrank_plan import closest_name

ENTRY_POINTS = "hf_lowrank.methods"

# What an option of `compress` that only some methods take is `of`: all these methods, or those it names.
OF_MATRICES, OF_TENSORS = "single matrices", "matrices of all layers"


@dataclass(frozen=True, kw_only=True)
class MethodRow:
    """What there is to say of a method before it is imported.

    Args:
        home: Where it is, as `module:name`: an object with what `Method` asks for.
        summary: What it does, in one line.
        takes: Which options it takes beside those that go with any: those of `OF_MATRICES` or of `OF_TENSORS`.
        paper: What to cite.
        ranks: Its ranks where the name says them: then it takes no budget.
        learning_rate: Peak at which `recover` trains what it makes; None is that of any.
        is_recommended: Whether it is for use; else it is to compare with.
        also: What papers call it: it is known by these names too.
    """

    home: str
    summary: str
    takes: str
    paper: Paper | None = None
    ranks: tuple[int, ...] | None = None
    learning_rate: float | None = None
    is_recommended: bool = False
    also: tuple[str, ...] = ()

    @property
    def method(self) -> Any:
        """The method itself; see `Method`."""
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(module), name)


def _matrix(home: str, summary: str, paper: Paper, is_recommended: bool = False, also: Any = ()) -> MethodRow:
    more: Any = {"is_recommended": is_recommended, "also": also}
    home = f"hf_lowrank.methods.matrix.{home}"
    return MethodRow(home=home, summary=summary, takes=OF_MATRICES, paper=paper, **more)


def _tucker(name: str, summary: str, ranks: tuple[int, ...] | None = None, is_recommended: bool = False) -> MethodRow:
    home = f"hf_lowrank.methods.tucker.method:{name}"
    # Factors that all layers share learn alike from 3e-4 to 1e-3.
    more: Any = {"ranks": ranks, "learning_rate": 5e-4, "is_recommended": is_recommended}
    return MethodRow(home=home, summary=summary, takes=OF_TENSORS, paper=papers.REN, **more)


def _tensor(home: str, summary: str, paper: Paper, is_recommended: bool = False) -> MethodRow:
    home = f"hf_lowrank.methods.{home}"
    return MethodRow(home=home, summary=summary, takes=OF_TENSORS, paper=paper, is_recommended=is_recommended)


# `tucker-III-d` and `tucker-IV-l-d` are the models of Ren et al. (ICLR 2022): l matrices in the bank, d wide.
METHODS: dict[str, MethodRow] = {
    "two_sided_svd": _matrix(
        "data_aware_svd:TWO_SIDED_SVD",
        "inputs and gradients of every matrix, on text",
        papers.LEMS,
        True,
        ("KFAC-SVD",),
    ),
    "whitened_svd": _matrix(
        "data_aware_svd:WHITENED_SVD", "inputs of every matrix, on text", papers.SVD_LLM, True, ("SVD-LLM", "DRONE")
    ),
    "svd": _matrix("method:PLAIN_SVD", "the weights alone, in seconds", papers.ECKART_YOUNG, True),
    "weighted_svd": _matrix(
        "data_aware_svd:WEIGHTED_SVD", "Fisher information of the rows", papers.FWSVD, also=("FWSVD",)
    ),
    "element_weighted_svd": _matrix(
        "element_weighted_svd:ELEMENT_WEIGHTED_SVD",
        "Fisher information of every entry",
        papers.TFWSVD,
        also=("TFWSVD",),
    ),
    "sparsity_aware_svd": _matrix(
        "sparsity_aware_svd:SPARSITY_AWARE_SVD", "what pruning left of every row", papers.LPAF
    ),
    "importance_aware_svd": _matrix(
        "sparsity_aware_svd:IMPORTANCE_AWARE_SVD", "the importance of what pruning left of every row", papers.LPAF
    ),
    "tucker": _tucker("TUCKER", "the matrices of all layers together", is_recommended=True),
    "whitened_tucker": _tucker("WHITENED_TUCKER", "the same, in the metric of their inputs", is_recommended=True),
    "tensor_train": _tensor("trains.method:TENSOR_TRAIN", "three cores for every matrix", papers.OSELEDETS),
    "whitened_tensor_train": _tensor(
        "trains.method:WHITENED_TENSOR_TRAIN", "the same, in the metric of its inputs", papers.OSELEDETS
    ),
    "shared_tensor_train": _tensor(
        "trains.method:SHARED_TENSOR_TRAIN", "one central core for the same matrix of all layers", papers.SHARED_TRAIN
    ),
    "kronecker_sum": _tensor("kronecker:KRONECKER_SUM", "Kronecker products for every matrix", papers.KRONECKER),
    "autoencoder": _tensor(
        "rows.method:AUTOENCODER", "one decoder for the same matrix of all layers", papers.BANAEI, True
    ),
    "separated_autoencoder": _tensor("rows.method:SEPARATED_AUTOENCODER", "a decoder for every matrix", papers.BANAEI),
    "offline_autoencoder": _tensor(
        "rows.method:OFFLINE_AUTOENCODER", "directions of the rows, without text", papers.BANAEI
    ),
    "separated_offline_autoencoder": _tensor(
        "rows.method:SEPARATED_OFFLINE_AUTOENCODER", "the same, a decoder for every matrix", papers.BANAEI
    ),
    "fisher_autoencoder": _tensor("rows.method:FISHER_AUTOENCODER", "Fisher information of the rows", papers.BANAEI),
    "nonlinear_autoencoder": _tensor(
        "rows.nonlinear_method:NONLINEAR_AUTOENCODER", "the published, trained decoders", papers.BANAEI
    ),
    "separated_nonlinear_autoencoder": _tensor(
        "rows.nonlinear_method:SEPARATED_NONLINEAR_AUTOENCODER", "the same, one for every matrix", papers.BANAEI
    ),
    "tucker-III-64": _tucker("TUCKER", "Ren et al.: factors in common", (64, 64)),
    "tucker-III-384": _tucker("TUCKER", "Ren et al.: factors in common", (384, 384)),
    "tucker-IV-72-384": _tucker("TUCKER", "Ren et al.: a bank in common", (72, 384, 384)),
    "tucker-IV-36-256": _tucker("TUCKER", "Ren et al.: a bank in common", (36, 256, 256)),
    "tucker-IV-36-128": _tucker("TUCKER", "Ren et al.: a bank in common", (36, 128, 128)),
}


class _Names(Collection[str]):
    """The names of all methods as they are now, those of other packages last."""

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*METHODS, *(entry.name for entry in _from_outside())]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __bool__(self) -> bool:
        return True  # without asking what is installed, which takes milliseconds

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (method_name(name) in METHODS or name in list(iter(self)))


METHOD_NAMES = _Names()


def method_name(name: str) -> str:
    """The name in `METHODS` of what is called so there or in a paper, in any case and with any dashes; else `name`."""
    called = {_plain(one): key for key, row in METHODS.items() for one in (key, *row.also)}
    return name if name in METHODS else called.get(_plain(name), name)


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


@checked
def register_method(name: str, row: MethodRow) -> None:
    """Add a method to `METHODS`, for this process: `compress(model, method=name, ...)` then knows it.

    Raises:
        InputError: If there is one of that name, or `row` is no `MethodRow`.
    """
    if name in METHOD_NAMES:
        raise InputError(f"There is a method {name!r} already. Take another name.")
    METHODS[name] = _checked(name, row)


def find_method(name: str) -> MethodRow:
    """The row of a method.

    Raises:
        InputError: If there is none of that name, naming the closest.
    """
    row = known_method(name)
    if row is None:
        closest = closest_name(name, METHOD_NAMES)
        raise InputError(f"method must be one of {', '.join(METHOD_NAMES)}, got {name!r}. Closest: {closest!r}.")
    return row


def known_method(name: str) -> MethodRow | None:
    """The row of a method; None if there is none of that name, as where a model was made with another package."""
    if name in METHODS:
        return METHODS[name]
    return next((_checked(name, entry.load()) for entry in _from_outside() if entry.name == name), None)


def paper_of(name: str) -> Paper | None:
    """The paper of a method; None if it is not known, or has none."""
    beside = {"lpaf": papers.LPAF, "rounding": papers.GPTQ}  # what is no method of single matrices or tensors
    row = known_method(name)
    return beside.get(name, None if row is None else row.paper)


def _from_outside() -> Iterable[Any]:
    return entry_points(group=ENTRY_POINTS)


def _checked(name: str, row: Any) -> MethodRow:
    if not isinstance(row, MethodRow):
        raise InputError(f"The method {name!r} must be a MethodRow, got {type(row).__name__}.")
    return row
