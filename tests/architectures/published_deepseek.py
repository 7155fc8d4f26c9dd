# SPDX-License-Identifier: Apache-2.0
"""Folders laid out as DeepSeek, Moonshot and those who quantise them publish."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
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
from architectures.published_formats import Tensors, to_fp8, to_int4, to_mxfp4, to_nvfp4, write
from architectures.tiny import tiny_model
from transformers import PreTrainedModel

LINEAR = r"\.(q_a|q_b|kv_a|kv_b|q|k|v|o|gate|up|down)_proj(_with_mqa)?\.weight$"
"""The projections that DeepSeek's and Qwen's fp8 checkpoints quantise; no router, embedding, norm or head."""


def fp8_config(block: int) -> dict[str, object]:
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [block, block],
    }


def _v3_config(model: PreTrainedModel, mtp: bool, **add: object) -> dict[str, object]:
    published = {
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": int(mtp),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
    }
    ours = ("head_dim", "qk_head_dim", "rope_interleave", "output_router_logits")
    return of_version_4(config_of(model), *ours, **published, **add)


def _v3_tensors(model: PreTrainedModel, mtp: bool) -> Tensors:
    """Numbered experts, routers in bfloat16; the head for the next token but one as one more layer."""
    tensors = saved(model)
    if mtp:
        after = f"model.layers.{model.config.num_hidden_layers}."
        norm = tensors["model.norm.weight"]
        tensors |= under(saved(sibling(model)), f"model.layers.{model.config.num_hidden_layers - 1}.", after) | {
            after + "embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
            after + "enorm.weight": random_like(norm, 2, 1),
            after + "hnorm.weight": random_like(norm, 3, 1),
            after + "eh_proj.weight": random_like(torch.cat([norm.expand(len(norm), -1)] * 2, 1), 4),
            after + "shared_head.norm.weight": random_like(norm, 5, 1),
            after + "shared_head.head.weight": tensors["lm_head.weight"].clone(),
        }
    fp32 = "e_score_correction_bias"
    return {name: tensor.float() if name.endswith(fp32) else tensor.bfloat16() for name, tensor in tensors.items()}


def deepseek_v3_fp8(folder: Path, model: PreTrainedModel | None = None, *, mtp: bool = True, block: int = 128) -> Path:
    """DeepSeek-V3, R1, V3.1: projections in eight-bit floats with a factor per block, the last blocks cut."""
    model = model or tiny_model("deepseek_v3", dtype=torch.bfloat16)
    tensors = quantised(_v3_tensors(model, mtp), LINEAR, partial(to_fp8, block=(block, block)))
    return write(folder, tensors, _v3_config(model, mtp, quantization_config=fp8_config(block)))


def deepseek_v3_nvfp4(folder: Path, model: PreTrainedModel | None = None, *, mtp: bool = True) -> Path:
    """As NVIDIA quantises DeepSeek: MLPs and experts in four-bit floats; attention and the MTP layer are not."""
    model = model or tiny_model("deepseek_v3", dtype=torch.bfloat16, intermediate_size=48, moe_intermediate_size=48)
    layers = model.config.num_hidden_layers
    excluded = [f"model.layers.{layer}.self_attn*" for layer in range(layers)]
    excluded += [f"model.layers.{layers}*"] if mtp else []
    excluded += ["lm_head", "model.embed_tokens", "model.layers.*.mlp.gate"]
    inside = "|".join(str(layer) for layer in range(layers))
    pattern = rf"layers\.({inside})\.mlp\..*(gate|up|down)_proj\.weight$"
    quantisation = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    add = {"quantization_config": {"quant_method": "modelopt", **quantisation, "ignore": excluded}}
    write(folder, quantised(_v3_tensors(model, mtp), pattern, to_nvfp4), _v3_config(model, mtp, **add))
    side = {
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quantization": {**quantisation, "exclude_modules": excluded},
    }
    (folder / "hf_quant_config.json").write_text(json.dumps(side, indent=4))
    return folder


def kimi_k25_int4(folder: Path, model: PreTrainedModel | None = None, *, nested: bool = True) -> Path:
    """Kimi-K2.5: experts in whole numbers of four bits, 32 to a factor; the quantisation is in the text part."""
    model = model or tiny_model("kimi_k25", dtype=torch.bfloat16, moe_intermediate_size=64, n_group=1, topk_group=1)
    weights = {
        **dict.fromkeys(("actorder", "block_structure"), None),
        **{"dynamic": False, "group_size": 32, "num_bits": 4, "observer": "minmax", "observer_kwargs": {}},
        **{"strategy": "group", "symmetric": True, "type": "int"},
    }
    group = {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights}
    quantisation = {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "ignore": [
            "lm_head",
            "re:.*self_attn.*",
            "re:.*shared_experts.*",
            r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
            "re:vision_tower.*",
            "re:mm_projector.*",
        ],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    config = config_of(model) | {"architectures": ["KimiK25ForConditionalGeneration"]}
    ours = ("head_dim", "qk_head_dim", "rope_interleave", "output_router_logits")
    text = of_version_4(config["text_config"], *ours, model_type="kimi_k2", num_nextn_predict_layers=0)
    text["torch_dtype"] = "bfloat16"
    config["text_config"] = text
    (text if nested else config)["quantization_config"] = quantisation
    # transformers saves these three under other names than it read them from
    tensors = renamed(
        saved(model),
        (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
        (r"^model\.mm_projector\.", "mm_projector."),
        (r"^vision_tower\.encoder\.patch_embed\.", "vision_tower.patch_embed."),
    )
    fp32 = "e_score_correction_bias"
    tensors = {name: value.float() if name.endswith(fp32) else value.bfloat16() for name, value in tensors.items()}
    return write(folder, quantised(tensors, r"\.experts\.\d+\.\w+\.weight$", to_int4), config)


def _fp4(weight: torch.Tensor) -> Tensors:
    """Four-bit floats as DeepSeek-V4 stores them: bytes with a sign, a power of two for 32 of them."""
    parts = to_mxfp4(weight)
    return {"weight": parts["packed"].view(torch.int8), "scale": parts["exponents"].view(torch.float8_e8m0fnu)}


def deepseek_v4_native(
    folder: Path, model: PreTrainedModel | None = None, *, mtp: bool = True, block: int = 128
) -> Path:
    """DeepSeek-V4: names of its own, experts in four-bit floats, the rest in eight bits; two layers route by table."""
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}
    model = model or tiny_model("deepseek_v4", dtype=torch.bfloat16, moe_intermediate_size=32, compress_rates=rates)
    config = model.config
    native = (
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
    )
    tensors = renamed(saved(model), *native)
    if mtp:
        other = renamed(saved(sibling(model)), *native)
        norm = other["norm.weight"]
        square = norm.expand(len(norm), -1)
        tensors |= under(other, f"layers.{config.num_hidden_layers - 1}.", "mtp.0.")
        tensors |= under(other, "hc_head_", "mtp.0.hc_head_") | under(other, "norm.", "mtp.0.norm.")
        tensors |= {f"mtp.0.{name}.weight": random_like(norm, 2 + len(name), 1) for name in ("enorm", "hnorm")}
        tensors |= {f"mtp.0.{name}_proj.weight": random_like(square, ord(name)).bfloat16() for name in "eh"}
        tensors = {name: value for name, value in tensors.items() if not _compresses(name)}
    for name, tensor in tensors.items():
        if name.endswith(("norm.weight", "gate.weight")):
            tensors[name] = tensor.bfloat16()
    tensors = quantised(tensors, r"\.experts\.\d+\.w[123]\.weight$", _fp4)
    eight = r"(\.attn\.w\w+|indexer\.wq_b|shared_experts\.w[123]|\.[eh]_proj)\.weight$"
    tensors = quantised(tensors, eight, partial(to_fp8, block=(block, block), power_of_two=True))

    ratios = {"sliding_attention": 0, **rates}
    ours = ("layer_types", "mlp_layer_types", "compress_rates", "partial_rotary_factor", "mlp_bias")
    published = config_of(model)
    published["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    quantisation = fp8_config(block) | {"scale_fmt": "ue8m0"}
    published = of_version_4(
        published,
        *ours,
        compress_ratios=[ratios[kind] for kind in config.layer_types] + [0] * mtp,
        expert_dtype="fp4",
        num_hash_layers=config.mlp_layer_types.count("hash_moe"),
        num_nextn_predict_layers=int(mtp),
        quantization_config=quantisation,
        topk_method="noaux_tc",
    )
    return write(folder, tensors, published)


def _compresses(name: str) -> bool:
    """Whether a tensor is of the compressed attention, which the MTP layer has none of."""
    return name.startswith("mtp.") and (".compressor." in name or ".indexer." in name)
