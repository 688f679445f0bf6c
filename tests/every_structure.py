"""A tiny model that holds every structure of the table at once, or some of them."""

from itertools import cycle

import torch
from tiny_architectures import ARCHITECTURES, build_architecture
from tiny_models import build
from torch import nn

from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.remote_code.configuration_lowrank import compressed_config_class
from hf_lowrank.remote_code.lowrank_table import SHARED_PARTS, STRUCTURES
from hf_lowrank.remote_code.modeling_lowrank import compressed_model_class

_SIZE = 3
MIXTURE = "MixtralForCausalLM"
# Those that a model without experts can hold.
OF_ANY_MODEL = tuple(name for name, structure in STRUCTURES.items() if structure.HOSTS != "experts")


def _spec(structure):
    name = next(key for key, value in {**STRUCTURES, **SHARED_PARTS}.items() if value is structure)
    return {"structure": name, **dict.fromkeys(structure.SIZES, _SIZE)}


def _plan(dense, names):
    """Each linear structure in turn over the matrices of the blocks; parts are shared by two matrices of one shape."""
    matrices = find_matrices(dense)
    structures = [STRUCTURES[name] for name in names]
    linear = cycle([structure for structure in structures if structure.HOSTS == "linear"])
    others = {structure.HOSTS: _spec(structure) for structure in structures if structure.HOSTS != "linear"}
    blocks = [matrix for matrix in matrices if matrix.role == "block"]
    plan = {"format_version": 1, "modules": {}, "shared": {}, "provenance": {}}
    while blocks:
        structure = next(linear)
        matrix = blocks.pop(0)
        spec = _spec(structure)
        if hasattr(structure, "SHARES"):
            part = f"shared_part_{len(plan['shared'])}"
            plan["shared"][part] = _spec(structure.SHARES)
            spec["shared"] = part
            twin = next((other for other in blocks if other.shape == matrix.shape), None)
            if twin is not None:
                blocks.remove(twin)
                plan["modules"][twin.name] = spec
        plan["modules"][matrix.name] = spec
    plan["modules"] |= {matrix.name: others[matrix.role] for matrix in matrices if matrix.role in others}
    return plan


def structures_with(name):
    """The structure, and one for the linear layers of the blocks where it stands elsewhere."""
    return (name,) if STRUCTURES[name].HOSTS == "linear" else ("low_rank", name)


def host_of(name, head):
    """The model to see a structure in: `head`, or one of experts where it needs them."""
    return head if name in OF_ANY_MODEL else MIXTURE


def build_every_structure(head, names=OF_ANY_MODEL, adjust_=lambda plan: None, **options):
    """A compressed model of every structure, or of those named, with random numbers, in evaluation mode.

    `adjust_` may change the plan; `options` are the configuration's.
    """
    dense = build_architecture(head) if head in ARCHITECTURES else build(head, **options)
    config = dense.config
    config.__class__ = compressed_config_class(type(config))
    config.compression = _plan(dense, names)
    adjust_(config.compression)
    torch.manual_seed(0)
    model = compressed_model_class(type(dense))(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model
