"""Rounded weights: what rounding promises, the bytes they are kept in, and models that hold them."""

import json
import logging
import math

import pytest
import torch
import transformers
from elsewhere import assert_same_elsewhere
from every_method import TENSOR_METHODS
from safetensors.torch import load_file, load_model
from tiny_architectures import build_architecture
from tiny_models import build, inputs_for, largest_difference, outputs
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertForMaskedLM

from hf_lowrank import InputError, PlanError, cli, compress, decompress
from hf_lowrank.compression import rounding
from hf_lowrank.compression.error_costs import costs_of
from hf_lowrank.compression.job import prepare
from hf_lowrank.compression.settled import settle_compression
from hf_lowrank.methods.metric import identity, moment_metric
from hf_lowrank.methods.rounding.coding import Steps, coded_bits, pack
from hf_lowrank.methods.rounding.grids import as_columns, damage, round_in_metric
from hf_lowrank.methods.rounding.pairs import Pair, turned
from hf_lowrank.planning.sizes import overhead_bytes
from hf_lowrank.records.report import make_report
from hf_lowrank.remote_code.lowrank_codes import NUM_CLASSES, frequencies, steps_of, unpack
from hf_lowrank.remote_code.lowrank_packed import as_matrix
from hf_lowrank.sharing.saving import load_compressed, save_folder
from hf_lowrank.sharing.verification import verify

HEADS = {"BertForMaskedLM": AutoModelForMaskedLM, "GPT2LMHeadModel": AutoModelForCausalLM}


def drawn(rows, columns, deviation, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.round(torch.randn(rows, columns, generator=generator) * deviation).int()


def with_outliers(codes):
    codes[0, 0], codes[-1, -1], codes[:, 0] = 1 << 20, -(1 << 20), 300
    return codes


CODES = {
    "of a few bits": drawn(60, 50, 1.5),
    "hardly any": drawn(60, 50, 0.05),
    "none but zeros": drawn(40, 40, 0),
    "of many bits": drawn(30, 70, 1000),
    "rows unlike each other": drawn(90, 30, 1) * torch.arange(90)[:, None].int(),
    "as large as they come": (drawn(20, 20, 2).long() << 29).int(),
    "rows and columns of all sizes": (
        drawn(60, 50, 1) * (2.0 ** (torch.arange(60) % 11)[:, None]) * 2.0 ** (torch.arange(50) % 13)
    ).int(),
    "with outliers": with_outliers(drawn(64, 64, 2)),
    "one number": drawn(1, 1, 3),
    "one row": drawn(1, 5000, 3),
    "more than a lane": drawn(130, 100, 2),
}


def steps_for(codes):
    return Steps(0.25, torch.arange(len(codes)) % 256, torch.arange(codes.shape[1]) % 256)


def test_bytes_hold_every_code_and_step():
    grids = [(codes, steps_for(codes)) for codes in CODES.values()]
    found = list(unpack([(content, codes.shape) for content, codes in zip(pack(grids), CODES.values(), strict=True)]))

    for (codes, steps), grid in zip(grids, found, strict=True):
        assert torch.equal(grid.codes.int(), codes)
        assert torch.equal(grid.rows, steps.largest * steps_of(steps.rows))
        assert torch.equal(grid.columns, steps_of(steps.columns))


def test_bytes_are_the_same_alone_and_side_by_side():
    grids = [(codes, steps_for(codes)) for codes in CODES.values()]
    for together, grid in zip(pack(grids), grids, strict=True):
        assert torch.equal(together, pack([grid])[0])


@pytest.mark.parametrize("deviation", [0.1, 0.5, 2, 8, 60])
def test_bytes_are_close_to_the_entropy(deviation):
    codes = drawn(400, 500, deviation)
    counts = torch.unique(codes, return_counts=True)[1] / codes.numel()
    entropy = float(-(counts * counts.log2()).sum()) * codes.numel()
    side = 16 * sum(codes.shape)

    size = 8 * len(pack([(codes, steps_for(codes))])[0])
    assert entropy < size < 1.02 * entropy + side + 5000
    assert abs(coded_bits(codes) - size) < 0.05 * size + side


@pytest.mark.parametrize("index", range(NUM_CLASSES))
def test_a_class_is_a_distribution_of_its_variance(index):
    counts = torch.tensor(frequencies(index), dtype=torch.float64)
    codes = torch.arange(len(counts)) - len(counts) // 2

    assert counts.sum() == 4096
    assert torch.equal(counts[1:], counts[1:].flip(0))
    if index > 4:  # rarer than once in 4096 there is nothing
        assert float((counts * codes**2).sum() / 4096) == pytest.approx(2 ** (index / 2 - 9), rel=0.2)


@pytest.mark.parametrize("damage", ["cut", "longer", "changed", "another shape", "nothing"])
def test_damaged_bytes_are_refused(damage):
    codes = drawn(60, 50, 2)
    content = pack([(codes, steps_for(codes))])[0]
    changed = content.clone()
    changed[-20] ^= 255
    contents = {
        "cut": content[:-3], "longer": torch.cat([content, content[:2]]), "changed": changed, "another shape": content,
        "nothing": content[:0],
    }  # fmt: skip
    with pytest.raises(PlanError, match="Rounded weights cannot be read"):
        list(unpack([(contents[damage], (50, 61) if damage == "another shape" else (60, 50))]))


def correlated(size, seed):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, size, dtype=torch.float64)
    inputs = torch.randn(8 * size, size, generator=generator, dtype=torch.float64) @ mixing * scales
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize("shape", [(40, 30), (60, 200), (1, 20), (20, 1)])
@pytest.mark.parametrize("level", [1e-4, 1e-2, 1.0])
def test_rounding_in_a_metric_costs_less_than_plain_rounding_at_the_price_of_its_bits(shape, level):
    rows, columns = shape
    moment, costs = correlated(columns, 1), correlated(rows, 2).diagonal()
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def cost(found):
        difference = (weight - found).double()
        return float((costs * ((difference @ moment) * difference).sum(1)).sum())

    found = round_in_metric(weight, costs, as_columns(moment_metric(moment, 10**9, 0.0), columns), level)
    steps = found.steps.largest * steps_of(found.steps.rows)[:, None] * steps_of(found.steps.columns)
    plain = torch.round(weight / steps).int()
    price = 2 * math.log(2) * level  # of a bit: `-dD / dR` of fine grids

    assert cost(found.weight) <= 3 * level * weight.numel() * 1.1  # hardly a term is above its bound
    assert cost(found.weight) + price * found.bits <= cost(plain * steps) + price * coded_bits(plain)


