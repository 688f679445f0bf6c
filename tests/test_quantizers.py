"""What is saved in floats survives quantizers of other people that know nothing of factors."""

import copy
import warnings

import pytest
import torch
from every_structure import OF_ANY_MODEL, build_every_structure, structures_with
from tiny_models import build
from torch import nn
from transformers import AutoModel

from hf_lowrank import compress, decompress
from hf_lowrank.compression.settings import STORAGES
from hf_lowrank.hosts.targets import find_matrices
from hf_lowrank.methods.rotation import rotate_
from hf_lowrank.remote_code.lowrank_structures import named_structures


def spectra_like_those_of_trained_models(head="BertModel"):
    """A model whose matrices have few large singular values, and a few rows that are longer than the others."""
    model = build(head, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    generator = torch.Generator().manual_seed(0)
    for matrix in find_matrices(model):
        if matrix.role == "block":
            rows, columns = matrix.shape
            left, right = (torch.randn(size, size, generator=generator) for size in (rows, columns))
            rank = min(rows, columns)
            values = 4 * torch.arange(1, rank + 1) ** -0.7
            weight = torch.linalg.qr(left).Q[:, :rank] * values @ torch.linalg.qr(right).Q[:rank]
            weight[torch.randperm(rows, generator=generator)[:3]] *= 4
            matrix.weight.data.copy_(weight)
    return model


def in_8_bits_of_one_scale(model):
    """torch's dynamic quantization of linear layers: one scale a matrix, one for the states of a call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is to drop it
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def lost(model):
    """Relative distance of its outputs in 8 bits from its own."""
    inputs = torch.randint(0, 90, (8, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own, found = (one(inputs).last_hidden_state for one in (model, in_8_bits_of_one_scale(model)))
    return float((found - own).norm() / own.norm())


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("keep", [0.8, 0.5])
def test_what_compress_saves_loses_no_more_than_the_dense_model_it_stands_for(tmp_path, keep, storage):
    model = spectra_like_those_of_trained_models()
    compress(model, method="svd", keep_targets=keep, storage=storage).save_pretrained(tmp_path)
    small = AutoModel.from_pretrained(tmp_path).eval()

    assert lost(small) <= lost(decompress(small))


def test_no_component_stands_out_in_two_factors():
    small = compress(spectra_like_those_of_trained_models(), method="svd", keep_targets=0.5, storage="low_rank")

    for _, pair in named_structures(small):
        lengths = pair.down.weight.norm(dim=1)
        assert lengths.max() < 3 * lengths.min()


@pytest.mark.parametrize("structure", OF_ANY_MODEL)
def test_turning_factors_changes_nothing(structure):
    model = build_every_structure("BertForMaskedLM", structures_with(structure)).double()
    before = {name: one.to_dense() for name, one in named_structures(model)}

    rotate_(model)

    assert before
    for name, one in named_structures(model):
        torch.testing.assert_close(one.to_dense(), before[name])
