"""Every structure becomes a graph that runs elsewhere, at any number of tokens, and moves no numbers about in it."""

import warnings
from itertools import chain

import pytest
import torch
from every_structure import OF_ANY_MODEL, build_every_structure, structures_with
from torch import nn

from hf_lowrank.remote_code.lowrank_table import STRUCTURES

SHAPES = [(2, 8), (3, 11), (1, 5)]
SHAPE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
MOVES = ("scatter", "gather", "index", "embedding", "transpose", "permute", "unique", "numpy_T", "mT", "aten.t.")
# A dense table looks up once. One of codes looks up where a token is, then in each of its bands, or code and length;
# the outputs of a head, computed band after band, go to where they belong.
LOOK_UPS = {
    "low_rank_embedding": 1,
    "autoencoder_embedding": 4,
    "autoencoder_head": 1,
    "nonlinear_autoencoder_embedding": 2,
}


class Bare(nn.Module):
    """A model that takes token ids by place and gives logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids)).logits


def ids(shape):
    return torch.randint(0, 90, shape)


def traced(model, inputs):
    return torch.jit.trace(model, inputs)


def exported(model, inputs):
    return torch.export.export(model, (inputs,), dynamic_shapes=(SHAPE,), strict=False).module()


def assert_same_at_other_lengths(make, module, make_inputs, gradients):
    with warnings.catch_warnings(), torch.set_grad_enabled(gradients):
        warnings.simplefilter("ignore")  # of transformers and torch
        graph = make(module, make_inputs(SHAPES[0]))
    for shape in SHAPES:
        inputs = make_inputs(shape)
        with torch.no_grad():
            torch.testing.assert_close(graph(inputs), module(inputs), rtol=1e-4, atol=1e-5)


def test_the_trace_of_a_model_of_every_structure_takes_any_number_of_tokens():
    assert_same_at_other_lengths(traced, Bare(build_every_structure("BertForMaskedLM")).eval(), ids, gradients=True)


class Alone(nn.Module):
    """A layer with the part it shares with others."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.shared = getattr(layer, "shared", None)

    def forward(self, inputs):
        return self.layer(inputs)


def layer_of(structure):
    """A layer of that structure, alone, and what makes inputs of it."""
    model = build_every_structure("BertForMaskedLM", structures_with(structure))
    layer = next(module for module in model.modules() if type(module) is STRUCTURES[structure])
    is_table = STRUCTURES[structure].HOSTS == "embedding"
    return Alone(layer).eval(), ids if is_table else lambda shape: torch.randn(*shape, layer.in_features)


@pytest.mark.parametrize(("make", "gradients"), [(traced, False), (traced, True), (exported, True)])
@pytest.mark.parametrize("structure", OF_ANY_MODEL)
def test_its_graph_takes_any_number_of_tokens(structure, make, gradients):
    layer, make_inputs = layer_of(structure)

    assert_same_at_other_lengths(make, layer, make_inputs, gradients)


@pytest.mark.parametrize("structure", OF_ANY_MODEL)
def test_what_hangs_on_the_tokens_is_moved_about_as_in_a_dense_layer(structure):
    layer, make_inputs = layer_of(structure)
    program = torch.export.export(layer, (make_inputs(SHAPES[0]),), dynamic_shapes=(SHAPE,), strict=False)
    of_tokens, found = {*program.graph_signature.user_inputs}, []

    for node in program.graph.nodes:
        if of_tokens & {one.name for one in node.all_input_nodes}:
            of_tokens.add(node.name)
            found.append(str(node.target))

    moved = [name for name, move in chain.from_iterable(((n, m) for m in MOVES) for n in found) if move in name]
    assert len(moved) == LOOK_UPS.get(structure, 0)
