"""Token tables with the published non-linear decoder: what they cost, when they are trained, and how they grow."""

import pytest
import torch
from tiny_models import VOCABULARY, WIDTH, assert_same_function, build, inputs_for, outputs
from torch.nn import functional as F

from hf_lowrank import compress, decompress
from hf_lowrank.errors import InputError
from hf_lowrank.files.checkpoint import Checkpoint
from hf_lowrank.methods.rows.row_autoencoder import RowAutoencoder, rows_by_direction
from hf_lowrank.methods.tables import nonlinear_table
from hf_lowrank.methods.tables.nonlinear_table import NonlinearTable
from hf_lowrank.methods.tables.trained_table import TrainedTable
from hf_lowrank.planning.sizes import overhead_bytes, parameter_bytes
from hf_lowrank.records.report import make_report
from hf_lowrank.remote_code.lowrank_materialize import set_materialize_
from hf_lowrank.remote_code.lowrank_nonlinear_table import NonlinearAutoencoderEmbedding
from hf_lowrank.sharing.saving import load_compressed
from hf_lowrank.studies.analysis import analyze

V, D = 200, 16
HEADS = ["BertForMaskedLM", "GPT2LMHeadModel"]
each_head = pytest.mark.parametrize("head", HEADS)
each_tying = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def cost(length, rows=V, width=D):
    """The rule of Banaei et al."""
    return 10 * length**2 + (rows + 6 + 4 * width) * length + rows + width


def curved(rows=V, width=D, rank=3):
    """Rows whose directions are a curved function of a short code."""
    hidden = torch.tanh(torch.randn(rows, rank) @ torch.randn(rank, 32))
    return F.normalize(hidden @ torch.randn(32, width), dim=1) * torch.randn(rows, 1).exp()


def small_model(head="BertForMaskedLM", tied=True, dtype=torch.float32, **options):
    dense = build(head, tie_word_embeddings=tied).to(dtype)
    options = {"rank": 8, **options}
    return compress(dense, embeddings="autoencoder", embedding_objective="nonlinear", method="svd", **options)


def tables(model):
    return model.get_input_embeddings(), model.get_output_embeddings()


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 10, 16])
def test_codes_are_the_longest_that_cost_no_more_than_a_linear_autoencoder_of_that_rank(rank):
    sizes = NonlinearTable(curved()).sizes(rank)

    numbers = sum(p.numel() for p in NonlinearAutoencoderEmbedding(V, D, sizes).parameters())

    budget = max(rank * (V + D) + D, cost(1))  # what does not pay for codes of one number stands for those
    assert numbers == cost(sizes["code_length"]) <= budget < cost(sizes["code_length"] + 1)
    assert budget == NonlinearAutoencoderEmbedding.num_weights(V, D, rank=rank)


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_the_budget_holds_and_every_number_is_reported(keep):
    small = small_model(rank=None, keep_targets=keep, target_modules=["word_embeddings"])

    (module,) = make_report(small).modules
    stored = sum(p.numel() for p in small.get_input_embeddings().parameters())
    assert module.parameters == stored == cost(module.rank, VOCABULARY, WIDTH)
    assert stored <= keep * VOCABULARY * WIDTH < cost(module.rank + 2, VOCABULARY, WIDTH)


@each_tying
def test_a_saved_folder_is_no_larger_than_asked_for(tied, tmp_path):
    dense = build("BertForMaskedLM", vocab_size=2000, tie_word_embeddings=tied)
    asked = overhead_bytes(dense, ["nonlinear_autoencoder_embedding", "pivoted"]) + 0.7 * parameter_bytes(dense)
    small = compress(dense, target_size=asked, embeddings="autoencoder", embedding_objective="nonlinear", method="svd")

    small.save_pretrained(tmp_path)

    assert type(small.get_input_embeddings()) is NonlinearAutoencoderEmbedding
    assert 0.9 * asked <= sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= asked


def test_a_budget_below_codes_of_one_number_says_what_is_reachable_and_that_works():
    with pytest.raises(InputError, match=r"keep_targets=0.05 is out of reach: the smallest .* is [\d.]+") as caught:
        small_model(rank=None, keep_targets=0.05, target_modules=["word_embeddings"])
    reachable = float(str(caught.value).partition("targets is ")[2].split(". ")[0])

    small = small_model(rank=None, keep_targets=reachable, target_modules=["word_embeddings"])

    assert small.config.plan["modules"]["embeddings.word_embeddings"]["code_length"] == 1


