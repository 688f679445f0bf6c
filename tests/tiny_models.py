"""Tiny dense models of every head of several families, made from constructors: no downloads, and odd sizes.

Does not import hf_lowrank: the processes that prove a saved folder needs no library use this module too.
"""

import importlib

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

VOCABULARY, WIDTH, INNER, POSITIONS = 97, 36, 70, 40

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
}
_DECODER = {**_ENCODER, "bos_token_id": 1, "eos_token_id": 2}

# model type -> arguments of its configuration
CONFIGURATIONS = {
    "bert": _ENCODER,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "roberta": {**_ENCODER, "pad_token_id": 1},
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": WIDTH,
        "n_layers": 2,
        "n_heads": 3,
        "hidden_dim": INNER,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
    },
    "llama": _DECODER,
    # Listed in no table of the library.
    "electra": {**_ENCODER, "embedding_size": 28},
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "word_embed_proj_dim": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "ffn_dim": INNER,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def heads_of(family):
    """Names of every model class of a family: its base and each head."""
    config_class = type(AutoConfig.for_model(family))
    modeling = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    names = (name for name in modeling.__all__ if not name.endswith("PreTrainedModel"))
    return sorted(name for name in names if issubclass(getattr(modeling, name), PreTrainedModel))


def family_of(head):
    """The family a model class belongs to."""
    return getattr(transformers, head).config_class.model_type


def build(head, seed=0, **options):
    """A dense model in evaluation mode whose every parameter is random, biases and norms too."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family_of(head), **{**CONFIGURATIONS[family_of(head)], **options})
    model = getattr(transformers, head)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs_for(head, length=11):
    """Token ids without padding; three choices each for the heads that choose."""
    has_choices = "MultipleChoice" in head or "DoubleHeads" in head
    shape = (2, 3, length) if has_choices else (2, length)
    return {"input_ids": torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))}


def outputs(model, inputs):
    """Every tensor a model returns, by name."""
    with torch.no_grad():
        result = model(**inputs)
    return {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}


def largest_difference(first, second):
    """The largest absolute difference between two results of `outputs`."""
    assert first.keys() == second.keys(), f"{sorted(first)} against {sorted(second)}"
    assert first, "there is no output to compare"
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def assert_same_function(first, second, inputs, tolerance=0.0):
    """Two models give equal outputs."""
    difference = largest_difference(outputs(first, inputs), outputs(second, inputs))
    assert difference <= tolerance, f"outputs differ by {difference}"
