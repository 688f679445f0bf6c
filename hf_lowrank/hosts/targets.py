"""The dense matrices of a model that can be compressed, and choosing among them by name."""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import regex
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import DenseMatrix, ExpertMatrices, JointMatrix
from hf_lowrank.remote_code.lowrank_dense import DENSE_LINEARS, dense_kind, dense_shape, named_dense
from hf_lowrank.remote_code.lowrank_plan import closest_name
from hf_lowrank.remote_code.lowrank_structures import module_name, named_structures, token_table

OUTPUT_EMBEDDINGS = "output_embeddings"
ALL_LINEAR = "all-linear"
READ_ELSEWHERE = "the model computes with its weight outside of its layer"
# Of what stands in the blocks.
BLOCK_ROLES = frozenset({"block", "experts"})
_MATCHING_SECONDS = 1.0  # of one name; re itself has no limit, and some patterns need years

Patterns = str | Sequence[str]


@dataclass(frozen=True)
class Targets:
    """Which matrices are to be replaced.

    Args:
        roles: Of the matrices where `target_modules` does not say.
        target_modules: As in PEFT; see `select_matrices`.
        exclude_modules: The same, taken away again.
        rank_pattern: Rank by name or last part of it, of matrices outside the budget's sharing.
        group: Of the matrices that a tensor method takes; see `hf_lowrank.methods.stacking.GROUPS`.
    """

    roles: frozenset[str] = BLOCK_ROLES
    target_modules: Patterns | None = None
    exclude_modules: Patterns | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    group: str = "both"


def find_matrices(model: PreTrainedModel) -> list[DenseMatrix]:
    """Every matrix of `model` that can be replaced: linear layers and experts of blocks, token embedding, untied head.

    Raises:
        InputError: If the model is compressed already, or has no such matrices.
    """
    if named_structures(model):
        raise InputError(f"{type(model).__name__} is compressed already. Decompress it first, or start from its base.")
    base = model.base_model
    prefix = "" if base is model else f"{module_name(model, base)}."
    found: list[DenseMatrix] = []
    for place, module in named_dense(base):
        about = place, prefix + place
        if not is_in_block(place):
            continue
        if computes_as_linear(module):
            found.append(DenseMatrix(*about, "block", module, dense_shape(module)))
        elif dense_kind(module) == "experts":
            experts = base.get_submodule(place.rpartition(".")[0])
            found.append(ExpertMatrices(*about, "experts", module, dense_shape(module), experts))
    if not found:
        others = {type(m).__name__ for m in base.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))}
        raise InputError(
            f"{type(model).__name__} has no blocks of nn.Linear or Conv1D layers to compress, only "
            f"{', '.join(sorted(others)) or 'vectors'}. Supported is every transformers model that has: BERT, GPT-2, "
            "RoBERTa, DistilBERT, Llama and their like."
        )
    embedding, head = token_table(model), model.get_output_embeddings()
    name = module_name(base, embedding)
    if embedding is not None and name is not None and _is_replaceable(model, embedding, head):
        found.append(DenseMatrix(name, prefix + name, "embedding", embedding, dense_shape(embedding)))
    if head is not None and dense_kind(head) == "linear" and not is_tied(model):
        path = module_name(model, head) or OUTPUT_EMBEDDINGS
        found.append(DenseMatrix(OUTPUT_EMBEDDINGS, path, "head", head, dense_shape(head)))
    return found


def is_in_block(name: str) -> bool:
    """Whether a module or parameter is inside a repeated block: its name has a number in it."""
    return any(part.isdigit() for part in name.split("."))


