"""Tiny models of many architectures, from configurations: of every kind whose keys transformers renames on the way.

Does not import hf_lowrank: the process that proves a saved folder needs no library uses this module too.
"""

import torch
import transformers
from transformers import AutoConfig

_TEXT = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}
_EXPERTS = {**_GROUPED, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
_IMAGE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 3,
}
_PYRAMID = {
    "depths": [1, 1],
    "num_heads": [1, 2],
    "embed_dim": 12,
    "image_size": 16,
    "patch_size": 2,
    "window_size": 2,
}

_SEQUENCES = {
    **{f"{half}_{part}": number for half in ("encoder", "decoder")
       for part, number in {"layers": 1, "attention_heads": 2, "ffn_dim": 24}.items()},
    "vocab_size": 61, "d_model": 16, "max_position_embeddings": 32, "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip

# Class of the model -> arguments of its configuration
ARCHITECTURES = {
    "GPTNeoXForCausalLM": _TEXT,
    "MixtralForCausalLM": {**_EXPERTS, "num_local_experts": 3},
    "Qwen2MoeForCausalLM": {**_EXPERTS, "num_experts": 3, "shared_expert_intermediate_size": 12},
    "PhimoeForCausalLM": {**_EXPERTS, "num_local_experts": 3},
    "GraniteMoeForCausalLM": {**_EXPERTS, "num_local_experts": 3},
    "DeepseekV3ForCausalLM": {
        **_EXPERTS, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "num_key_value_heads": 2, "kv_lora_rank": 6, "q_lora_rank": 6, "qk_rope_head_dim": 8, "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "SwinForImageClassification": _PYRAMID,
    "ViTForImageClassification": _IMAGE,
    "BeitForImageClassification": _IMAGE,
    "Dinov2ForImageClassification": {**_IMAGE, "mlp_ratio": 2},
    "YolosForObjectDetection": {**_IMAGE, "image_size": [16, 16], "num_detection_tokens": 3},
    "EsmForMaskedLM": {**_TEXT, "mask_token_id": 3, "pad_token_id": 1, "position_embedding_type": "rotary"},
    "NomicBertForMaskedLM": _TEXT,
    "ModernBertForMaskedLM": {**_TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "T5ForConditionalGeneration": {
        "vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0,
    },
    "PegasusForConditionalGeneration": _SEQUENCES,
    "MarianMTModel": _SEQUENCES,
    "BartForConditionalGeneration": _SEQUENCES,
    "LlavaForConditionalGeneration": {
        "text_config": {"model_type": "llama", **_GROUPED},
        "vision_config": {"model_type": "clip_vision_model", **_IMAGE}, "image_token_index": 5,
    },
    "Gemma3ForConditionalGeneration": {
        "text_config": {**_GROUPED, "sliding_window": 8},
        "vision_config": {**_IMAGE, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4,
    },
    "Gemma3ForCausalLM": {**_GROUPED, "sliding_window": 8},
    "MambaForCausalLM": {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "RwkvForCausalLM": {
        "vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "rescale_every": 0,
    },
    "Wav2Vec2ForCTC": {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    },
    "Qwen2VLForConditionalGeneration": {
        "text_config": {**_GROUPED, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 16, "patch_size": 4},
    },
    "JambaForCausalLM": {
        **_GROUPED, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    },
}  # fmt: skip


def build_architecture(name):
    """A dense model of random numbers, in evaluation mode."""
    model_class = getattr(transformers, name)
    config = AutoConfig.for_model(model_class.config_class.model_type, **ARCHITECTURES[name])
    torch.manual_seed(0)
    return model_class(config).eval()
