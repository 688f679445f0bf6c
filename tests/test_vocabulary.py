"""A reduced vocabulary: the same outputs on its tokens, fewer rows, and a folder that works by itself."""

import pytest
import torch
from tiny_models import build
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_lowrank import compress
from hf_lowrank.cli import main
from hf_lowrank.compression.vocabulary import reduce_vocabulary
from hf_lowrank.errors import InputError
from hf_lowrank.sharing.saving import load_compressed, save_folder

KEPT = ["a bad cab", "dab a bead", "fed a cafe"]
TRAINING = [*KEPT, "face the bed", "the dead deaf geek", "high hedge beach", "I hid a bag"] * 3
UNKNOWN = "zyx \u2603"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROLES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def word_piece():
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    core.train_from_iterator(TRAINING, trainers.WordPieceTrainer(vocab_size=90, special_tokens=SPECIAL))
    ids = [core.token_to_id(name) for name in ("[SEP]", "[CLS]")]
    core.post_processor = processors.BertProcessing(("[SEP]", ids[0]), ("[CLS]", ids[1]))
    return PreTrainedTokenizerFast(tokenizer_object=core, **ROLES)


def byte_level():
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    core.train_from_iterator(TRAINING, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>")


def unigram():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=SPECIAL, unk_token="[UNK]")
    core.train_from_iterator(TRAINING, trainer)
    frame = [("[CLS]", core.token_to_id("[CLS]")), ("[SEP]", core.token_to_id("[SEP]"))]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    return PreTrainedTokenizerFast(tokenizer_object=core, **ROLES)


TOKENIZERS = {"WordPiece": word_piece, "BPE": byte_level, "Unigram": unigram}
HEADS = {"WordPiece": "BertForMaskedLM", "BPE": "GPT2LMHeadModel", "Unigram": "RobertaForMaskedLM"}
each_kind = pytest.mark.parametrize("kind", TOKENIZERS)


def pair(kind, **options):
    tokenizer = TOKENIZERS[kind]()
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    ids = {name: getattr(tokenizer, name) for name in names}
    return build(HEADS[kind], vocab_size=len(tokenizer), **{**ids, **options}), tokenizer


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


def names(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("tied", [True, False])
@each_kind
def test_outputs_on_its_tokens_are_those_of_the_whole_model(kind, tied):
    dense, tokenizer = pair(kind, tie_word_embeddings=tied)

    small, fewer = reduce_vocabulary(dense, tokenizer, KEPT)

    assert len(fewer) < len(tokenizer)
    assert small.config.vocab_size == small.get_input_embeddings().num_embeddings == len(fewer)
    old = [tokenizer.convert_tokens_to_ids(fewer.convert_ids_to_tokens(index)) for index in range(len(fewer))]
    assert old == sorted(old)
    for text in KEPT:
        assert names(fewer, text) == names(tokenizer, text)
        assert torch.allclose(logits(small, fewer, text), logits(dense, tokenizer, text)[:, old], atol=1e-6)


@each_kind
def test_what_cannot_be_spelt_is_unknown_or_bytes(kind):
    dense, tokenizer = pair(kind)

    small, fewer = reduce_vocabulary(dense, tokenizer, KEPT)

    found = names(fewer, UNKNOWN)
    assert logits(small, fewer, UNKNOWN).isfinite().all()
    assert fewer.decode(fewer(UNKNOWN)["input_ids"]) == UNKNOWN if kind == "BPE" else "[UNK]" in found


@each_kind
def test_special_tokens_keep_their_names_and_the_model_knows_their_ids(kind):
    dense, tokenizer = pair(kind)

    small, fewer = reduce_vocabulary(dense, tokenizer, KEPT)

    assert fewer.all_special_tokens == tokenizer.all_special_tokens
    assert small.config.pad_token_id == fewer.pad_token_id
    assert {small.get_input_embeddings().padding_idx} <= {fewer.pad_token_id, None}
    if tokenizer.eos_token_id is not None:
        assert small.config.eos_token_id == small.generation_config.eos_token_id == fewer.eos_token_id


@each_kind
def test_the_model_and_tokenizer_given_are_as_they_were(kind):
    dense, tokenizer = pair(kind)
    before = logits(dense, tokenizer, KEPT[0])
    expected = names(tokenizer, TRAINING[3])

    reduce_vocabulary(dense, tokenizer, KEPT)

    assert torch.equal(logits(dense, tokenizer, KEPT[0]), before)
    assert names(tokenizer, TRAINING[3]) == expected


@each_kind
def test_a_compressed_folder_of_it_works_by_itself(kind, tmp_path):
    dense, tokenizer = pair(kind)
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "vocab.txt").write_text("stale\n")
    small, fewer = reduce_vocabulary(dense, tokenizer, KEPT)
    compressed = compress(small, rank=5, embeddings="autoencoder", method="svd", tokenizer=fewer)

    folder = save_folder(compressed, tmp_path / "out", tmp_path / "dense", tokenizer=fewer)

    model, loaded = load_compressed(folder), AutoTokenizer.from_pretrained(folder)
    assert not (folder / "vocab.txt").exists()
    for text in [*KEPT, UNKNOWN]:
        assert loaded(text)["input_ids"] == fewer(text)["input_ids"]
        assert torch.equal(logits(model, loaded, text), logits(compressed, fewer, text))


def test_ids_may_be_given_instead_of_texts():
    dense, tokenizer = pair("WordPiece")
    wanted = tokenizer("a bad cab", add_special_tokens=False)["input_ids"]

    small, fewer = reduce_vocabulary(dense, tokenizer, torch.tensor(wanted))

    assert set(fewer.get_vocab()) == {*tokenizer.convert_ids_to_tokens(wanted), *SPECIAL}
    assert small.get_input_embeddings().weight.shape[0] == len(fewer)


def test_an_id_outside_is_named():
    dense, tokenizer = pair("WordPiece")

    with pytest.raises(InputError, match=r"vocabulary must hold ids from 0 to \d+, got 5000\."):
        reduce_vocabulary(dense, tokenizer, [1, 5000])


def test_a_compressed_model_is_refused():
    dense, tokenizer = pair("WordPiece")
    small = compress(dense, rank=5, method="svd")

    with pytest.raises(InputError, match="is compressed already"):
        reduce_vocabulary(small, tokenizer, KEPT)


def test_a_tokenizer_that_is_not_fast_is_refused():
    dense, _ = pair("WordPiece")

    with pytest.raises(InputError, match="dict is no fast tokenizer"):
        reduce_vocabulary(dense, {}, KEPT)


def test_the_command_reduces_compresses_and_saves_what_loads(tmp_path, capsys):
    dense, tokenizer = pair("WordPiece")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "texts.txt").write_text("\n".join(KEPT), encoding="utf-8")
    command = ["compress", tmp_path / "dense", tmp_path / "out", "--rank", 5, "--method", "svd", "--no-latency"]
    command += ["--embeddings", "autoencoder", "--vocabulary", tmp_path / "texts.txt"]

    status = main([str(argument) for argument in command])

    model, loaded = load_compressed(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert status == 0, capsys.readouterr().err
    assert type(model.get_input_embeddings()).__name__ == "AutoencoderEmbedding"
    assert model.get_input_embeddings().num_embeddings == len(loaded) < len(tokenizer)
    assert names(loaded, KEPT[0]) == names(tokenizer, KEPT[0])