@torch.no_grad()
def computes_as_linear(module: Any) -> bool:
    """Whether a module is a linear layer: a subclass is where it gives what `nn.Linear` gives."""
    if dense_kind(module) != "linear" or type(module) in DENSE_LINEARS or type(module).forward is nn.Linear.forward:
        return dense_kind(module) == "linear"
    inputs = torch.ones(2, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    inputs[1] = torch.linspace(-1, 1, module.in_features)
    try:
        found = module.forward(inputs)
        return bool(torch.allclose(found, F.linear(inputs, module.weight, module.bias), rtol=1e-3, atol=1e-5))
    except Exception:  # it takes other inputs, gives more than one output, or is not in memory
        return False


def _is_replaceable(model: PreTrainedModel, embedding: nn.Module, head: nn.Module | None) -> bool:
    """Whether a token table is one, and nothing besides a head that is tied to it computes with its weight."""
    if dense_kind(embedding) != "embedding":
        return False
    users = [module for module in model.modules() if getattr(module, "weight", None) is embedding.weight]
    is_head_among = head is not None and any(user is head for user in users)
    return len(users) == 1 + is_head_among and (head is None or is_head_among == is_tied(model))


def joint_matrices(matrices: Sequence[DenseMatrix], inputs: Mapping[str, str]) -> list[JointMatrix]:
    """Those of the matrices that read the same input, together.

    Args:
        inputs: Matrix name -> a name that all matrices of one input have in common; see `Statistics.inputs`.
    """
    groups: dict[str, list[DenseMatrix]] = {}
    for matrix in matrices:
        if matrix.role == "block":
            groups.setdefault(inputs.get(matrix.name, matrix.name), []).append(matrix)
    found: list[JointMatrix] = []
    for members in groups.values():
        if len(members) > 1:
            columns = zip(*(member.name.split(".")[:-1] for member in members), strict=False)
            parent = ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, columns))
            leaf = "joint_" + "_".join(member.name[len(parent) :].replace(".", "_").strip("_") for member in members)
            name = f"{parent}.{leaf}" if parent else leaf
            prefix = members[0].path.removesuffix(members[0].name)
            found.append(JointMatrix(name, prefix + name, tuple(members)))
    return found


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the language-model head, if there is one, shares the table of the token embedding."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


def candidate_matrices(
    every: Sequence[DenseMatrix], targets: Targets, read: AbstractSet[str] = frozenset()
) -> list[DenseMatrix]:
    """The matrices the targets speak of: those to share the budget, and those whose rank is given by name.

    Args:
        every: Those of `find_matrices`.
        read: Paths of those that cannot be replaced; see `hf_lowrank.hosts.rehearsal.Rehearsal`.

    Raises:
        InputError: If nothing matches, or nothing that can be replaced.
    """
    chosen = select_matrices(every, targets.roles, targets.target_modules, targets.exclude_modules)
    named = [m for pattern in targets.rank_pattern for m in matching(every, [pattern], "rank_pattern")]
    wanted = [matrix for matrix in every if matrix in chosen or matrix in named]
    found = [matrix for matrix in wanted if matrix.path not in read]
    if not found:
        raise InputError(f"{wanted[0].name!r} cannot be replaced: {READ_ELSEWHERE}. Let others be compressed.")
    return found


def select_matrices(
    matrices: Iterable[DenseMatrix],
    roles: AbstractSet[str],
    target_modules: Patterns | None,
    exclude_modules: Patterns | None,
) -> list[DenseMatrix]:
    """The matrices that `target_modules` names, or those of the given roles, less `exclude_modules`.

    Patterns mean what they mean in PEFT: a list holds full names or their last parts, a string is a regular
    expression for the full name, and `"all-linear"` is every linear layer of the blocks.

    Raises:
        InputError: If a pattern matches nothing, or nothing is left.
    """
    matrices = list(matrices)
    if target_modules == ALL_LINEAR:
        chosen = [matrix for matrix in matrices if matrix.role in BLOCK_ROLES]
    elif target_modules is not None:
        chosen = matching(matrices, target_modules, "target_modules")
    else:
        chosen = [matrix for matrix in matrices if matrix.role in roles]
    if exclude_modules is not None:
        excluded = matching(matrices, exclude_modules, "exclude_modules")
        chosen = [matrix for matrix in chosen if matrix not in excluded]
    if not chosen:
        raise InputError("exclude_modules leaves nothing to compress. Exclude less.")
    return chosen


def matching(matrices: Sequence[DenseMatrix], patterns: Patterns, option: str) -> list[DenseMatrix]:
    """The matrices any of the patterns matches; every pattern must match at least one."""
    found: list[DenseMatrix] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        one = patterns if isinstance(patterns, str) else [pattern]
        hits = [matrix for matrix in matrices if is_named(one, matrix.name, matrix.path)]
        if not hits:
            names = {matrix.name for matrix in matrices}
            raise InputError(
                f"{option} {pattern!r} matches none of the {len(names)} matrices that can be compressed. "
                f"Closest: {closest_name(pattern, names)!r}."
            )
        found += [matrix for matrix in hits if matrix not in found]
    return found


def is_named(patterns: Patterns, *names: str) -> bool:
    """Whether a regular expression, or one of a list of names and last parts of them, is for one of these names."""
    if not isinstance(patterns, str):
        return any(name == pattern or name.endswith(f".{pattern}") for name in names for pattern in patterns)
    try:
        return any(regex.fullmatch(patterns, name, timeout=_MATCHING_SECONDS) for name in names)
    except regex.error as error:
        raise InputError(f"{patterns!r} is not a regular expression: {error}.") from error
    except TimeoutError as error:
        raise InputError(
            f"{patterns!r} takes too long to match {names[0]!r}. Write it without nested * or +."
        ) from error
