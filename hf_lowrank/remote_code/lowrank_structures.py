"""The one place where a plan becomes modules.

A structure is a module class with
    SIZES                          names of the whole numbers its spec holds
    OPTIONAL_SIZES                 names of those it holds where they are not the usual ones, if there are any
    HOSTS                          "linear", "embedding" or "experts": what it can replace
    like(dense, device, **sizes)   an instance of the shape and dtype of a dense module, its numbers still to come
    multiply_adds()                for one token
    to_dense()                     the weight it stands for, (O, I), or (E, O, I) of experts
    reset_parameters(std)          a random start whose weight has standard deviation `std`
It may have `OPTIONS`: fields its spec can hold besides, each with the words allowed, the default first.
One that stands by itself at a given rank, or in as many numbers, also counts these without the bias,
`num_weights(O, I, rank=R)`, and says up to which rank it can gain where that is not `min(O, I)`
(`largest_rank(O, I)`). A linear one also gives the bias it stands for (`dense_bias`). An embedding names the
linear structure of a head tied to it (`TIED_HEAD`, `tied_head_sizes`) and which of the head's parameters are which of
its own (`TIED_PARAMETERS`); that structure names where its bias lives (`BIAS`), and may take more than parameters from
the table (`follow_`). What stands at a token embedding or a head can be resized (`resize_`); if that changes what its
spec holds, `sizes` are those it has.

A structure may need a part that it shares with others, of the class it names (`SHARES`): its `like` then takes
`shared`. A shared part is a module class with `SIZES`, `like(dense_members, device, **sizes)`, `multiply_adds`,
`reset_parameters` and, for reports, `shape`. It stands in the model at a name of its own; what uses it refers to it
and does not register it, so that its parameters appear once in the state dict, where every wrapper finds them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .lowrank_dense import dense_experts, dense_kind, named_dense
from .lowrank_plan import Plan, PlanError, Spec, closest_name, members_of, sizes_of, validate_plan
from .lowrank_table import SHARED_PARTS, STRUCTURES


def structure_name(module: nn.Module) -> str | None:
    """The name `module`'s class has in `STRUCTURES`, or None for any other module."""
    return next((name for name, structure in STRUCTURES.items() if type(module) is structure), None)


def named_structures(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every structure in `model` with its module name, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if structure_name(module)]


def named_shared_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every shared part in `model` with its module name, in the model's order; also one a structure has to itself."""
    parts = tuple(SHARED_PARTS.values())
    return [(name, module) for name, module in model.named_modules() if type(module) in parts]


def is_bias(structure: nn.Module, name: str) -> bool:
    """Whether parameter `name` is of the bias of the layer a structure stands for; offsets of a decoder are not."""
    inside = any(name.startswith(f"{part}.") for part, _ in named_shared_parts(structure))
    return structure_name(structure) is not None and name.endswith("bias") and not inside


def build_structure(
    dense: nn.Module, spec: Spec, device: torch.device | str | None = None, shared: nn.Module | None = None
) -> nn.Module:
    """A structure that can stand where `dense` stands, its numbers still to come.

    Args:
        device: Where to build it; None is where `dense` is.
        shared: The part it shares, if it shares one.

    Raises:
        PlanError: If the structure cannot replace such a module, or a size is out of bounds.
    """
    structure = STRUCTURES[spec["structure"]]
    if dense_kind(dense) != structure.HOSTS:
        raise PlanError(f"{spec['structure']} replaces {structure.HOSTS} modules, got {type(dense).__name__}.")
    needed = getattr(structure, "SHARES", None)
    if needed is not None and not isinstance(shared, needed):
        raise PlanError(f"{spec['structure']} shares a {needed.__name__}, got {type(shared).__name__}.")
    parts = {} if needed is None else {"shared": shared}
    try:
        return structure.like(dense, device, **sizes_of(spec), **parts)
    except ValueError as error:
        raise PlanError(str(error)) from error


def build_shared_part(members: Sequence[nn.Module], spec: Spec, device: torch.device | str | None = None) -> nn.Module:
    """A part that structures in the places of the dense `members` can share, its numbers still to come.

    Raises:
        PlanError: If it does not fit them, or a size is out of bounds.
    """
    try:
        return SHARED_PARTS[spec["structure"]].like(members, device, **sizes_of(spec))
    except ValueError as error:
        raise PlanError(str(error)) from error


def install_plan_(model: Any, plan: Plan) -> None:
    """Put the plan's structures into a host model and make its tied weights point at their factors.

    Does nothing to a module that is a structure already, so it may run again.

    Raises:
        PlanError: Naming the module that does not exist or does not fit.
    """
    validate_plan(plan, STRUCTURES, SHARED_PARTS)
    base = model.base_model
    names = {name for name, _ in named_dense(base)}
    for name in plan["modules"]:
        if name not in names:
            raise PlanError(
                f"Plan names no module {name!r} of {type(base).__name__}. Closest: {closest_name(name, names)!r}. "
                "Names are relative to model.base_model."
            )
    for name, spec in (plan.get("shared") or {}).items():
        _install_shared_part_(base, name, spec, members_of(plan, name))
    for name, spec in plan["modules"].items():
        _install_(base, name, spec)
    _install_head_(model, plan)