def test_training_finds_nearer_directions_than_the_linear_start_and_keeps_the_lengths():
    rows = curved()
    start = RowAutoencoder([rows_by_direction(rows)]).solve(3).products[0].float()

    (found,) = NonlinearTable(rows).at_sizes({"code_length": 3}).products

    errors = [1 - float(F.cosine_similarity(rows, other, dim=1).mean()) for other in (start, found)]
    assert errors[1] < 0.8 * errors[0]
    assert torch.allclose(found.norm(dim=1), rows.norm(dim=1), rtol=1e-5)


def test_the_seed_decides_and_nothing_else_is_drawn_from():
    rows, expected = curved(), torch.random.get_rng_state()

    tables = (NonlinearTable(rows, seed) for seed in (0, 0, 1))
    first, again, other = (table.at_sizes({"code_length": 3}) for table in tables)

    assert torch.equal(torch.random.get_rng_state(), expected)
    assert torch.equal(first.codes[0], again.codes[0])
    assert not torch.equal(first.codes[0], other.codes[0])


def test_a_killed_training_goes_on_and_no_other_is_taken_for_it(tmp_path):
    def killed(steps, description):
        for step in steps:
            if step == 40:
                raise KeyboardInterrupt
            yield step

    rows, kept, seen = curved(), Checkpoint(tmp_path, "table"), []
    TrainedTable(rows, checkpoint=kept).at_rank(3)
    expected = NonlinearTable(rows).at_sizes({"code_length": 3})
    with pytest.raises(KeyboardInterrupt):
        NonlinearTable(rows, checkpoint=kept, progress=killed).at_sizes({"code_length": 3})

    def watched(steps, description):
        seen.extend(steps)
        return steps

    found = NonlinearTable(rows, checkpoint=kept, progress=watched).at_sizes({"code_length": 3})

    assert seen[0] == 25
    assert torch.equal(found.codes[0], expected.codes[0])


@pytest.fixture
def trained(monkeypatch):
    """Code lengths of every training."""
    lengths, train = [], nonlinear_table.train_rows

    def noted(rows, start, *arguments, **options):
        lengths.append(start.basis.shape[0])
        return train(rows, start, *arguments, **options)

    monkeypatch.setattr(nonlinear_table, "train_rows", noted)
    return lengths


@pytest.mark.parametrize("allocation", ["energy", "measured"])
def test_only_the_chosen_size_is_trained(trained, allocation):
    small = small_model(rank=None, keep_targets=0.5, target_modules=["word_embeddings"], allocation=allocation)

    assert trained == [small.get_input_embeddings().rank]


def test_an_analysis_trains_nothing(trained):
    options = {"embeddings": "autoencoder", "embedding_objective": "nonlinear", "method": "svd"}

    found = analyze(
        build("BertForMaskedLM"), keep_targets=[0.5], target_modules=["word_embeddings"], latency=False, **options
    )

    assert [one.structure for m in found.matrices for one in m.planned] == ["nonlinear_autoencoder_embedding"]
    assert trained == []


@each_tying
@each_head
def test_table_and_head_compute_with_the_decoded_rows(head, tied, tmp_path):
    small = small_model(head, tied, torch.float64)
    dense = decompress(small)
    small.save_pretrained(tmp_path)

    table, output = tables(small)
    assert {type(one).__name__ for one in tables(dense)} == {"Embedding", "Linear"}
    assert torch.equal(table.to_dense(), output.to_dense()) == tied == (table.codes is output.codes)
    assert (small.config.plan.get("output_embeddings") is None) == tied
    assert_same_function(small, dense, inputs_for(head), tolerance=1e-10)
    assert_same_function(small, load_compressed(tmp_path), inputs_for(head))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_of_zeros_stays_zero(dtype):
    dense = build("BertForMaskedLM").to(dtype)
    with torch.no_grad():
        dense.get_input_embeddings().weight[5] = 0

    small = compress(dense, embeddings="autoencoder", embedding_objective="nonlinear", method="svd", rank=8)

    rows = small.get_input_embeddings()(torch.arange(VOCABULARY))
    assert not rows[5].any()
    assert bool(torch.isfinite(rows).all())


