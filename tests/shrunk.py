"""Tiny models of every architecture that transformers lists: its own default configuration, shrunk by what fields are.

Does not import hf_lowrank: the process that proves saved folders needs no library uses this module too.
"""

import re

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

# The head of an architecture is the first of these that it has.
_HEADS = (
    "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM", "CTC",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION",
    "PRETRAINING",
    "SEQUENCE_CLASSIFICATION",
)  # fmt: skip
_LARGEST = 3_000_000  # parameters of what is called tiny

# Names of fields -> what a larger number becomes.
_NUMBERS = [
    (r"num_feat_extract_layers", 13),
    (r"(.*_)?vocab_size(_.*)?|num_embeddings", 99),
    (r".*(layers|n_layer|depth|num_blocks|num_layers_per_block|num_loops|iterations)", 2),
    (r"rotary_dim", 4),
    (r"(.*_)?(head_dim|head_size|d_kv|qk_nope_head_dim|v_head_dim|qk_rope_head_dim|dim_head)", 8),
    (r".*(key_value_heads|kv_heads|num_query_groups|n_head_kv|n_groups|num_ln_in_parallel_attn)", 2),
    (r".*(heads|n_head|num_head)", 4),
    (r".*(experts_per_tok|top_k|topk_group|n_group|num_selected_experts|moe_topk)", 1),
    (r".*(experts|num_experts_.*)", 4),
    (r".*(lora_rank|time_step_rank|dt_rank|low_rank.*|rank)", 8),
    ((r".*(intermediate_size|ffn_dim|d_ff|n_inner|mlp_dim|ffn_hidden_size|inner_dim|intermediate_dim|d_inner|"
     r"feed_forward_size|hidden_ff|ffn_embed_dim|dim_feedforward|mlp_hidden_size|intermediate_size_mlp|ff_dim)"), 48),
    ((r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|projection_dim|embedding_size|emb_dim|embed_proj_dim|"
     r"embedding_dim|proj_dim|width|model_dim|output_dim|conv_dim|proj_size|bottleneck_size|hidden_size_per_layer.*|"
     r"out_dim|n_embed|input_dim|feature_size|pooler_size|cross_attn_dim|output_proj_dim|out_hidden_size|"
     r"neck_hidden_sizes|d_embed|dim|decoder_hidden|hidden_channels|channels|num_channels_latents|out_channels|"
     r"lru_width|classifier_proj_size|text_hidden|kv_dim|q_dim|dim_out|latent_dim|d_latents)"), 32),
    ((r".*(max_position_embeddings|n_positions|n_ctx|max_.*_positions|max_seq_len|max_sequence_length|num_positions|"
     r"max_target_positions|context_length|max_seq_length|max_position.*|max_relative_positions)"), 64),
    (r".*(image_size|img_size|input_size|crop_size)", 32),
    (r"patch_size|patch_size_.*", 8),
    (r".*(window_size|sliding_window|attention_window|chunk_size|local_attention|attention_chunk_size)", 8),
    (r".*(num_queries|num_query_tokens|num_latents|num_detection_tokens|max_length|num_buckets)", 16),
]  # fmt: skip
_FIRST_TOKEN = 3  # of those that mean something, where the given one is beyond the vocabulary

