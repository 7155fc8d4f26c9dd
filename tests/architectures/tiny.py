# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every type with routed experts that transformers 5.24 can build. No network.

``tiny_model("glm4_moe")`` is in evaluation mode and has 12 experts, a number no other dimension has. Everything that
transformers starts at zero or one (selection biases, scales, norms, sinks) holds random values, routers have opinions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

EXPERTS = 12
VOCABULARY = 96
SHAPE: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), 3),
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 2,
    "topk_group": 1,
    **dict.fromkeys(("routed_scaling_factor", "router_scaling_factor", "route_scale"), 1.5),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 28),
    # attention
    "sliding_window": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
}
"""What a configuration class has no field for is left out."""
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
FULL_HEADS = {"num_key_value_heads": 4}

TEXT: dict[str, dict[str, object]] = {
    # tier A
    "qwen3_moe": {"mlp_only_layers": [1], "norm_topk_prob": True},
    "qwen3_5_moe_text": {},
    "gpt_oss": {},
    "glm4_moe": {"use_qk_norm": True},
    "sarvam_moe": {},
    "deepseek_v3": FULL_HEADS,
    "sarvam_mla": FULL_HEADS,
    "minimax_m2": {"rotary_dim": 4},
    "glm_moe_dsa": {**FULL_HEADS, "index_topk_freq": 2},
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "compressed_sparse_attention",
        ],
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "o_groups": 2,
        "o_lora_rank": 8,
        "hc_mult": 2,
        "index_topk": 4,
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
        "final_logit_softcapping": 30.0,
    },
    "qwen3_next": {},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 28,
        "ssm_state_size": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 16,
        "rescale_prenorm_residual": False,
    },
    "glm4_moe_lite": FULL_HEADS,
    # tier B
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "ple_layer_ids": [1],
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 64,
        "make_ngram_vocab_size_divisible_by": 8,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "deepseek_v32": FULL_HEADS,
    "llama4_text": {
        "intermediate_size_mlp": 28,
        "num_experts_per_tok": 2,
        "moe_layers": [1, 2, 3],
        "attention_chunk_size": 16,
    },
    "ernie4_5_moe": {},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "embedding_multiplier": 1.5,
        "position_embedding_type": "rope",
    },
    "granitemoe": {},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "dense_intermediate_size": 24,
        "intermediate_size": 20,
        "rotary_dim": 4,
        "index_head_dim": 8,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    },
    "hy_v3": {},
    "mimo_v2_flash": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "bailing_hybrid": {**FULL_HEADS, "layer_group_size": 2, "q_lora_rank": None},
    "olmoe": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mixtral": {"intermediate_size": 20},
}
"""What each text type sets beside or instead of ``SHAPE``."""


def _sized(model_type: str, values: dict[str, object], shape: dict[str, object] = SHAPE) -> dict[str, object]:
    """The part of ``shape`` that the configuration class has fields for, and ``values``."""
    known = {field.name for field in fields(CONFIG_MAPPING[model_type])}
    return {name: value for name, value in shape.items() if name in known} | values


def tiny_config(model_type: str, **settings: object) -> PreTrainedConfig:
    """The configuration of a tiny model. ``settings`` are keys of it, or of its text part where it has one."""
    return AutoConfig.for_model(model_type, **_sized(model_type, {**TEXT[model_type], **settings}))


TINY: dict[str, Callable[[], PreTrainedConfig]] = {name: partial(tiny_config, name) for name in TEXT}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class transformers loads for the whole of ``config``."""
    causal = AutoModelForCausalLM._model_mapping
    text = config.get_text_config(decoder=True)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        if type(config) not in auto._model_mapping:
            continue
        found = auto._model_mapping[type(config)]
        text_only = type(text) is not type(config) and type(text) in causal and causal[type(text)] is found
        if not text_only:
            return found
    raise ValueError(f"transformers has no generating class for {config.model_type}")


def tiny_model(
    model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **settings: object
) -> PreTrainedModel:
    """A tiny random model in evaluation mode; of another ``dtype`` with the same numbers, rounded as on loading."""
    config = tiny_config(model_type, **settings)
    cls = model_class(config)
    config.architectures = [cls.__name__]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(config, dtype=torch.float32).eval()
        stir(model)
    if dtype != torch.float32:
        numbers = model.state_dict()
        model = cls._from_config(config, dtype=dtype).eval()
        kept = list(model._get_dtype_plan(dtype))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if kept and re.search("|".join(kept), name):
                tensor.data = tensor.data.float()
        model.load_state_dict(numbers)
    return model


@torch.no_grad()
def stir(model: PreTrainedModel) -> None:
    """Fill what was started at one value: zeros with N(0, 0.2), others times 0.5 to 1.5; hash tables with ids."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(len(tensor), EXPERTS).argsort(1)[:, : tensor.shape[1]])
        elif tensor.is_floating_point() and tensor.isfinite().all() and len(tensor.unique()) == 1:
            if tensor.max() == 0:
                tensor.normal_(0, 0.2)
            else:
                tensor.mul_(torch.empty_like(tensor).uniform_(0.5, 1.5))


UPSTREAM: dict[str, str] = {}
"""What transformers 5.24 cannot do with an unpruned model of a type: the first line of its error."""