def test_order_of_columns_lets_the_last_ones_be_made_good_by_the_others():
    moment = correlated(150, 1)
    order = as_columns(moment_metric(moment, 10**9, 0.0), 150).order
    assert sorted(order.tolist()) == [*range(150)]
    left = torch.linalg.cholesky(moment[order][:, order]).diagonal()
    assert all(left[1:] <= left[:-1] * (1 + 1e-3))


def test_without_a_metric_rounding_is_to_the_nearest():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    found = round_in_metric(weight, torch.ones(20), as_columns(identity(), 30), 1e-3)
    assert float((weight - found.weight).abs().max()) <= found.steps.largest / 2 * 1.05  # a code pays for its bits


def thin(rows, columns, rank, noise=0.0, seed=3):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns)))
    return up @ down * rank**-0.5 + noise * torch.randn(rows, columns, generator=generator)


def pair_for(weight, rank, folder, seed=4):
    """Two factors that lean on each other, in metrics far from the identity, and what errors cost in these."""
    rows, columns = weight.shape
    costs = correlated(rows, 2).diagonal(), as_columns(moment_metric(correlated(columns, 1), 10**9, 0.0), columns)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    mixing = torch.randn(rank, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    up, down = left[:, :rank] * values[:rank] @ mixing, torch.linalg.solve(mixing, right[:rank])
    return Pair(("up", "down"), lambda: (up, down), lambda: costs, folder), costs, (up, down)


@pytest.mark.parametrize("shape", [(40, 30), (30, 80)])
@pytest.mark.parametrize("level", [1e-4, 1e-2, 1.0])
def test_factors_rounded_one_after_the_other_cost_less_than_each_for_itself(shape, level, tmp_path):
    weight = thin(*shape, 8)
    pair, (rows, columns), factors = pair_for(weight, 8, tmp_path)
    found, price = pair.at(level), 2 * math.log(2) * level
    gram = [(rows[:, None] * factors[0].square()).sum(0), rows]
    seen = columns.rooted(factors[1])
    metric = as_columns(moment_metric(seen @ seen.T, 10**9, 1e-9), 8)
    alone = [round_in_metric(factors[0], rows, metric, level), round_in_metric(factors[1], gram[0], columns, level)]

    def total(one):
        return damage(weight, one[0].weight @ one[1].weight, rows, columns) + price * sum(each.bits for each in one)

    assert total([found["up"], found["down"]]) <= total(alone)


def test_turned_factors_are_the_same_product_and_orthogonal_in_the_metrics(tmp_path):
    _, (rows, columns), factors = pair_for(thin(40, 30, 8), 8, tmp_path)
    up, down = turned(*factors, rows, columns)
    seen = columns.rooted(down)
    assert torch.allclose(up @ down, factors[0] @ factors[1])
    assert torch.allclose((rows[:, None] * up).T @ up, seen @ seen.T, atol=1e-9)
    assert torch.allclose(seen @ seen.T, (seen @ seen.T).diagonal().diag(), atol=1e-9)


@pytest.fixture(scope="module", params=HEADS)
def rounded(request, tmp_path_factory):
    """A rounded model in memory, and its folder."""
    folder = tmp_path_factory.mktemp("rounded") / request.param
    small = compress(build(request.param), bits=6, method="svd")
    small.save_pretrained(folder)
    return request.param, small, folder


def plan_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))["compression"]


