"""Statistics are what they say: moments of what the matrices saw, padding left out, the same however it is batched."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_models import build

from hf_lowrank import InputError
from hf_lowrank.hosts.outputs import run
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.statistics.collection import STATISTICS, collect_statistics
from hf_lowrank.statistics.moments import Statistics
from hf_lowrank.statistics.panels import from_panels, gram_panels

EVERY = frozenset(STATISTICS)


def batch_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=generator)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()}


@pytest.fixture
def collect(tmp_path):
    def collected(model, batches, kinds=EVERY, name="statistics", **options):
        path = tmp_path / "deep" / f"{name}.safetensors"
        return collect_statistics(model, find_matrices(model), batches, kinds, path=path, fingerprint="abc", **options)

    return collected


def assert_equal(first, second, **tolerance):
    """The same statistics of every matrix; bit for bit, if no tolerance is given."""
    assert (first.names, first.inputs) == (second.names, second.inputs)
    for name in first:
        assert first[name].num_tokens == second[name].num_tokens
        for field in ("input_moment", "input_mean", "output_moment", "fisher", "row_weights"):
            one, other = getattr(first[name], field), getattr(second[name], field)
            assert (one is None) == (other is None)
            is_same = torch.allclose if tolerance else torch.equal
            assert one is None or is_same(one, other, **tolerance), (name, field)


def test_a_part_that_the_host_runs_without_gradients_has_moments_of_its_inputs_alone(collect, monkeypatch):
    model = build("BertForMaskedLM").eval()
    attention = type(model.bert.encoder.layer[0].attention.self)
    monkeypatch.setattr(attention, "forward", torch.no_grad()(attention.forward))

    found = collect(model, [batch_of([9, 4])])["encoder.layer.0.attention.self.query"]

    assert found.input_moment is not None
    assert found.output_moment is None


@pytest.mark.parametrize("name", ["BertModel", "GPT2LMHeadModel"])
def test_input_moment_and_mean_are_those_of_the_real_inputs(collect, name):
    model, batch = build(name).eval(), batch_of([9, 4])
    matrix = find_matrices(model)[0]
    seen = []
    hook = matrix.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run(model, batch)
    hook.remove()

    rows = seen[0][batch["attention_mask"].bool()].double()
    found = collect(model, [batch])[matrix.name]

    assert torch.allclose(found.input_moment, rows.T @ rows / 13, rtol=1e-4, atol=1e-6)
    assert found.input_mean.dtype == torch.float64
    assert torch.allclose(found.input_mean, rows.mean(dim=0), rtol=1e-5, atol=1e-7)


def test_padding_changes_nothing(collect):
    model = build("BertModel").eval()
    short = batch_of([6])
    padded = {name: torch.cat([values, torch.zeros(1, 5).long()], dim=1) for name, values in short.items()}

    first, second = collect(model, [short]), collect(model, [padded], name="padded")

    assert {matrix.num_tokens for matrix in first.values()} == {6}
    assert_equal(first, second, rtol=1e-3, atol=1e-6)


def test_input_moments_do_not_depend_on_the_batching(collect):
    model, batch = build("BertModel").eval(), batch_of([9, 9])
    halves = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(2)]

    whole = collect(model, [batch], frozenset({"input_moment"}))
    parts = collect(model, halves, frozenset({"input_moment"}), name="parts")

    assert_equal(whole, parts, rtol=1e-4, atol=1e-7)


def test_query_key_and_value_share_one_input_moment_and_mean(collect):
    found = collect(build("BertModel"), [batch_of([9])], frozenset({"input_moment"}))
    first = "encoder.layer.0.attention.self"

    assert found.inputs[f"{first}.key"] == found.inputs[f"{first}.value"] == f"{first}.query"
    for kind in ("input_moment", "input_mean"):
        assert torch.equal(getattr(found[f"{first}.key"], kind), getattr(found[f"{first}.query"], kind))
    with safe_open(found.paths[0], framework="pt") as file:
        assert {key for key in file.keys() if f"{first}.key" in key} == {f"count/{first}.key"}  # noqa: SIM118


@pytest.mark.parametrize(
    "name",
    ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForQuestionAnswering", "GPT2LMHeadModel"],
)
def test_gradient_moments_exist_for_every_head_and_are_positive(collect, name):
    model = build(name)
    found = collect(model, [batch_of([9, 5])])

    for matrix in find_matrices(model):
        statistics = found[matrix.name]
        moment = statistics.input_moment if matrix.role == "embedding" else statistics.output_moment
        assert moment.shape == (matrix.shape[1 if matrix.role == "embedding" else 0],) * 2
        values = torch.linalg.eigvalsh(moment)
        assert values.min() >= -1e-6 * values.max()
        assert values.max() > 0


def test_row_weights_count_the_tokens(collect):
    batch = batch_of([9, 4])
    model = build("BertModel")
    name = next(matrix.name for matrix in find_matrices(model) if matrix.role == "embedding")

    weights = collect(model, [batch], frozenset({"row_weights"}))[name].row_weights

    assert weights.sum().item() == pytest.approx(1)
    assert weights[batch["input_ids"][0, 0]] >= 1 / 13


def test_collecting_leaves_the_model_as_it_was(collect):
    model = build("BertForMaskedLM").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    collect(model, [batch_of([9])])

    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_statistics_are_read_from_their_file_alone(collect):
    found = collect(build("BertModel"), [batch_of([9])])

    loaded = Statistics.load(found.paths[0])

    assert loaded.fingerprint == "abc"
    assert_equal(found, loaded)
    assert list(found.paths[0].parent.iterdir()) == [found.paths[0]]


@pytest.mark.parametrize("width", [1, 255, 256, 257, 600])
def test_panels_make_the_whole_symmetric_matrix(width):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, width, dtype=torch.float64, generator=generator)
    weights = torch.rand(40, 1, dtype=torch.float64, generator=generator)

    assert torch.allclose(from_panels(dict(gram_panels(rows))), rows.T @ rows, rtol=1e-12)
    assert torch.allclose(from_panels(dict(gram_panels(rows, weights))), (rows * weights).T @ rows, rtol=1e-12)


def test_an_output_moment_is_that_of_gradients_no_longer_than_ten_times_the_mean(collect, monkeypatch):
    monkeypatch.setattr("hf_lowrank.statistics.collection._MOST_DRAWS", 1)
    model = build("BertModel")
    matrix = find_matrices(model)[-2]
    seen = []

    def outlying(gradient):
        scales = torch.ones(gradient.shape[1], 1)
        scales[3] = 1e6
        seen.append(gradient * scales)
        return seen[-1]

    hook = matrix.module.register_forward_hook(lambda module, inputs, output: output.register_hook(outlying) and None)
    found = collect(model, [batch_of([30])])[matrix.name].output_moment
    hook.remove()

    rows = seen[0][0].double()
    lengths = rows.norm(dim=1, keepdim=True)
    short = rows * (10 * lengths.mean() / lengths).clamp(max=1)
    assert short.norm() < 0.5 * rows.norm()
    assert torch.allclose(found, short.T @ short / 30, rtol=1e-4, atol=1e-6 * float(found.abs().max()))


def test_another_file_is_refused(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")

    with pytest.raises(InputError, match="holds no statistics"):
        Statistics.load(tmp_path / "other.safetensors")
