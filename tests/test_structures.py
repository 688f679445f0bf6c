"""The contract of every structure: a new one is tested by its row in `STRUCTURES`."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

from hf_lowrank.remote_code.lowrank_dense import DenseExperts, dense_shape
from hf_lowrank.remote_code.lowrank_plan import PlanError
from hf_lowrank.remote_code.lowrank_structures import build_shared_part, build_structure, structure_name
from hf_lowrank.remote_code.lowrank_table import SHARED_PARTS, STRUCTURES

SIZE = 4
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}
LINEARS = [name for name, structure in STRUCTURES.items() if structure.HOSTS == "linear"]
EMBEDDINGS = [name for name, structure in STRUCTURES.items() if structure.HOSTS == "embedding"]
each_structure = pytest.mark.parametrize("name", STRUCTURES)
each_linear = pytest.mark.parametrize("name", LINEARS)
each_embedding = pytest.mark.parametrize("name", EMBEDDINGS)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def dense_linear(bias=True, **kind):
    return nn.Linear(13, 9, bias=bias, **kind)


def dense_conv1d(bias=True, **kind):
    module = Conv1D(9, 13).to(**kind)
    if not bias:
        module.bias = None
    return module


def dense_embedding(padding_idx=None, **kind):
    return nn.Embedding(17, 11, padding_idx, **kind)


def dense_experts(shape=(3, 9, 13), num_active=2, **kind):
    return DenseExperts(nn.Parameter(torch.randn(shape, **kind)), False, num_active)


HOSTS = {"linear": dense_linear, "embedding": dense_embedding, "experts": dense_experts}


def sizes_of(structure, size=SIZE):
    return dict.fromkeys(structure.SIZES, size)


def build(name, dense, size=SIZE, device=None):
    """A structure in the place of `dense`, with the part it shares if it shares one."""
    needed = getattr(STRUCTURES[name], "SHARES", None)
    shared = None
    if needed is not None:
        part = next(key for key, kind in SHARED_PARTS.items() if kind is needed)
        shared = build_shared_part([dense], {"structure": part, **sizes_of(needed, size)}, device)
    return build_structure(dense, {"structure": name, **sizes_of(STRUCTURES[name], size)}, device, shared)


def whole(structure):
    """The structure and what it shares, as one module with all parameters."""
    return nn.ModuleList([structure, *([structure.shared] if hasattr(structure, "SHARES") else [])])


def dense_for(name, **kind):
    return HOSTS[STRUCTURES[name].HOSTS](**kind)


def drawn(name, dense=None, **kind):
    """A structure in evaluation mode with random numbers everywhere."""
    structure = build(name, dense_for(name, **kind) if dense is None else dense).eval()
    for part in whole(structure):
        part.reset_parameters(std=1.0)
    for name, parameter in structure.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return structure


def bias_of(structure):
    return structure.dense_bias() if structure.HOSTS == "linear" else None


def inputs_of(structure):
    if structure.HOSTS == "embedding":
        return torch.arange(structure.num_embeddings).reshape(1, -1)
    tokens = structure.num_active if structure.HOSTS == "experts" else 2
    return torch.randn(tokens, 3, structure.in_features, dtype=next(structure.parameters()).dtype)


def call(structure, inputs):
    """What a host gets of a structure; of experts, of each of the first ones for some tokens of its own."""
    if structure.HOSTS != "experts":
        return structure(inputs)
    return torch.stack([F.linear(rows, structure[index]) for index, rows in enumerate(inputs)])


def dense_forward(structure, inputs):
    weight = structure.to_dense()
    if structure.HOSTS == "experts":
        return inputs @ weight[: len(inputs)].mT
    if structure.HOSTS == "embedding":
        return F.embedding(inputs, weight)
    return F.linear(inputs, weight, bias_of(structure))


@each_dtype
@each_structure
def test_forward_equals_the_dense_layer_of_its_weight(name, dtype):
    structure = drawn(name, dtype=dtype)
    inputs = inputs_of(structure)

    with torch.no_grad():
        found, expected = call(structure, inputs), dense_forward(structure, inputs)

    assert found.shape == expected.shape
    assert torch.allclose(
        found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * float(expected.abs().max())
    )


@each_dtype
@each_structure
def test_shape_dtype_and_device_are_those_of_the_dense_module(name, dtype):
    dense = dense_for(name, dtype=dtype)

    structure = build(name, dense)

    assert structure.to_dense().shape[-2:] == dense_shape(dense)
    assert {p.dtype for p in whole(structure).parameters()} == {structure.to_dense().dtype} == {dtype}
    assert {p.device for p in whole(structure).parameters()} == {dense.weight.device}


@pytest.mark.parametrize("name", [name for name, structure in STRUCTURES.items() if hasattr(structure, "num_weights")])
def test_parameter_count_equals_the_formula(name):
    structure = drawn(name)
    shape = tuple(structure.to_dense().shape)

    stored = sum(p.numel() for p in structure.parameters())
    bias = bias_of(structure).numel() if bias_of(structure) is not None else 0

    count = math.prod(shape[:-2])
    assert stored - bias == count * STRUCTURES[name].num_weights(*shape[-2:], **sizes_of(structure))


@each_structure
def test_multiply_adds_are_those_of_its_matrix_products(name):
    structure = drawn(name)
    inputs, num_tokens = torch.tensor([1]), 1
    if structure.HOSTS != "embedding":
        num_tokens = 8 * 128
        inputs = torch.randn(num_tokens, structure.in_features)
    if structure.HOSTS == "experts":
        inputs = inputs.expand(structure.num_active, -1, -1)

    with torch.no_grad():
        call(structure, inputs)  # forms what no token changes
        with FlopCounterMode(display=False) as counter:
            call(structure, inputs)

    found = counter.get_total_flops() // 2 // num_tokens  # rounded down: a call may decode once for all its tokens
    assert found == sum(part.multiply_adds() for part in whole(structure))


@each_structure
def test_state_dict_round_trip_keeps_every_bit(name):
    first, second = drawn(name), drawn(name)
    inputs = inputs_of(first)

    whole(second).load_state_dict(whole(first).state_dict(), strict=True)

    assert torch.equal(call(first, inputs), call(second, inputs))


@each_structure
def test_a_deep_copy_is_the_same_function_of_its_own_numbers(name):
    structure = drawn(name)
    inputs = inputs_of(structure)
    expected = call(structure, inputs)

    clone = copy.deepcopy(structure)

    assert torch.equal(expected, call(clone, inputs))
    ours, theirs = ({p.data_ptr() for p in whole(one).parameters()} for one in (structure, clone))
    assert not ours & theirs


@each_structure
def test_it_is_built_on_meta_with_the_same_shapes(name):
    real, meta = whole(drawn(name)), whole(build(name, dense_for(name, device="meta")))
    asked = whole(build(name, dense_for(name), device="meta"))

    assert {t.device.type for t in [*meta.parameters(), *meta.buffers(), *asked.parameters()]} == {"meta"}
    shapes = {key: value.shape for key, value in real.state_dict().items()}
    assert {key: value.shape for key, value in meta.state_dict().items()} == shapes


@each_structure
def test_gradient_reaches_every_parameter(name):
    structure = drawn(name)

    call(structure, inputs_of(structure)).square().sum().backward()

    assert all(p.grad is not None and bool(p.grad.any()) for p in whole(structure).parameters())


@each_structure
def test_repr_tells_the_shape_and_every_size(name):
    structure = drawn(name)

    text = structure.extra_repr()

    assert all(str(size) in text for size in structure.to_dense().shape)
    assert all(f"{key}={value}" in text for key, value in sizes_of(structure).items())


@pytest.mark.parametrize("bad", [0, -1, 1000])
@each_structure
def test_a_size_out_of_bounds_is_named_with_its_bounds(name, bad):
    with pytest.raises(PlanError, match=rf"\w+ must be between 1 and \d+ .*got {bad}\."):
        build(name, dense_for(name), bad)


@each_structure
def test_a_module_of_the_wrong_kind_is_named(name):
    wrong = dense_linear() if STRUCTURES[name].HOSTS == "embedding" else dense_embedding()

    with pytest.raises(PlanError, match=rf"{name} replaces {STRUCTURES[name].HOSTS} modules, got \w+\."):
        build_structure(wrong, {"structure": name, **sizes_of(STRUCTURES[name])})


@each_structure
def test_a_random_start_has_the_standard_deviation_asked_for(name):
    hosts = {
        "linear": nn.Linear(200, 300),
        "embedding": nn.Embedding(300, 200),
        "experts": dense_experts((2, 300, 200)),
    }
    structure = build(name, hosts[STRUCTURES[name].HOSTS], 20)

    for part in whole(structure):
        part.reset_parameters(std=0.02)

    assert structure.to_dense().std().item() == pytest.approx(0.02, rel=0.15)
    assert bias_of(structure) is None or not bias_of(structure).any()


@each_structure
def test_the_table_names_exactly_its_own_classes(name):
    assert structure_name(drawn(name)) == name
    assert structure_name(dense_for(name)) is None


@pytest.mark.parametrize("bias", [True, False])
@each_linear
def test_conv1d_and_the_turned_linear_make_the_same_layer(name, bias):
    linear, turned = drawn(name, dense_linear(bias)), drawn(name, dense_conv1d(bias))
    inputs = inputs_of(linear)

    whole(turned).load_state_dict(whole(linear).state_dict(), strict=True)

    assert (bias_of(linear) is not None) == bias
    assert torch.equal(turned(inputs), linear(inputs))


@pytest.mark.parametrize("change", [-5, 0, 6])
@pytest.mark.parametrize("name", [name for name, structure in STRUCTURES.items() if hasattr(structure, "resize_")])
def test_resizing_keeps_rows_and_adds_their_mean(name, change):
    structure = drawn(name, dtype=torch.float64)
    before, inputs = structure.to_dense().detach(), inputs_of(structure)
    size, kept = len(before) + change, min(len(before) + change, len(before))
    expected = torch.cat([before[:kept], before.mean(0).expand(size - kept, -1)])

    structure.resize_(size)
    inputs = torch.arange(size) if structure.HOSTS == "embedding" else inputs

    assert torch.allclose(structure.to_dense(), expected)
    assert torch.allclose(structure(inputs), dense_forward(structure, inputs))
    assert str(size) in structure.extra_repr()


@each_embedding
def test_the_padding_row_starts_at_zero_and_gets_no_gradient(name):
    structure = drawn(name, dense_embedding(padding_idx=3))
    before = structure(torch.tensor([3]))

    structure(torch.tensor([3, 3])).sum().backward()

    assert not before.any()
    assert not any(p.grad is not None and bool(p.grad.any()) for p in structure.parameters())


@each_embedding
def test_a_tied_head_of_shared_parameters_is_the_dense_tied_head(name):
    table = drawn(name, dtype=torch.float64)
    host = nn.Linear(table.embedding_dim, table.num_embeddings, bias=False, dtype=torch.float64)
    head = build_structure(host, {"structure": table.TIED_HEAD, **table.tied_head_sizes})
    state = {ours: table.state_dict()[theirs] for ours, theirs in table.TIED_PARAMETERS.items()}

    if hasattr(head, "follow_"):
        head.follow_(table)

    head.load_state_dict(state, strict=True)

    assert torch.allclose(head.to_dense(), table.to_dense())