def test_a_rounded_model_has_the_bits_asked_for(rounded):
    _, small, folder = rounded
    plan, parameters = plan_of(folder), dict(small.base_model.named_parameters())
    sizes = plan["packed"]["tensors"] | plan["packed"]["outside"]
    numbers = sum(parameters.get(name, dict(small.named_parameters()).get(name)).numel() for name in sizes)

    assert 0.97 * 6 < 8 * sum(sizes.values()) / numbers <= 6
    assert plan["modules"] == {}
    assert plan["format_version"] == 2


def test_it_loads_as_it_was_without_the_library(rounded):
    head, small, folder = rounded
    assert_same_elsewhere({"again": (head, small)}, folder.parent)


@pytest.mark.parametrize("mode", ["each_forward", "once", None])
def test_decoded_once_or_each_time_it_computes_the_same(rounded, mode):
    head, small, folder = rounded
    loaded = HEADS[head].from_pretrained(folder, trust_remote_code=True, materialize=mode).eval()

    assert largest_difference(outputs(loaded, inputs_for(head)), outputs(small, inputs_for(head))) == 0
    kept = [p for p in loaded.parameters() if type(p).__name__ == "GridTensor"]
    assert bool(kept) == (mode == "each_forward")


def test_saved_again_it_is_the_same_file(rounded, tmp_path):
    head, _, folder = rounded
    for mode in (None, "each_forward"):
        loaded = HEADS[head].from_pretrained(folder, trust_remote_code=True, materialize=mode)
        loaded.save_pretrained(tmp_path / str(mode))
        assert (tmp_path / str(mode) / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_what_has_changed_is_saved_in_full_and_said(rounded, tmp_path, caplog):
    head, _, folder = rounded
    loaded = load_compressed(folder)
    changed = next(iter(plan_of(folder)["packed"]["tensors"]))
    with torch.no_grad():
        loaded.base_model.get_parameter(changed).mul_(1.01)
    with caplog.at_level(logging.WARNING):
        loaded.save_pretrained(tmp_path)
    again = HEADS[head].from_pretrained(tmp_path, trust_remote_code=True).eval()

    assert "1 weights" in caplog.text
    assert changed in caplog.text
    assert changed not in plan_of(tmp_path)["packed"]["tensors"]
    assert largest_difference(outputs(again, inputs_for(head)), outputs(loaded.eval(), inputs_for(head))) == 0


def test_its_file_is_loaded_into_a_model_that_is_there(rounded):
    head, _, folder = rounded
    loaded = load_compressed(folder)
    wanted = outputs(loaded, inputs_for(head))
    nn.init.zeros_(next(p for p in loaded.parameters() if p.dim() > 1))
    loaded.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert largest_difference(outputs(loaded, inputs_for(head)), wanted) == 0

    nn.init.zeros_(next(p for p in loaded.parameters() if p.dim() > 1))
    load_model(loaded, folder / "model.safetensors")
    assert largest_difference(outputs(loaded, inputs_for(head)), wanted) == 0


def test_it_moves_to_other_types_and_copies_like_any_model(rounded):
    head, small, folder = rounded
    narrow = HEADS[head].from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16).eval()
    wanted = {name: value.bfloat16() for name, value in small.state_dict().items() if value.is_floating_point()}
    assert all(torch.equal(value, wanted[name]) for name, value in narrow.state_dict().items() if name in wanted)

    each = HEADS[head].from_pretrained(folder, trust_remote_code=True, materialize="each_forward").eval()
    moved = outputs(each.to(torch.bfloat16), inputs_for(head))
    assert largest_difference(moved, outputs(narrow, inputs_for(head))) == 0


