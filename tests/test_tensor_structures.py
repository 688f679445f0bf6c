"""Structures that share a tensor: every route gives the dense product, and products that are kept are never stale."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_lowrank.remote_code.lowrank_kronecker import KroneckerLinear
from hf_lowrank.remote_code.lowrank_plan import PlanError, validate_plan
from hf_lowrank.remote_code.lowrank_table import SHARED_PARTS, STRUCTURES
from hf_lowrank.remote_code.lowrank_tensor_train import CentralCore, SharedTensorTrainLinear, TensorTrainLinear
from hf_lowrank.remote_code.lowrank_tucker import BankedTuckerLinear, TuckerLinear
from hf_lowrank.remote_code.lowrank_tucker_factors import TuckerBank, TuckerBasis

KIND = {"dtype": torch.float64}
SHAPES = [(8, 8), (32, 8), (8, 32), (19, 8), (8, 19), (24, 8), (5, 8), (11, 21)]


def tucker(shape, ranks=(3, 2), bank=None, side="left", width=8):
    if bank is None:
        layer = TuckerLinear(shape[1], shape[0], TuckerBasis(width, *ranks, **KIND), side, **KIND)
    else:
        layer = BankedTuckerLinear(shape[1], shape[0], TuckerBank(width, *ranks, bank, **KIND), side, **KIND)
    return drawn(layer)


def train(shape, ranks=(3, 2), shared=False):
    if shared:
        core = CentralCore(shape[1], shape[0], *ranks, **KIND)
        return drawn(SharedTensorTrainLinear(shape[1], shape[0], core, **KIND))
    return drawn(TensorTrainLinear(shape[1], shape[0], *ranks, **KIND))


def kronecker(shape, rank=3):
    return drawn(KroneckerLinear(shape[1], shape[0], rank, **KIND))


def drawn(layer):
    torch.manual_seed(0)
    for part in [layer, *([layer.shared] if hasattr(layer, "SHARES") else [])]:
        part.reset_parameters(std=1.0)
    nn.init.normal_(layer.bias)
    return layer.eval()


def layers():
    shape = (19, 8)
    return {
        "tucker": tucker(shape),
        "banked": tucker(shape, bank=3, side="right"),
        "train": train(shape),
        "shared train": train(shape, shared=True),
        "kronecker sum": kronecker(shape),
    }


each_layer = pytest.mark.parametrize("name", layers())


def expected(layer, inputs):
    return F.linear(inputs, layer.to_dense(), layer.bias)


def assert_equal(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-10)


def force(layer, route):
    layer._routes = {route: layer._routes[route]}


@pytest.mark.parametrize("route", ["separate", "output", "input"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bank", [None, 1, 5])
@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (8, 8), (2, 7)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_route_of_tucker_is_the_dense_product(shape, ranks, bank, side, route):
    layer = tucker(shape, ranks, bank, side)
    force(layer, route)
    inputs = torch.randn(2, 3, shape[1], **KIND)

    assert_equal(layer(inputs), expected(layer, inputs))
    with torch.no_grad():  # products are kept
        assert_equal(layer(inputs), expected(layer, inputs))


@pytest.mark.parametrize("route", ["dense", "forward", "backward"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("ranks", [(1, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (19, 8), (11, 21), (36, 70)])
def test_every_route_of_a_train_is_the_dense_product(shape, ranks, shared, route):
    layer = train(shape, ranks, shared)
    force(layer, route)
    inputs = torch.randn(2, 3, shape[1], **KIND)

    assert_equal(layer(inputs), expected(layer, inputs))


@pytest.mark.parametrize("route", ["dense", "left", "right"])
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (19, 8), (11, 21), (36, 70)])
def test_every_route_of_a_kronecker_sum_is_the_dense_product(shape, rank, route):
    layer = kronecker(shape, rank)
    force(layer, route)
    inputs = torch.randn(2, 3, shape[1], **KIND)

    assert_equal(layer(inputs), expected(layer, inputs))


def test_a_kronecker_sum_of_no_tokens_is_nothing():
    assert kronecker((36, 70))(torch.empty(2, 0, 70, **KIND)).shape == (2, 0, 36)


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (36, 70)])
def test_the_weight_of_a_kronecker_sum_is_the_sum_of_kronecker_products(shape):
    layer = kronecker(shape)

    assert_equal(layer.to_dense(), sum(torch.kron(*pair) for pair in zip(layer.left, layer.right, strict=True)))


@pytest.mark.parametrize(("rank", "cheapest"), [(1, "right"), (6, "dense")])
def test_only_few_kronecker_products_are_cheaper_than_their_sum(rank, cheapest):
    layer = kronecker((36, 72), rank)

    assert min(layer._routes, key=lambda route: layer._routes[route][0]) == cheapest


@each_layer
def test_the_route_is_the_cheapest_for_the_call(name):
    layer = layers()[name]
    layer.bias = None
    for num_tokens in (1, 100):
        inputs = torch.randn(num_tokens, layer.in_features, **KIND)
        least = min(num_tokens * token + once for token, once in layer._costs().values())
        with FlopCounterMode(display=False) as counter:  # with gradients nothing is kept, and what is formed counts
            layer(inputs)
        assert counter.get_total_flops() == 2 * least
        with torch.no_grad():
            layer(inputs)
            with FlopCounterMode(display=False) as counter:
                layer(inputs.clone())
        assert counter.get_total_flops() == 2 * num_tokens * layer.multiply_adds()


def two_of_one_basis():
    first = tucker((8, 8), ranks=(2, 7))
    second = TuckerLinear(8, 8, first.shared, **KIND).eval()
    second.reset_parameters(std=1.0)
    return first, second


def test_what_is_called_with_the_same_input_shares_its_product_with_the_factor():
    first, second = two_of_one_basis()
    inputs = torch.randn(100, 8, **KIND)
    with torch.no_grad():
        first(inputs), second(inputs.clone())  # what no token changes is kept from here on
        flops = []
        for one, other in ((inputs, inputs), (inputs.clone(), inputs.clone())):
            with FlopCounterMode(display=False) as counter:
                first(one), second(other)
            flops.append(counter.get_total_flops())

        assert flops[1] - flops[0] == 2 * 100 * 8 * 2
        assert_equal(second(inputs), expected(second, inputs))
        inputs.mul_(2)
        assert_equal(second(inputs), expected(second, inputs))
        first.shared.left.add_(1)
        assert_equal(second(inputs), expected(second, inputs))
        assert copy.deepcopy(first.shared)._last._known is None
        del inputs, one, other
    assert first.shared._last._known is None


@pytest.mark.parametrize("num_tokens", [1, 4096])
def test_multiplying_takes_no_more_than_the_plain_order_of_factors(num_tokens):
    layer = tucker((32, 8), (3, 2))
    plain = 8 * 3 + 4 * 3 * 2 + 4 * 2 * 8

    assert layer.multiply_adds() <= plain
    assert min(num_tokens * token + once for token, once in layer._costs().values()) <= num_tokens * plain


def changes():
    def scale(parameter):
        parameter.mul_(2)

    def assign(layer):
        layer.load_state_dict({key: 3 * value for key, value in layer.state_dict().items()}, assign=True)

    return {
        "own weight": lambda layer: scale(next(layer.parameters())),
        "shared weight": lambda layer: scale(next(iter(whole(layer).parameters()))),
        "every weight": lambda layer: [scale(p) for p in whole(layer).parameters()],
        "loaded": lambda layer: layer.load_state_dict({k: 3 * v for k, v in layer.state_dict().items()}),
        "assigned": assign,
        "data": lambda layer: setattr(next(layer.parameters()), "data", torch.ones_like(next(layer.parameters()))),
        "float32": lambda layer: whole(layer).float(),
        "training": lambda layer: layer.train(),
    }


def whole(layer):
    return nn.ModuleList([*([layer.shared] if hasattr(layer, "SHARES") else []), layer])


@each_layer
@pytest.mark.parametrize("change", changes())
def test_a_kept_product_does_not_outlive_a_change(name, change):
    layer = layers()[name]
    inputs = torch.randn(4, layer.in_features, **KIND)
    with torch.no_grad():
        layer(inputs)
        changes()[change](layer)
        inputs = inputs.to(layer.bias.dtype)
        tolerance = 1e-4 if change == "float32" else 1e-10

        torch.testing.assert_close(layer(inputs), expected(layer, inputs), rtol=tolerance, atol=tolerance)


@each_layer
def test_a_product_is_kept_in_evaluation_mode_only_and_never_saved_or_copied(name):
    layer = layers()[name]
    inputs = torch.randn(64, layer.in_features, **KIND)
    keys = set(layer.state_dict())

    layer(inputs)
    assert layer._product is None  # there are gradients
    with torch.no_grad():
        layer.train()(inputs)
        assert layer._product is None
        layer.eval()(inputs)
        product = layer._product
        assert product is not None
        layer(inputs)
        assert layer._product is product  # not formed again

    assert set(layer.state_dict()) == keys
    assert copy.deepcopy(layer)._product is None
    assert pickle.loads(pickle.dumps(layer))._product is None
    assert layer.to(torch.float32)._product is None


@each_layer
def test_a_product_formed_in_inference_mode_meets_gradients_later(name):
    layer = layers()[name]
    inputs = torch.randn(4, layer.in_features, **KIND)
    with torch.inference_mode():
        layer(inputs)
    with torch.no_grad():
        found = layer(inputs)
    layer(inputs.requires_grad_()).sum().backward()

    assert_equal(found, expected(layer, inputs).detach())
    assert all(p.grad is not None for p in whole(layer).parameters())


@each_layer
def test_weights_made_in_inference_mode_are_used_as_they_are(name):
    with torch.inference_mode():
        layer = layers()[name]
        inputs = torch.randn(4, layer.in_features, **KIND)
        layer(inputs)
        for parameter in whole(layer).parameters():
            parameter.mul_(2)

        assert_equal(layer(inputs), expected(layer, inputs))


@each_layer
@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_without_a_break(name, training):
    torch._dynamo.reset()  # each layer anew: there is a limit of graphs for one forward
    layer = layers()[name].train(training)
    inputs = torch.randn(4, layer.in_features, **KIND)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)

    assert_equal(compiled(inputs), expected(layer, inputs))
    with torch.no_grad():
        layer.bias.add_(1)
        next(layer.parameters()).mul_(2)
        assert_equal(compiled(inputs), expected(layer, inputs))
    more = torch.randn(7, layer.in_features, **KIND)  # another length: sizes are symbols from here on
    assert_equal(compiled(more), expected(layer, more))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"a": {"structure": "tucker", "shared": "s", "input_side": "top"}}, "input_side must be one of left, right"),
        ({"a": {"structure": "tucker", "shared": "s", "rank": 3}}, "needs exactly the sizes none, got rank"),
        ({"a": {"structure": "tucker"}}, "shared must name one of s"),
    ],
)
def test_a_plan_with_a_bad_option_is_refused(modules, message):
    part = {"structure": "tucker_basis", "width": 8, "left_rank": 2, "right_rank": 2}
    with pytest.raises(PlanError, match=message):
        validate_plan({"format_version": 1, "modules": modules, "shared": {"s": part}}, STRUCTURES, SHARED_PARTS)