# Model type -> fields that go before what the rules say; None leaves the default.
_NO_DEFAULTS = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_WINDOWS = {"depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "patch_size": 4}
_ROUTED = {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
_ROTARY = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
_SECTIONS = {"text_config": {"rope_parameters": _ROTARY}}
RECIPES = {
    "esm": {"vocab_size": 33, "mask_token_id": 4, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "ministral": _NO_DEFAULTS,
    "hunyuan_v1_dense": _NO_DEFAULTS,
    "hunyuan_v1_moe": _NO_DEFAULTS,
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "swin": _WINDOWS,
    "donut-swin": _WINDOWS,
    "swinv2": _WINDOWS,
    "maskformer-swin": _WINDOWS,
    "deepseek_v2": _ROUTED,
    "dots1": {**_ROUTED, "moe_intermediate_size": 16},
    "ernie4_5_moe": {"moe_k": 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "attention_head_dim": 16},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "qwen2_vl": _SECTIONS,
    "qwen2_5_vl": _SECTIONS,
    "glm4v": _SECTIONS,
    "glm46v": _SECTIONS,
    "glm_ocr": _SECTIONS,
    "paddleocr_vl": _SECTIONS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "use_mamba_kernels": False},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "mpnet": {"relative_attention_num_buckets": 32},
    "udop": {"relative_attention_num_buckets": 32},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "reformer": {
        "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 8], "attn_layers": ["local", "lsh"],
        "attention_head_size": 8, "is_decoder": False, "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4,
    },
    "gemma3n_text": {"intermediate_size": 48, "num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "autoformer": {"prediction_length": 4},
    "informer": {"prediction_length": 4},
    "time_series_transformer": {"prediction_length": 4},
    "bit": {"num_groups": 4},
    "cvt": {"embed_dim": [16, 32, 32], "num_heads": [1, 2, 2], "depth": [1, 1, 2]},
}  # fmt: skip


def head_of(model_type):
    """Name of the class that is tried of a model type; None where transformers lists none."""
    for head in _HEADS:
        names = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
        if model_type in names:
            return _first(names[model_type])
    return _first(modeling_auto.MODEL_MAPPING_NAMES.get(model_type))


def _first(names):
    return names if names is None or isinstance(names, str) else names[0]


def shrunk(config, recipe=None):
    """Fields that make a configuration like this one small."""
    found, tokens = {}, iter(range(_FIRST_TOKEN, 90))
    parts = {name for name in config.sub_configs if getattr(config, name, None) is not None}
    found |= _kinds_of_layers(config)
    for name, value in config.to_dict().items():
        if name in parts:
            part = getattr(config, name)
            found[name] = {"model_type": part.model_type, **shrunk(part)}
        elif name in found:
            continue
        elif re.fullmatch(r".*token_?(id|index|ids)", name) and isinstance(value, int) and value >= 90:
            found[name] = next(tokens)
        elif (small := _small(name, value)) != value:
            found[name] = small
    for name, value in (recipe or {}).items():
        if value is None:
            found.pop(name, None)
        elif isinstance(value, dict) and isinstance(found.get(name), dict):
            found[name] |= value
        else:
            found[name] = value
    return found


def _kinds_of_layers(config):
    """A layer of each kind, sections of the rotary embedding that fit the small heads, and heads that stay as many."""
    found = {}
    kinds = [*dict.fromkeys(getattr(config, "layer_types", None) or [])]
    if len(kinds) > 1 and not isinstance(getattr(type(config), "layer_types", None), property):
        found |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    rope = getattr(config, "rope_parameters", None) or {}
    if "mrope_section" in rope:
        found["rope_parameters"] = {**rope, "mrope_section": [1, 1, 2]}
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        found["decoder_start_token_id"] = 0
    heads = getattr(config, "num_attention_heads", None)
    if type(heads) is int and heads == getattr(config, "num_key_value_heads", None):
        found["num_key_value_heads"] = min(heads, 4)
    return found


def _small(name, value):
    if isinstance(value, (list, tuple)) and value and all(type(part) is int for part in value):
        parts = [_small(name.removesuffix("s"), part) for part in value]
        return parts if parts != list(value) else [_small(name, part) for part in value]
    if type(value) is not int:
        return value
    return next((min(value, most) for pattern, most in _NUMBERS if re.fullmatch(pattern, name)), value)


def build_shrunk(model_type):
    """A dense model of random numbers, in evaluation mode.

    Raises:
        ValueError: If it is not tiny.
    """
    config_class, model_class = CONFIG_MAPPING[model_type], getattr(transformers, head_of(model_type))
    config = config_class(**shrunk(config_class(), RECIPES.get(model_type)))
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{model_type} has {size / 1e6:.1f} million parameters.")
    torch.manual_seed(0)
    return model_class(config).eval()


@torch.no_grad()
def outputs_of(model, inputs, goes_on):
    """Every tensor that a model returns, by its place, and the tokens it goes on with."""
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()  # where tensors are made, not in a mapped file: some products depend on that
    torch.manual_seed(0)
    found = {}
    for name, value in model.eval()(**inputs).items():
        for place, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, torch.Tensor):
                found[f"{name}.{place}"] = part.clone().contiguous()
    if goes_on:
        started = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
        found["generated"] = model.generate(**started, max_new_tokens=3, do_sample=False).contiguous()
    return found
