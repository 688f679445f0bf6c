"""Laws of stacking blocks and of their Tucker decomposition, in float64."""

import pytest
import torch
from tiny_models import INNER, WIDTH, build

from hf_lowrank.errors import InputError
from hf_lowrank.hosts.matrices import dense_weight
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.matrix.svd import SVD
from hf_lowrank.methods.metric import DiagonalMetric, identity, moment_metric
from hf_lowrank.methods.stacking import (
    GROUPS,
    BlockLayout,
    block_layout,
    cut_blocks,
    group_of,
    in_group,
    join_blocks,
    stack_blocks,
)
from hf_lowrank.methods.tucker.tucker import (
    BlockMetrics,
    Tucker,
    TuckerRanks,
    captured_energy,
    hooi,
    hosvd,
    refitted,
    relative_error,
    tucker,
)

BLOCKS, LEFT, RIGHT = 7, 9, 8
RANKS = [TuckerRanks(4, 3, 5), TuckerRanks(4, 3), TuckerRanks(1, 1, 1), TuckerRanks(1, 1), TuckerRanks(9, 2, 3)]
FULL = [TuckerRanks(LEFT, RIGHT, BLOCKS), TuckerRanks(LEFT, RIGHT)]


def stack_of(seed=0, num_blocks=BLOCKS):
    return torch.randn(num_blocks, LEFT, RIGHT, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def metrics_of(seed=1):
    generator = torch.Generator().manual_seed(seed)
    tall = torch.randn(30, LEFT, dtype=torch.float64, generator=generator)
    tall[:, 0] *= 10
    weights = 0.1 + torch.rand(BLOCKS, dtype=torch.float64, generator=generator)
    right = DiagonalMetric(0.1 + torch.rand(RIGHT, dtype=torch.float64, generator=generator))
    return BlockMetrics(moment_metric(tall.T @ tall, 30, 0.01), right, weights)


def planted(ranks, num_blocks=24, noise=0.05):
    """Blocks that share their factors, and a little noise."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    found = Tucker(
        draw(20, ranks.left),
        draw(20, ranks.right),
        draw(ranks.bank, ranks.left, ranks.right),
        draw(num_blocks, ranks.bank),
    )
    blocks = found.blocks()
    return blocks + noise * blocks.std() * draw(*blocks.shape)


@pytest.mark.parametrize("ranks", RANKS + FULL, ids=str)
def test_hooi_never_has_a_larger_error_than_hosvd(ranks):
    for seed in range(3):
        stack = stack_of(seed)
        start = hosvd(stack, ranks)

        assert relative_error(stack, hooi(stack, start)) <= relative_error(stack, start) + 1e-12


def test_hooi_gains_on_hosvd_where_there_is_something_to_gain():
    stack, ranks = stack_of(), TuckerRanks(3, 3, 3)

    assert relative_error(stack, tucker(stack, ranks)) < 0.999 * relative_error(stack, hosvd(stack, ranks))


@pytest.mark.parametrize("metrics", [None, metrics_of()], ids=["plain", "whitened"])
@pytest.mark.parametrize("ranks", FULL, ids=str)
def test_full_ranks_are_exact(ranks, metrics):
    stack = stack_of()

    torch.testing.assert_close(tucker(stack, ranks, metrics).blocks(), stack, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ranks", RANKS, ids=str)
def test_hosvd_error_is_at_most_the_energy_cut_off_in_each_mode(ranks):
    stack = stack_of()
    kept = {1: ranks.left, 2: ranks.right, 0: ranks.bank or BLOCKS}
    lost = sum(
        torch.linalg.svdvals(stack.movedim(mode, 0).flatten(1))[rank:].square().sum() for mode, rank in kept.items()
    )

    assert relative_error(stack, hosvd(stack, ranks)) ** 2 <= float(lost / stack.square().sum()) + 1e-12


@pytest.mark.parametrize("ranks", RANKS + FULL, ids=str)
def test_what_hosvd_keeps_is_known_for_all_ranks_from_one_core(ranks):
    stack = stack_of()
    kept = captured_energy(stack, [1, ranks.left, LEFT], [ranks.right, RIGHT])

    lost = relative_error(stack, hosvd(stack, ranks)) ** 2
    assert kept.shape == (BLOCKS, 3, 2)
    share = kept[(ranks.bank or BLOCKS) - 1, 1, 0] / stack.square().sum()
    assert float(share) == pytest.approx(1 - lost, abs=1e-12)


def test_a_full_bank_is_no_bank():
    stack = stack_of()
    own, mixed = (tucker(stack, TuckerRanks(4, 3, bank), tolerance=1e-14) for bank in (None, BLOCKS))

    torch.testing.assert_close(mixed.blocks(), own.blocks(), rtol=0, atol=1e-6)
    assert mixed.mixing.shape == (BLOCKS, BLOCKS)


@pytest.mark.parametrize("metrics", [None, metrics_of()], ids=["plain", "whitened"])
@pytest.mark.parametrize("ranks", RANKS + FULL, ids=str)
def test_factors_are_orthonormal_and_count_as_said(ranks, metrics):
    found = tucker(stack_of(), ranks, metrics)
    shared = [found.left, found.right] + ([] if found.mixing is None else [found.mixing])

    for factor in shared:
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1], dtype=factor.dtype))
    assert found.ranks == ranks
    assert sum(f.numel() for f in [*shared, found.core]) == ranks.num_weights(BLOCKS, LEFT, RIGHT)


def test_blocks_of_low_multilinear_rank_are_recovered():
    ranks = TuckerRanks(5, 4, 3)
    blocks = planted(ranks, noise=0.0)

    torch.testing.assert_close(tucker(blocks, ranks).blocks(), blocks, rtol=0, atol=1e-9)


def test_shared_structure_beats_a_pair_of_factors_for_each_matrix_at_equal_size():
    ranks = TuckerRanks(8, 8, 4)
    blocks = planted(ranks)
    size = ranks.num_weights(*blocks.shape)
    rank = size // (len(blocks) * sum(blocks.shape[1:])) + 1  # rounded in favour of the pairs
    pairs = torch.stack([SVD().decompose(block).factors(rank).product for block in blocks])

    assert relative_error(blocks, tucker(blocks, ranks)) < 0.5 * float((blocks - pairs).norm() / blocks.norm())


def test_whitening_lowers_the_error_that_counts():
    stack, ranks, metrics = stack_of(), TuckerRanks(4, 3, 4), metrics_of()
    plain, aware = tucker(stack, ranks), tucker(stack, ranks, metrics)

    def error(found):
        return float(metrics.whiten(stack - found.blocks()).norm())

    assert error(aware) < 0.95 * error(plain)


def test_metrics_of_nothing_change_nothing():
    stack, ranks = stack_of(), TuckerRanks(4, 3, 4)
    nothing = BlockMetrics(identity(), identity(), torch.ones(BLOCKS, dtype=torch.float64))

    torch.testing.assert_close(tucker(stack, ranks, nothing).blocks(), tucker(stack, ranks).blocks())


def test_zero_blocks_decompose_to_zero():
    found = tucker(torch.zeros(3, 4, 5), TuckerRanks(2, 2, 2))

    assert relative_error(torch.zeros(3, 4, 5), found) == 0
    assert torch.isfinite(found.core).all()


@pytest.mark.parametrize(
    ("ranks", "name"), [(TuckerRanks(10, 1), "left"), (TuckerRanks(1, 9), "right"), (TuckerRanks(1, 1, 8), "bank")]
)
def test_a_rank_out_of_bounds_is_named(ranks, name):
    with pytest.raises(InputError, match=f"The {name} rank must be between 1 and"):
        tucker(stack_of(), ranks)


@pytest.mark.parametrize("shape", [(8, 8), (32, 8), (8, 32), (19, 8), (8, 19), (24, 8), (5, 8), (3, 21)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cut_blocks_join_to_the_weight(shape, side):
    weight = torch.randn(*shape)
    layout = BlockLayout(side, 8, 8, shape)
    blocks = cut_blocks(weight, layout)

    assert blocks.shape == (layout.num_blocks, 8, 8)
    assert torch.equal(join_blocks(blocks, layout), weight)


def test_blocks_are_oriented_as_published():
    model = build("BertModel", hidden_size=12, intermediate_size=48, num_attention_heads=3)
    matrices = {m.name.removeprefix("encoder.layer.0."): m for m in find_matrices(model)}
    query, inner, outer = (matrices[n] for n in ("attention.self.query", "intermediate.dense", "output.dense"))

    def blocks(matrix):
        return cut_blocks(dense_weight(matrix.module), block_layout(matrix, 12))

    assert torch.equal(blocks(query)[0], query.module.weight.T)
    assert torch.equal(blocks(inner), inner.module.weight.view(4, 12, 12))
    assert torch.equal(blocks(outer), outer.module.weight.T.reshape(4, 12, 12))


def test_the_fused_projection_of_gpt2_is_cut_in_three():
    model = build("GPT2Model")
    fused = next(m for m in find_matrices(model) if m.name.endswith("c_attn"))
    blocks = cut_blocks(dense_weight(fused.module), block_layout(fused, WIDTH))

    assert torch.equal(blocks, torch.stack(fused.module.weight.split(WIDTH, dim=1)))


@pytest.mark.parametrize(
    ("head", "names"), [("BertModel", 6), ("GPT2Model", 4), ("DistilBertModel", 6), ("LlamaModel", 7)]
)
def test_groups_part_the_matrices_of_the_blocks(head, names):
    matrices = find_matrices(build(head))
    attention, feed_forward, both = ({m.name for m in in_group(matrices, g)} for g in GROUPS)

    assert attention | feed_forward == both
    assert not attention & feed_forward
    assert len(both) == 2 * names
    assert all(group_of(m) == "feed_forward" for m in in_group(matrices, "feed_forward"))


def test_a_stack_holds_every_block_in_order():
    matrices = in_group(find_matrices(build("BertModel")), "both")
    layouts = [block_layout(m, WIDTH) for m in matrices]
    stack = stack_blocks([dense_weight(m.module) for m in matrices], layouts)
    pieces = -(-INNER // WIDTH)

    assert stack.shape == (2 * (4 + 2 * pieces), WIDTH, WIDTH)
    start = 0
    for matrix, layout in zip(matrices, layouts, strict=True):
        assert torch.equal(join_blocks(stack[start : start + layout.num_blocks], layout), dense_weight(matrix.module))
        start += layout.num_blocks


def test_unknown_and_empty_groups_are_refused():
    matrices = find_matrices(build("BertModel"))
    with pytest.raises(InputError, match="group must be one of"):
        in_group(matrices, "heads")
    with pytest.raises(InputError, match="No matrix belongs"):
        in_group([m for m in matrices if group_of(m) == "attention"], "feed_forward")


@pytest.mark.parametrize("shape", [(9, 9), (18, 9), (9, 27), (20, 9), (9, 20)], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_refitted_matrices_leave_no_error_that_the_factors_could_take_away(side, shape):
    generator = torch.Generator().manual_seed(3)
    layout = BlockLayout(side, 9, 9, shape)
    whole = layout.of_blocks(9, 9)  # the last blocks filled with zeros
    weight = torch.randn(shape, dtype=torch.float64, generator=generator)
    drawn = (torch.randn(9, rank, dtype=torch.float64, generator=generator) for rank in (4, 3))
    left, right = (torch.linalg.qr(one).Q for one in drawn)
    tokens = torch.randn(60, whole.shape[1], dtype=torch.float64, generator=generator)
    tokens[:, 0] *= 5
    tokens[:, shape[1] :] = 0
    metric = moment_metric(tokens.T @ tokens / 60, 60, 0.01)

    own = refitted(weight, layout, left, right, metric)

    lost = join_blocks(cut_blocks(weight, layout) - left @ own @ right.T, whole)
    pulled = cut_blocks(metric.root(metric.rooted(lost.T)).T, whole)  # E C, block by block
    assert own.shape == (layout.num_blocks, 4, 3)
    torch.testing.assert_close(left.T @ pulled @ right, torch.zeros_like(own), rtol=0, atol=1e-10)
