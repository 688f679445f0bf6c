"""A corrected bias makes the mean output right, and never the error on the text larger."""

import pytest
import torch
from every_method import SOLVERS
from tiny_models import VOCABULARY, build

from hf_lowrank import compress

NAME = "encoder.layer.0.intermediate.dense"  # the first matrix' input is that of the dense model in a compressed one


def text():
    ids = torch.randint(3, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]


def layer_error(method, storage="low_rank", **options):
    """Mean and mean squared length of what the layer's outputs miss on the text its statistics are of, in float64."""
    dense = build("BertModel").double()
    small = compress(
        dense,
        rank=5,
        method=method,
        storage=storage,
        target_modules=[NAME],
        calibration=text(),
        anchored=False,
        refine_passes=0,
        **options,
    )
    seen = []
    hook = dense.get_submodule(NAME).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for batch in text()[:-1]:  # the last is for measuring ranks
            dense(**batch)
        hook.remove()
        inputs = torch.cat(seen).flatten(end_dim=1)
        missed = dense.get_submodule(NAME)(inputs) - small.get_submodule(NAME)(inputs)
    return missed.mean(dim=0), missed.square().sum(dim=1).mean().item()


@pytest.mark.parametrize("storage", ["low_rank", "pivoted"])
@pytest.mark.parametrize("method", SOLVERS)
def test_the_mean_output_is_that_of_the_dense_layer_and_the_error_is_no_larger(method, storage):
    mean, error = layer_error(method, storage)
    corrected_mean, corrected_error = layer_error(method, storage, bias_correction=True)

    assert corrected_mean.abs().max() < 1e-5 < mean.abs().max()
    assert corrected_error == pytest.approx(error - mean.square().sum().item(), rel=1e-4)


def test_a_layer_without_bias_has_none_to_correct():
    small = compress(build("LlamaForCausalLM"), keep_targets=0.5, bias_correction=True, calibration=text(), fast=True)

    assert not [name for name in small.state_dict() if name.endswith("bias")]