def test_it_grows_decompresses_and_passes_verify(rounded, tmp_path):
    head, small, folder = rounded
    dense = decompress(load_compressed(folder))
    assert largest_difference(outputs(dense, inputs_for(head)), outputs(small, inputs_for(head))) == 0
    assert type(dense).__module__.startswith("transformers.")
    assert verify(folder, trust_remote_code=True).ok

    grown = load_compressed(folder)
    grown.resize_token_embeddings(grown.config.vocab_size + 5)
    grown.save_pretrained(tmp_path)
    again = load_compressed(tmp_path)
    assert largest_difference(outputs(again, inputs_for(head)), outputs(grown, inputs_for(head))) == 0


def test_a_stock_class_does_not_load_it(tmp_path):
    compress(build("BertForMaskedLM"), bits=4, method="svd").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        BertForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["svd", *(name for name, row in TENSOR_METHODS.items() if not row.ranks)])
def test_the_numbers_of_every_structure_are_rounded(method, tmp_path, monkeypatch, hardly_trained):
    monkeypatch.setattr(rounding, "LEAST_NUMBERS", 16)
    dense = build("BertForMaskedLM", num_hidden_layers=2)
    small = compress(dense, method=method, bits=10, keep_targets=0.6)
    floats = compress(dense, method=method, keep_targets=0.6)
    small.save_pretrained(tmp_path)
    loaded = load_compressed(tmp_path)
    wanted, inputs = outputs(floats, inputs_for("BertForMaskedLM")), inputs_for("BertForMaskedLM")

    assert largest_difference(outputs(loaded, inputs), outputs(small, inputs)) == 0
    assert largest_difference(outputs(small, inputs), wanted) < 0.1 * largest_difference(
        outputs(dense, inputs), wanted
    )
    rounded_names = {*small.config.plan["packed"]["tensors"]}
    modules = small.config.plan["modules"]
    assert all(
        any(name.startswith(f"{module}.") for name in rounded_names)
        for module in modules
        if "shared" not in modules[module]
    )


def test_a_size_is_met_by_bits(tmp_path):
    small = compress(build("BertForMaskedLM", vocab_size=600), target_size=120_000)
    small.save_pretrained(tmp_path)
    weighs = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert 0.93 * 120_000 < weighs <= 120_000
    assert small.config.plan["modules"] == {}


def of_few_directions(name):
    """A model whose matrices are hardly more than thin ones."""
    model = build(name, hidden_size=96, intermediate_size=192, vocab_size=600)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.2 * thin(*parameter.shape, 12, noise=0.02))
    return model


