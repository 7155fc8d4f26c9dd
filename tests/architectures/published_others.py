# SPDX-License-Identifier: Apache-2.0
"""Folders laid out as OpenAI, Qwen, MiniMax, IBM, NVIDIA, Baidu and Google publish."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from architectures.published_deepseek import LINEAR, fp8_config
from architectures.published_files import (
    config_of,
    of_version_4,
    quantised,
    random_like,
    renamed,
    saved,
    sibling,
    under,
)
from architectures.published_formats import Tensors, to_fp8, to_mxfp4, write
from architectures.tiny import tiny_model
from transformers import PreTrainedModel


def gpt_oss_mxfp4(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """gpt-oss: experts fused, in four-bit floats by rows of the output, gate and up rows in turn; biases are not."""
    model = model or tiny_model("gpt_oss", dtype=torch.bfloat16, intermediate_size=64)
    tensors = saved(model)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        parts = to_mxfp4(tensors.pop(name).transpose(-1, -2))
        tensors[name + "_blocks"] = parts["packed"].unflatten(-1, (-1, 16))
        tensors[name + "_scales"] = parts["exponents"]
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config = of_version_4(
        config_of(model),
        "swiglu_alpha",
        experts_per_token=model.config.num_experts_per_tok,
        initial_context_length=4096,
        quantization_config={"modules_to_not_convert": left, "quant_method": "mxfp4"},
    )
    return write(folder, tensors, config)


def _fused(tensors: Tensors, block: str, experts: int) -> Tensors:
    """Experts as one tensor each for gate and up, and for down, in place of numbered ones."""
    new = {name: tensor for name, tensor in tensors.items() if f".{block}.experts." not in name}
    starts = {name.split(".experts.")[0] + ".experts." for name in tensors if f".{block}.experts." in name}
    for start in starts:
        part = {
            kind: torch.stack([tensors[f"{start}{expert}.{kind}_proj.weight"] for expert in range(experts)])
            for kind in ("gate", "up", "down")
        }
        new[start + "gate_up_proj"] = torch.cat([part["gate"], part["up"]], 1)
        new[start + "down_proj"] = part["down"]
    return new


def qwen3_5_moe_nested(folder: Path, model: PreTrainedModel | None = None, *, mtp: bool = True) -> Path:
    """Qwen3.5: experts fused below ``model.language_model.``, a vision part, and a head ``mtp.`` with experts."""
    model = model or tiny_model("qwen3_5_moe", dtype=torch.bfloat16)
    text = model.config.text_config
    tensors = _fused(saved(model), "mlp", text.num_experts)
    config = config_of(model)
    config["text_config"] |= {"full_attention_interval": 4, "mtp_num_hidden_layers": int(mtp)}
    config["text_config"]["mtp_use_dedicated_embeddings"] = False
    if mtp:
        other = _fused(saved(sibling(model)), "mlp", text.num_experts)
        last = f"model.language_model.layers.{text.num_hidden_layers - 1}."
        norm = other["model.language_model.norm.weight"]
        tensors |= under(other, last, "mtp.layers.0.") | {
            "mtp.fc.weight": random_like(torch.cat([norm.expand(len(norm), -1)] * 2, 1), 2),
            "mtp.norm.weight": random_like(norm, 3),
            "mtp.pre_fc_norm_embedding.weight": random_like(norm, 4),
            "mtp.pre_fc_norm_hidden.weight": random_like(norm, 5),
        }
    return write(folder, tensors, config)


def qwen3_moe_fp8(folder: Path, model: PreTrainedModel | None = None, *, block: int = 128) -> Path:
    """Qwen3-30B-A3B-FP8: as DeepSeek's blocks, and a list of what is left in bfloat16."""
    model = model or tiny_model("qwen3_moe", dtype=torch.bfloat16)
    tensors = quantised(saved(model), LINEAR, partial(to_fp8, block=(block, block)))
    left = ["lm_head"]
    for layer in range(model.config.num_hidden_layers):
        left += [f"model.layers.{layer}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
        left += [f"model.layers.{layer}.mlp.gate"] if layer not in model.config.mlp_only_layers else []
    config = of_version_4(
        config_of(model),
        "num_local_experts",
        num_experts=model.config.num_experts,
        quantization_config=fp8_config(block) | {"modules_to_not_convert": left},
    )
    return write(folder, tensors, config)


def minimax_m2_fp8(folder: Path, model: PreTrainedModel | None = None, *, block: int = 128) -> Path:
    """MiniMax-M2: experts ``w1 w2 w3`` in fp8 blocks; router and its bias, on the block, float32; no MTP."""
    model = model or tiny_model("minimax_m2", dtype=torch.bfloat16)
    pattern = r"(self_attn\.[qkvo]_proj|experts\.\d+\.w[123])\.weight$"
    tensors = quantised(saved(model), pattern, partial(to_fp8, block=(block, block)))
    tensors |= {name: value.float() for name, value in tensors.items() if ".gate." in name or "bias" in name}
    left = ["gate", "e_score_correction_bias", "lm_head"]
    config = of_version_4(
        config_of(model),
        mtp_transformer_layers=1,
        num_mtp_modules=3,
        use_mtp=True,
        scoring_func="sigmoid",
        use_routing_bias=True,
        use_qk_norm=True,
        qk_norm_type="per_layer",
        shared_intermediate_size=0,
        quantization_config=fp8_config(block) | {"fmt": "float8_e4m3fn", "modules_to_not_convert": left},
    )
    return write(folder, tensors, config)


def granitemoe(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Granite 3 MoE: ``input_linear``, ``output_linear`` and ``router.layer``, nothing quantised."""
    model = model or tiny_model("granitemoe", dtype=torch.bfloat16)
    return write(folder, saved(model), of_version_4(config_of(model)))


def nemotron_h(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Nemotron 3: layers below ``backbone.``, a letter for the kind of each layer."""
    model = model or tiny_model("nemotron_h", dtype=torch.bfloat16)
    tensors = renamed(saved(model), (r"^model\.", "backbone."))
    letters = {"linear_attention": "M", "full_attention": "*", "moe": "E", "mlp": "-"}
    config = config_of(model)
    pattern = "".join(letters[kind] for kind in config.pop("layers_block_type"))
    config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    return write(folder, tensors, config)


def ernie4_5_moe(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """ERNIE 4.5: the selection bias is [1, experts], below ``mlp.moe_statics.``."""
    model = model or tiny_model("ernie4_5_moe", dtype=torch.bfloat16)
    return write(folder, saved(model), of_version_4(config_of(model)))


def gemma4(folder: Path, model: PreTrainedModel | None = None) -> Path:
    """Gemma 4: router and fused experts hang on the decoder layer of a wrapped text model; head and embedding tied."""
    model = model or tiny_model("gemma4", dtype=torch.bfloat16)
    return write(folder, saved(model), config_of(model))
