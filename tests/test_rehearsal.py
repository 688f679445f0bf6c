"""Before any work a dense model is run once; what cannot be replaced stays dense, and the report says so."""

import pytest
import torch
from shrunk import build_shrunk
from tiny_models import build
from torch import nn

from hf_lowrank import InputError, compress, make_report
from hf_lowrank.cli import main
from hf_lowrank.hosts.dummy_inputs import dummy_inputs
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.hosts.rehearsal import rehearse
from hf_lowrank.hosts.targets import READ_ELSEWHERE, computes_as_linear, find_matrices, is_in_block

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers' and torch's own

# Model type -> ends of the names of what the host itself computes with, and options that would replace that too.
READERS = {
    "mamba": ({"dt_proj"}, {"rank": 2}),
    "jamba": ({"dt_proj"}, {"rank": 2}),
    "mobilebert": ({"word_embeddings"}, {"keep_params": 0.6}),
}
# What the blocks are made of besides linear layers, by a few of each kind.
ODD = ["mamba", "convnext", "mixtral", "xlnet", "t5", "falcon"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model type -> the folder of a tiny dense model."""
    root = tmp_path_factory.mktemp("dense")
    for model_type in {*READERS, *ODD, "vit", "wav2vec2", "llava"}:
        build_shrunk(model_type).save_pretrained(root / model_type)
    return root


def untouched(model):
    return {one.name: one for one in make_report(model).untouched}


@pytest.mark.parametrize("model_type", READERS)
def test_a_matrix_that_its_host_computes_with_stays_dense_and_the_model_runs(folders, model_type):
    ends, options = READERS[model_type]
    dense = load_dense(folders / model_type)
    inputs = dummy_inputs(dense)

    small = compress(dense, method="svd", **options)

    assert {path.rpartition(".")[2] for path in rehearse(dense, find_matrices(dense)).read} == ends
    assert not any(name.endswith(tuple(ends)) for name in small.config.compression["modules"])
    assert small(**inputs)[0].isfinite().all()


def test_what_stays_dense_because_its_host_reads_it_is_said(folders):
    kept = untouched(compress(folders / "mamba", method="svd", keep_targets=0.5))

    assert {one.reason for name, one in kept.items() if name.endswith("dt_proj")} == {READ_ELSEWHERE}
    with pytest.raises(InputError, match=r"dt_proj' cannot be replaced"):
        compress(folders / "mamba", method="svd", keep_targets=0.5, target_modules=["dt_proj"])


def test_a_host_that_changes_its_own_weights_is_refused_and_not_changed():
    dense = build_shrunk("rwkv")
    before = {name: value.clone() for name, value in dense.state_dict().items()}

    with pytest.raises(InputError, match="changes its own weights while it runs"):
        compress(dense, method="svd", keep_targets=0.5)

    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


@pytest.mark.parametrize("model_type", ODD)
def test_the_report_says_of_every_block_matrix_what_became_of_it(folders, model_type):
    dense = load_dense(folders / model_type)
    whole = sum(p.numel() for name, p in dense.named_parameters() if p.dim() > 1 and is_in_block(name))

    report = make_report(compress(dense, method="svd", keep_targets=0.5))

    looked_at = sum(one.dense_parameters for one in report.modules if is_in_block(one.name))
    others = sum(one.parameters for one in report.untouched if is_in_block(one.name))
    assert looked_at + others == whole
    assert report.looked_at_fraction == looked_at / whole
    assert all(one.reason for one in report.untouched)


def test_convolutions_outside_of_the_blocks_are_named_too(folders):
    kept = untouched(compress(folders / "vit", method="svd", keep_targets=0.5))

    assert [one.reason for name, one in kept.items() if "patch_embeddings" in name] == ["a convolution"]


def test_less_than_half_looked_at_is_said_on_the_first_line(tmp_path, capsys):
    build("BertForMaskedLM").save_pretrained(tmp_path / "dense")
    asked = ["compress", str(tmp_path / "dense"), "out", "--method", "svd", "--keep-targets", "0.5", "--dry-run"]

    assert main([*asked, "--target-modules", "query"]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("warning: only ")
    assert main(asked) == 0
    assert "warning: only " not in capsys.readouterr().out


def test_a_subclass_of_a_linear_layer_is_taken_where_it_computes_the_same(folders):
    class Same(nn.Linear):
        def forward(self, inputs):
            return inputs @ self.weight.T + self.bias

    class Own(nn.Linear):
        pass

    class Other(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).relu()

    class Router(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs).topk(1)

    kinds = {kind.__name__: computes_as_linear(kind(6, 5)) for kind in (Same, Own, Other, Router)}
    assert kinds == {"Same": True, "Own": True, "Other": False, "Router": False}
    assert make_report(compress(folders / "falcon", method="svd", keep_targets=0.5)).looked_at_fraction == 1.0


@pytest.mark.parametrize("model_type", ["vit", "wav2vec2", "t5", "llava"])
def test_inputs_are_made_of_whatever_a_model_reads_and_its_generators_are_left_alone(folders, model_type):
    dense = load_dense(folders / model_type)
    state = torch.random.get_rng_state()

    inputs = dummy_inputs(dense)

    assert dense.main_input_name in inputs
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, inputs[name]) for name, value in dummy_inputs(dense).items())


def test_what_runs_inside_a_model_that_its_own_input_does_not_reach_is_run_too(folders):
    dense, called = load_dense(folders / "llava"), []
    tower = dense.model.vision_tower
    tower.register_forward_hook(lambda *_: called.append(tower))

    rehearse(dense, find_matrices(dense))

    assert called


def test_a_model_that_names_no_vocabulary_is_refused_in_one_line_where_tokens_are_drawn():
    with pytest.raises(InputError, match="names no vocab_size") as caught:
        compress(build_shrunk("canine"), keep_targets=0.5)
    assert "\n" not in str(caught.value)


def test_a_model_of_several_widths_is_compressed_by_images_and_refused_where_one_width_is_needed(folders):
    images = [{"pixel_values": torch.randn(2, 3, 32, 32)} for _ in range(3)]

    small = compress(folders / "convnext", keep_targets=0.5, calibration=images, fast=True)

    assert small.config.compression["modules"]
    with pytest.raises(InputError, match="needs one hidden size"):
        compress(folders / "convnext", method="tucker", keep_targets=0.5)


def test_a_host_that_lets_no_gradient_back_is_refused_where_one_is_needed_and_taken_without():
    dense = build_shrunk("reformer")

    with pytest.raises(InputError, match="No gradient comes back"):
        compress(dense, keep_targets=0.5)
    assert compress(dense, method="whitened_svd", keep_targets=0.5, fast=True).config.compression["modules"]
