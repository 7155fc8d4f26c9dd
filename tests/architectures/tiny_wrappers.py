# SPDX-License-Identifier: Apache-2.0
"""The numbers of the tiny models with a vision or audio part: what each part sets beside its shape.

Placeholder ids of images and sounds lie above the vocabulary, so any text is text only.
"""

from __future__ import annotations

from architectures.tiny_text import FULL_HEADS, TEXT

PART_SHAPE: dict[str, object] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 1),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "encoder_attention_heads"), 2),
    "head_dim": 8,
    "patch_size": 4,
    **dict.fromkeys(("image_size", "max_image_size", "max_img_size"), 8),
    "initializer_range": 0.1,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [0],
    **dict.fromkeys(("pos_emb_height", "pos_emb_width", "posemb_grid_size"), 4),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "output_dim", "output_proj_dims", "adapter_out_dim"), 32),
    **dict.fromkeys(("projection_hidden_dim", "projection_intermediate_size"), 16),
    **dict.fromkeys(("d_model", "adapter_in_dim", "adapter_input_size"), 16),
    **dict.fromkeys(("encoder_ffn_dim", "moe_intermediate_size"), 24),
    **dict.fromkeys(("num_mel_bins", "n_mel_bins", "feature_size", "mel_vocab_size", "downsample_hidden_size"), 8),
    **dict.fromkeys(("max_source_positions", "max_position_embeddings"), 32),
}
"""Of vision and audio parts."""
TOP_SHAPE: dict[str, object] = {
    "initializer_range": 0.3,
    **dict.fromkeys(("image_token_index", "image_token_id"), 200),
    **dict.fromkeys(("video_token_index", "video_token_id"), 201),
    "audio_token_id": 202,
    **dict.fromkeys(("projection_hidden_size", "projector_hidden_size"), 16),
    "out_hidden_size": 32,
}
"""Of the whole."""
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

TEXT_PARTS: dict[str, dict[str, object]] = {
    "mistral_large4_text": FULL_HEADS,
    "qwen3_vl_moe_text": {"rope_parameters": MROPE, "norm_topk_prob": True},
    "qwen3_omni_moe_text": {"rope_parameters": MROPE, "norm_topk_prob": True},
    "qwen3_omni_moe_talker_text": {"rope_parameters": MROPE, "norm_topk_prob": True, "num_hidden_layers": 2},
    "glm4v_moe_text": {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
    "glm5_next_text": {
        **FULL_HEADS,
        "qk_rope_head_dim": 0,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "index_kpool": 4,
        "linear_num_heads": 4,
        "hc_mult": 2,
    },
    "hy_v4_vl_text": TEXT["hy_v4"] | {"rope_parameters": MROPE},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [24, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "muse_spark_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "moe_hidden_size": 16,
        "output_multiplier": 0.8,
    },
    "deepseek_ocr2_text": {
        **FULL_HEADS,
        "topk_method": "group_limited_greedy",
        "mlp_layer_types": ["dense"] + ["sparse"] * 3,
    },
    "unlimited_ocr_text": {**FULL_HEADS, "topk_method": "greedy"},
}
"""What text parts that are no models of their own set beside or instead of ``SHAPE``."""

THINKER = {
    "text_config": "qwen3_omni_moe_text",
    "vision_config": {},
    "audio_config": {},
    "vision_start_token_id": 203,
}
OCR = {
    "sam_config": {
        "num_hidden_layers": 1,
        "global_attn_indexes": [0],
        "window_size": 2,
        "output_channels": 16,
        "downsample_channels": [16, 16],
        "mlp_dim": 24,
    },
    "encoder_config": {},
}

WRAPPERS: dict[str, dict[str, object]] = {
    # tier A
    "qwen3_5_moe": {"text_config": "qwen3_5_moe_text", "vision_config": {}},
    "kimi_k25": {"text_config": "deepseek_v3", "vision_config": {}, "tie_word_embeddings": False},
    "gemma4": {"text_config": "gemma4_text", "vision_config": {}},
    # tier B
    "qwen4_exp": {"text_config": "qwen4_exp_text", "vision_config": {}},
    "qwen3_vl_moe": {"text_config": "qwen3_vl_moe_text", "vision_config": {}},
    "llama4": {
        "text_config": "llama4_text",
        "vision_config": {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "minimax_m3_vl": {"text_config": "minimax_m3_vl_text", "vision_config": {}},
    "step3p7": {"text_config": "step3p5", "vision_config": {"mlp_ratio": 1.5}},
    # tier C
    "mistral3": {"text_config": "mistral4", "vision_config": {"model_type": "pixtral"}},
    "mistral_large4": {
        "text_config": "mistral_large4_text",
        "vision_config": {"model_type": "pixtral"},
    },
    "glm4v_moe": {"text_config": "glm4v_moe_text", "vision_config": {}},
    "glm5_next": {"text_config": "glm5_next_text", "vision_config": {}},
    "hy_v4_vl": {"text_config": "hy_v4_vl_text", "vision_config": {}},
    "qwen3_omni_moe_thinker": THINKER,
    "qwen3_omni_moe": {"thinker_config": THINKER, "enable_audio_output": False},
    "aria": {"text_config": "aria_text", "vision_config": {"model_type": "idefics3_vision"}},
    "ernie4_5_vl_moe": {"text_config": "ernie4_5_vl_moe_text", "vision_config": {}},
    "muse_spark": {
        "text_config": "muse_spark_text",
        "vision_config": {},
        "audio_config": {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1]},
    },
    "dots3_note": {
        "text_config": "dots3_note_text",
        "vision_config": {"num_hidden_layers": 2, "pyramid_num_routed": [-1, 4]},
        "audio_config": {},
    },
    "inkling_mm_model": {"text_config": "inkling_text", "vision_config": {}, "audio_config": {}},
    "inkling2": {"text_config": "inkling2_text", "vision_config": {}},
    "inkling2_loop": {
        "text_config": "inkling2_loop_text",
        "vision_config": {"model_type": "inkling2_vision"},
    },
    "nemotron_h_omni": {
        "text_config": "nemotron_h",
        "vision_config": {"model_type": "radio", "video_temporal_patch_size": 2, "mlp_ratio": 1.5},
    },
    "deepseek_ocr2": {"text_config": "deepseek_ocr2_text", "vision_config": OCR},
    "unlimited_ocr": {"text_config": "unlimited_ocr_text", "vision_config": OCR},
}
"""The type of the text part and what each other part sets; a part that names no type has the wrapper's own class."""
