"""Tokenizers of one token a letter, made from constructors."""

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizer(**special):
    """`[PAD]` 0, `[CLS]` 1, `[SEP]` 2, `[MASK]` 3, `a` 4; those named in `special` have their roles."""
    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    core = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="[PAD]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if "mask_token" in special:
        core.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", **special)


def encoder_tokenizer():
    """One for masked language models: it frames each text."""
    return make_tokenizer(mask_token="[MASK]", cls_token="[CLS]", sep_token="[SEP]")


def decoder_tokenizer():
    """One for causal language models: `[SEP]` ends a text."""
    return make_tokenizer(eos_token="[SEP]")
