"""A tiny model that holds every structure of the table at once, or some of them."""

from itertools import cycle

import torch
from tiny_models import build
from torch import nn

from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.remote_code.configuration_lowrank import compressed_config_class
from hf_lowrank.remote_code.lowrank_table import SHARED_PARTS, STRUCTURES
from hf_lowrank.remote_code.modeling_lowrank import compressed_model_class

_SIZE = 3


def _spec(structure):
    name = next(key for key, value in {**STRUCTURES, **SHARED_PARTS}.items() if value is structure)
    return {"structure": name, **dict.fromkeys(structure.SIZES, _SIZE)}


def _plan(dense, names):
    """Each linear structure in turn over the matrices of the blocks; parts are shared by two matrices of one shape."""
    matrices = find_matrices(dense)
    structures = [STRUCTURES[name] for name in names]
    linear = cycle([structure for structure in structures if structure.HOSTS == "linear"])
    embedding = next((structure for structure in structures if structure.HOSTS == "embedding"), None)
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
    if embedding is not None:
        plan["modules"] |= {matrix.name: _spec(embedding) for matrix in matrices if matrix.role == "embedding"}
    return plan


def structures_with(name):
    """The structure, and one for the blocks where it stands at the embedding."""
    return (name,) if STRUCTURES[name].HOSTS == "linear" else ("low_rank", name)


def build_every_structure(head, names=tuple(STRUCTURES), adjust_=lambda plan: None, **options):
    """A compressed model of every structure, or of those named, with random numbers, in evaluation mode.

    `adjust_` may change the plan; `options` are the configuration's.
    """
    dense = build(head, **options)
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
