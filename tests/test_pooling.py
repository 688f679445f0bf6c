"""How an encoder's hidden states become one vector: as its folder says, wherever it is measured."""

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tiny_models import build
from tiny_tokenizers import encoder_tokenizer
from torch.nn import functional as F

from hf_lowrank import compress
from hf_lowrank.hosts.loading import load_dense
from hf_lowrank.hosts.outputs import run
from hf_lowrank.hosts.pooling import POOLINGS, pooled, pooling_of
from hf_lowrank.sharing.saving import save_folder

TEXTS = ["a small text", "another text of the kind that is longer than the first", "a"]
OLD = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}


def encoder(folder, mode):
    """The folder of a sentence encoder that pools in that way."""
    build("BertModel").save_pretrained(folder / "model")
    encoder_tokenizer().save_pretrained(folder / "model")
    transformer = Transformer(str(folder / "model"))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=mode)
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "encoder"))
    return folder / "encoder"


@pytest.mark.parametrize("mode", [*POOLINGS, ("cls", "mean")], ids=str)
def test_an_encoder_is_measured_by_the_vectors_that_its_folder_makes(mode, tmp_path):
    folder = encoder(tmp_path, mode)
    dense, batch = load_dense(folder), dict(encoder_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    small = compress(folder, method="svd", rank=8)
    save_folder(small, tmp_path / "small", folder)

    for model, source in ((dense, folder), (small, tmp_path / "small")):
        expected = SentenceTransformer(str(source), device="cpu", trust_remote_code=True).encode(
            TEXTS, convert_to_tensor=True
        )

        torch.testing.assert_close(run(model, batch).rows, F.normalize(expected, dim=-1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", OLD)
def test_the_way_that_older_folders_say_it_is_read_too(mode, tmp_path):
    folder = encoder(tmp_path, "mean")
    said = ", ".join(f'"pooling_mode_{name}": {str(one == mode).lower()}' for one, name in OLD.items())
    (folder / "1_Pooling" / "config.json").write_text(f"{{{said}}}")

    assert pooling_of(load_dense(folder)) == (mode,)


@pytest.mark.parametrize("damage", ["{", "[]", '{"pooling_mode": "unheard of"}', '{"pooling_mode": 3}'])
def test_a_folder_that_says_nothing_of_use_means_the_mean(damage, tmp_path):
    folder = encoder(tmp_path, "cls")
    (folder / "1_Pooling" / "config.json").write_text(damage)

    assert pooling_of(load_dense(folder)) == ("mean",)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mode", POOLINGS)
def test_padding_changes_no_vector(mode, side):
    states = torch.randn(1, 5, 7, generator=torch.Generator().manual_seed(0))
    padding = (0, 0, 3, 0) if side == "left" else (0, 0, 0, 3)
    mask = F.pad(torch.ones(1, 5), padding[2:])

    torch.testing.assert_close(pooled(F.pad(states, padding, value=9.0), mask, [mode]), pooled(states, None, [mode]))