def test_each_token_of_a_batch_is_decoded_once():
    table, seen = NonlinearAutoencoderEmbedding(V, D, {"code_length": 3}), []
    table.decoder.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))

    table(torch.tensor([[7, 7, 9], [9, 0, 7]]))

    assert seen == [3]


def test_it_is_compiled_as_one_graph_in_which_no_shape_depends_on_the_tokens():
    table, graphs = NonlinearAutoencoderEmbedding(V, D, {"code_length": 3, "added": 4}).eval(), []
    ids = torch.tensor([[0, V - 4, 0, V - 5]])

    compiled = torch.compile(table, fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph)

    assert torch.allclose(compiled(ids), table.to_dense()[ids], atol=1e-6)
    assert len(graphs) == 1
    assert "unique" not in graphs[0]


@each_tying
@each_head
def test_rows_added_later_are_kept_as_they_are_and_dropped_first(head, tied, tmp_path):
    small = small_model(head, tied)
    before = [part.to_dense().detach() for part in tables(small)]
    inputs = {"input_ids": torch.arange(20)[None]}

    for size, added in [(VOCABULARY + 5, 5), (VOCABULARY + 9, 9), (VOCABULARY + 2, 2), (VOCABULARY, 0), (30, 0)]:
        small.resize_token_embeddings(size)
        small.save_pretrained(tmp_path)

        again = load_compressed(tmp_path)
        assert_same_function(small, again, inputs)
        for model in (small, again):
            table, output = tables(model)
            assert table.sizes == output.sizes == {"code_length": table.rank, **({"added": added} if added else {})}
            assert (table.codes is output.codes) == tied
            assert (table.added is output.added) == (tied or not added)
            for part, rows in zip((table, output), before, strict=True):
                expected = torch.cat([rows[:size], rows.mean(0).expand(added, -1)])
                assert torch.allclose(part.to_dense(), expected, atol=1e-6)


def test_a_banded_table_may_lose_whole_bands():
    small = compress(build("BertForMaskedLM"), embeddings="autoencoder", method="svd", rank=8)
    table = small.get_input_embeddings()
    count = len(table.bands)

    small.resize_token_embeddings(2)

    assert len(table.bands) < count
    assert torch.equal(table.to_dense(), small.get_output_embeddings().to_dense())


@each_tying
def test_added_rows_and_the_decoder_are_trained(tied):
    small = small_model("GPT2LMHeadModel", tied)
    small.resize_token_embeddings(VOCABULARY + 3)
    inputs = {"input_ids": torch.tensor([[1, VOCABULARY + 1, 2]])}
    before = small.get_input_embeddings().to_dense().detach()

    small.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(small.parameters(), lr=0.1).step()

    table, output = tables(small)
    changed = (table.to_dense() != before).any(dim=1)
    assert changed[1]
    assert changed[VOCABULARY + 1]
    assert torch.equal(table.to_dense(), output.to_dense()) == tied


@each_tying
def test_a_kept_weight_is_the_same_function_and_a_tied_head_uses_the_tables(tied):
    small = small_model(tied=tied).requires_grad_(False)
    small.resize_token_embeddings(VOCABULARY + 3)
    inputs = {"input_ids": torch.tensor([[1, 5, 5, VOCABULARY + 2]])}
    expected = outputs(small, inputs)["logits"]

    set_materialize_(small, "once")

    assert torch.allclose(outputs(small, inputs)["logits"], expected, atol=1e-5)
    assert [part._kept is not None for part in tables(small)] == [True, not tied]
    assert make_report(small).materialized_bytes == (1 if tied else 2) * (VOCABULARY + 3) * WIDTH * 4


def test_what_is_frozen_in_the_dense_model_is_frozen_with_its_decoder():
    dense = build("BertForMaskedLM", tie_word_embeddings=False)
    dense.get_output_embeddings().weight.requires_grad_(False)

    small = compress(dense, embeddings="autoencoder", embedding_objective="nonlinear", method="svd", rank=8)
    back = decompress(small).get_output_embeddings()

    trained = {name for name, p in small.get_output_embeddings().named_parameters() if p.requires_grad}
    assert trained == {"bias"}
    assert (back.weight.requires_grad, back.bias.requires_grad) == (False, True)


def test_a_number_of_added_rows_out_of_bounds_is_named():
    with pytest.raises(ValueError, match="added must be between 0 and 199 for 200 rows, got 200"):
        NonlinearAutoencoderEmbedding(V, D, {"code_length": 3, "added": 200})