def _install_shared_part_(base: nn.Module, name: str, spec: Spec, members: Sequence[str]) -> None:
    try:
        parent = base.get_submodule(name.rpartition(".")[0])
    except AttributeError as error:
        raise PlanError(f"{name}: the model has no such place for a shared part.") from error
    leaf = name.rpartition(".")[2]
    if type(getattr(parent, leaf, None)) in SHARED_PARTS.values():
        return
    if hasattr(parent, leaf):
        raise PlanError(f"{name}: the model has something else of that name.")
    try:
        part = build_shared_part([base.get_submodule(member) for member in members], spec)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from error
    parent.add_module(leaf, part.train(parent.training))


def _install_(root: nn.Module, name: str, spec: Spec) -> None:
    dense = dense_at(root, name)
    if structure_name(dense):
        return
    shared = root.get_submodule(spec["shared"]) if "shared" in spec else None
    try:
        structure = build_structure(dense, spec, shared=shared)
    except PlanError as error:
        raise PlanError(f"{name}: {error}") from error
    replace_(root, name, structure)


def dense_at(root: nn.Module, name: str) -> nn.Module:
    """What stands at a name that a plan may have: a module, or experts' matrices that are a parameter."""
    holder, leaf = _place(root, name)
    found: Any = getattr(holder, leaf)
    return dense_experts(holder)[leaf] if isinstance(found, nn.Parameter) else found


def replace_(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module`, of experts its parameter, where `name` is, in the training mode of what is there."""
    holder, leaf = _place(root, name)
    found: Any = getattr(holder, leaf)
    if isinstance(found, nn.Parameter):
        delattr(holder, leaf)
        found = holder
    module.train(found.training)
    setattr(holder, leaf, module.weight if dense_kind(module) == "experts" else module)
    # Some hosts' `_init_weights` reaches from the parent into the child's `weight`, which is gone. The children
    # initialize themselves; a parent without parameters or buffers of its own has nothing else to draw.
    if not [*holder.parameters(recurse=False), *holder.buffers(recurse=False)]:
        holder._is_hf_initialized = True  # type: ignore[assignment]  # the host's mark


def _place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf


def _install_head_(model: Any, plan: Plan) -> None:
    head_name = module_name(model, model.get_output_embeddings())
    embedding_name = module_name(model, token_table(model))
    if head_name is None or embedding_name is None:
        return
    embedding = model.get_submodule(embedding_name)
    is_tied = bool(getattr(model.config, "tie_word_embeddings", False))
    if is_tied and structure_name(embedding):
        spec = {"structure": embedding.TIED_HEAD, **embedding.tied_head_sizes}
        _install_(model, head_name, spec)
        head = model.get_submodule(head_name)
        if hasattr(head, "follow_"):
            head.follow_(embedding)
    elif not is_tied and plan.get("output_embeddings") is not None:
        _install_(model, head_name, plan["output_embeddings"])
    retie_(model)


def retie_(model: Any) -> None:
    """Name what is tied as it is now: the factors of a head that is a structure, where the host names its weight."""
    head_name = module_name(model, model.get_output_embeddings())
    embedding_name = module_name(model, token_table(model))
    if head_name is not None and embedding_name is not None and structure_name(model.get_submodule(head_name)):
        model._tied_weights_keys = tied_factor_keys(model, head_name, embedding_name)


def token_table(model: Any) -> nn.Module | None:
    """The token embedding; None where a host names none, as those of images and sounds."""
    try:
        table: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return table


def module_name(model: nn.Module, module: nn.Module | None) -> str | None:
    """The name of `module` in `model`, or None."""
    return next((name for name, candidate in model.named_modules() if candidate is module), None)


def tied_factor_keys(model: Any, head_name: str, embedding_name: str) -> dict[str, str]:
    """The host's `{target: source}` tied parameters, with the dense weight replaced by the factors it became."""
    head, embedding = model.get_submodule(head_name), model.get_submodule(embedding_name)
    keys = {}
    for target, source in (type(model)._tied_weights_keys or {}).items():
        if target == f"{head_name}.bias":
            keys[f"{head_name}.{head.BIAS}"] = source
        elif target != f"{head_name}.weight":
            keys[target] = source
        elif structure_name(embedding):
            for ours, theirs in embedding.TIED_PARAMETERS.items():
                keys[f"{head_name}.{ours}"] = f"{embedding_name}.{theirs}"
    return keys