def test_where_a_rank_does_less_harm_for_its_bytes_there_is_one(tmp_path):
    dense = of_few_directions("BertForMaskedLM")
    small = compress(dense, target_size=overhead_bytes(dense, ["low_rank", "low_rank_embedding"], "grid") + 40_000)
    save_folder(small, tmp_path / "small")
    modules = {module.name: module for module in make_report(small).modules}
    loaded = load_compressed(tmp_path / "small")

    assert small.config.plan["modules"]
    assert all(modules[name].rank < 48 for name in small.config.plan["modules"])
    assert all(module.bits is not None and module.relative_error is not None for module in modules.values())
    inputs = inputs_for("BertForMaskedLM")
    assert largest_difference(outputs(loaded, inputs), outputs(small, inputs)) == 0
    assert make_report(small).multiply_adds < make_report(small).dense_multiply_adds


@pytest.mark.parametrize("named", [{"exclude_modules": ["word_embeddings"]}, {"target_modules": ["query", "value"]}])
def test_only_what_is_named_is_rounded(named):
    dense = build("BertForMaskedLM")
    small = compress(dense, bits=4, method="svd", **named)
    names = {*small.config.plan["packed"]["tensors"], *small.config.plan["packed"]["outside"]}

    assert all(name.endswith(("query.weight", "value.weight")) for name in names) == ("target_modules" in named)
    assert not any("word_embeddings" in name for name in names)
    kept = small.base_model.embeddings.word_embeddings.weight
    assert torch.allclose(kept, dense.base_model.embeddings.word_embeddings.weight, rtol=1e-3)


def test_experts_are_rounded_by_what_the_text_says_of_each():
    dense = build_architecture("MixtralForCausalLM")
    evidence = prepare(dense, settle_compression({"bits": 4}, has_text=False)).problem
    (first, *_) = [matrix for matrix in evidence.matrices if matrix.kind == "experts"]
    rows, columns = costs_of(evidence, first, lambda: first.weight)()
    weights = as_matrix(first.module, first.held)

    assert (len(rows), len(columns.order)) == weights.shape
    assert len(rows.unique()) > 1
    assert columns.unit is not None


# From disk: experts in one parameter, a host that looks at shapes when it draws, a weight that torch makes.
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "PegasusForConditionalGeneration", "Wav2Vec2ForCTC"])
def test_odd_hosts_are_rounded_and_load_as_they_were(name, tmp_path, monkeypatch):
    monkeypatch.setattr(rounding, "LEAST_NUMBERS", 64)
    build_architecture(name).save_pretrained(tmp_path / "dense")
    for number, asked in enumerate(({}, {"keep_targets": 0.6})):
        dense = getattr(transformers, name).from_pretrained(tmp_path / "dense")
        small = compress(dense, method="svd", bits=9, **asked)
        small.save_pretrained(tmp_path / str(number))
        assert verify(tmp_path / str(number), small, trust_remote_code=True).ok
        assert type(decompress(small)) is type(dense)


def test_ranks_and_bits_go_together_without_text_where_the_dense_weights_are_gone(tmp_path):
    build("BertForMaskedLM").save_pretrained(tmp_path)

    small = compress(tmp_path, bits=4, rank=6, method="svd")

    assert {spec["rank"] for spec in small.config.plan["modules"].values()} == {6}
    assert small.config.plan["packed"]["tensors"]


def test_more_bits_are_nearer_to_the_dense_model():
    dense = build("BertForMaskedLM")
    inputs = inputs_for("BertForMaskedLM")
    wanted = outputs(dense, inputs)
    far = [largest_difference(outputs(compress(dense, bits=bits), inputs), wanted) for bits in (3, 9)]
    assert far == sorted(far, reverse=True)


def test_the_command_line_rounds(tmp_path, capsys):
    build("BertForMaskedLM").save_pretrained(tmp_path / "dense")
    command = ["compress", str(tmp_path / "dense"), str(tmp_path / "out"), "--bits", "5", "--no-latency"]
    assert cli.main(command) == 0
    assert "bits" in capsys.readouterr().out
    assert plan_of(tmp_path / "out")["packed"]["code"] == "grid"


@pytest.mark.parametrize("bits", [0, -1, 17, "4"])
def test_bits_out_of_bounds_are_one_line(bits):
    with pytest.raises(InputError, match="bits must be"):
        compress(build("BertForMaskedLM"), bits=bits)


def test_too_few_bits_are_one_line():
    with pytest.raises(InputError, match="Ask for more"):
        compress(build("BertForMaskedLM"), bits=0.01, method="svd")
