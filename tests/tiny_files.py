"""Folders and files that documentation speaks of, tiny: models with tokenizers, texts, data sets."""

import json
import random

from tiny_architectures import build_architecture
from tiny_media import PICTURES, image_processor
from tiny_models import build
from tiny_tokenizers import encoder_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertTokenizer, PreTrainedTokenizerFast

WORDS = "a film that is too long but never dull and the music of its best scenes stays with me for days"
_SIGNS = "abcdefghijklmnopqrstuvwxyz.,!?"


def word_piece_tokenizer():
    """One for encoders that spells every word."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_SIGNS, *(f"##{sign}" for sign in _SIGNS)]
    return BertTokenizer(vocab={name: number for number, name in enumerate(names)})


def byte_tokenizer():
    """One for causal language models, of one token a byte."""
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    core = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=names[-1], pad_token=names[-1])


def write_models(folder):
    """Dense models by the names the documentation gives them."""
    sizes = {"max_position_embeddings": 64}
    for name, head in {"my-bert": "BertForSequenceClassification", "my-qa-bert": "BertForQuestionAnswering"}.items():
        build(head, **sizes).save_pretrained(folder / name)
        word_piece_tokenizer().save_pretrained(folder / name)
    size = {"vocab_size": len(byte_tokenizer()), "n_positions": 64}
    build("GPT2LMHeadModel", **size).save_pretrained(folder / "my-gpt2")
    byte_tokenizer().save_pretrained(folder / "my-gpt2")
    _write_sentence_encoder(folder / "my-encoder")
    for name, head, reader in (
        ("my-bart", "BartForConditionalGeneration", encoder_tokenizer()),
        ("my-vit", "ViTForImageClassification", image_processor()),
    ):
        build_architecture(head).save_pretrained(folder / name)
        reader.save_pretrained(folder / name)


def _write_sentence_encoder(folder):
    build("BertModel", max_position_embeddings=64).save_pretrained(folder)
    word_piece_tokenizer().save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(kinds.items())
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 36, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def write_data(folder):
    """Texts, classified sentences, pairs with scores and pairs to read and write, drawn from a few words; images."""
    draw = random.Random(0)

    def sentence():
        return " ".join(draw.choices(WORDS.split(), k=draw.randint(4, 9)))

    for name, count in {"texts.txt": 60, "other-texts.txt": 20}.items():
        (folder / name).write_text("\n".join(sentence() for _ in range(count)))
    for name, count in {"train.tsv": 40, "dev.tsv": 20}.items():
        rows = [f"{sentence()}\t{number % 2}" for number in range(count)]
        (folder / name).write_text("\n".join(["sentence\tlabel", *rows]))
    rows = [f"{sentence()}\t{sentence()}\t{draw.random():.2f}" for _ in range(20)]
    (folder / "pairs.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *rows]))
    rows = [f"a b c d e f\t{' '.join('abcdef'[number % 6 :])}" for number in range(20)]
    (folder / "summaries.tsv").write_text("\n".join(["source\ttarget", *rows]))
    (folder / "photos").mkdir()
    for number, picture in enumerate(PICTURES):
        picture.save(folder / "photos" / f"{number}.png")
