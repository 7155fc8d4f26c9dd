# SPDX-License-Identifier: Apache-2.0
"""The published folders hold what publishers' do, and their numbers are the tiny model's."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from architectures.published import LAYOUTS, deepseek_v3_fp8, dequantised, read
from architectures.published_formats import write
from architectures.tiny import random_model, tiny_model
from transformers import AutoConfig, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

F8, BF16, F32, U8, I8, I32 = (
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float32,
    torch.uint8,
    torch.int8,
    torch.int32,
)
E8 = torch.float8_e8m0fnu
HELD: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "deepseek_v3_fp8": {
        "model.layers.1.mlp.experts.11.gate_proj.weight": (F8, (24, 32)),
        "model.layers.1.mlp.experts.11.gate_proj.weight_scale_inv": (F32, (1, 1)),
        "model.layers.1.mlp.gate.weight": (BF16, (12, 32)),
        "model.layers.1.mlp.gate.e_score_correction_bias": (F32, (12,)),
        "model.layers.4.mlp.experts.11.down_proj.weight": (F8, (32, 24)),
        "model.layers.4.eh_proj.weight": (BF16, (32, 64)),
        "model.layers.4.shared_head.head.weight": (BF16, (96, 32)),
    },
    "gpt_oss_mxfp4": {
        "model.layers.0.mlp.experts.gate_up_proj_blocks": (U8, (12, 128, 1, 16)),
        "model.layers.0.mlp.experts.gate_up_proj_scales": (U8, (12, 128, 1)),
        "model.layers.0.mlp.experts.gate_up_proj_bias": (BF16, (12, 128)),
        "model.layers.0.mlp.experts.down_proj_blocks": (U8, (12, 32, 2, 16)),
        "model.layers.0.mlp.router.bias": (BF16, (12,)),
    },
    "qwen3_5_moe_nested": {
        "model.language_model.layers.0.mlp.experts.gate_up_proj": (BF16, (12, 48, 32)),
        "model.visual.blocks.0.attn.qkv.weight": (BF16, (48, 16)),
        "mtp.layers.0.mlp.experts.down_proj": (BF16, (12, 32, 24)),
        "mtp.fc.weight": (BF16, (32, 64)),
    },
    "kimi_k25_int4": {
        "language_model.model.layers.1.mlp.experts.0.down_proj.weight_packed": (I32, (32, 8)),
        "language_model.model.layers.1.mlp.experts.0.down_proj.weight_scale": (BF16, (32, 2)),
        "language_model.model.layers.1.mlp.experts.0.down_proj.weight_shape": (I32, (2,)),
        "language_model.model.layers.1.mlp.shared_experts.down_proj.weight": (BF16, (32, 64)),
    },
    "deepseek_v3_nvfp4": {
        "model.layers.1.mlp.experts.0.down_proj.weight": (U8, (32, 24)),
        "model.layers.1.mlp.experts.0.down_proj.weight_scale": (F8, (32, 3)),
        "model.layers.1.mlp.experts.0.down_proj.weight_scale_2": (F32, ()),
        "model.layers.1.mlp.experts.0.down_proj.input_scale": (F32, ()),
        "model.layers.4.mlp.experts.0.down_proj.weight": (BF16, (32, 48)),
    },
    "qwen3_moe_fp8": {
        "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv": (F32, (1, 1)),
        "model.layers.0.mlp.gate.weight": (BF16, (12, 32)),
    },
    "minimax_m2_fp8": {
        "model.layers.0.block_sparse_moe.experts.0.w1.weight": (F8, (40, 32)),
        "model.layers.0.block_sparse_moe.gate.weight": (F32, (12, 32)),
        "model.layers.0.block_sparse_moe.e_score_correction_bias": (F32, (12,)),
    },
    "deepseek_v4_native": {
        "embed.weight": (BF16, (96, 32)),
        "layers.0.ffn.experts.0.w1.weight": (I8, (32, 16)),
        "layers.0.ffn.experts.0.w1.scale": (E8, (32, 1)),
        "layers.0.ffn.gate.tid2eid": (torch.int64, (96, 3)),
        "layers.2.ffn.gate.bias": (F32, (12,)),
        "layers.2.attn.kv_norm.weight": (BF16, (16,)),
        "mtp.0.ffn.experts.11.w2.weight": (I8, (32, 16)),
        "mtp.0.e_proj.scale": (E8, (1, 1)),
        "hc_head_fn": (F32, (2, 64)),
    },
    "granitemoe": {
        "model.layers.0.block_sparse_moe.input_linear.weight": (BF16, (12, 80, 32)),
        "model.layers.0.block_sparse_moe.router.layer.weight": (BF16, (12, 32)),
    },
    "nemotron_h": {
        "backbone.layers.1.mixer.experts.0.up_proj.weight": (BF16, (24, 16)),
        "backbone.layers.1.mixer.gate.e_score_correction_bias": (F32, (12,)),
    },
    "ernie4_5_moe": {"model.layers.1.mlp.moe_statics.e_score_correction_bias": (F32, (1, 12))},
    "gemma4": {
        "model.language_model.layers.0.experts.gate_up_proj": (BF16, (12, 48, 32)),
        "model.language_model.layers.0.router.per_expert_scale": (BF16, (12,)),
    },
}
ERROR = {"fp8": 0.04, "mxfp4": 0.2, "nvfp4": 0.2, "int4": 0.08, "native": 0.2}
"""The largest error of a weight for the largest weight of its tensor, by format."""
LOADING = {
    "fp8": lambda: FineGrainedFP8Config(dequantize=True),
    "native": lambda: FineGrainedFP8Config(dequantize=True),
    "mxfp4": lambda: Mxfp4Config(dequantize=True),
    "int4": lambda: CompressedTensorsConfig(dequantize=True),
}
NO_COMPRESSED = importlib.util.find_spec("compressed_tensors") is None


def source(folder: Path) -> PreTrainedModel:
    """The tiny model a folder was written from."""
    config = AutoConfig.from_pretrained(folder)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    return random_model(config, dtype=torch.bfloat16)


def load(model: PreTrainedModel, folder: Path, **kwargs: object) -> PreTrainedModel:
    loaded, info = type(model).from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True, **kwargs)
    assert not info["missing_keys"]
    for parameter in loaded.parameters():
        parameter.data = parameter.data.clone()
    return loaded.eval()


def without_quantisation(folder: Path, target: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part.pop("quantization_config", None)
    return write(target, dequantised(folder), config)


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 96, (2, 32), generator=torch.Generator().manual_seed(1))
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_numbers(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path / layout)
    tensors = read(folder)
    for name, (dtype, shape) in HELD[layout].items():
        assert (tensors[name].dtype, tuple(tensors[name].shape)) == (dtype, shape), name
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()

    model = source(folder)
    plain = load(model, without_quantisation(folder, tmp_path / "plain"))
    kept = plain.state_dict()
    largest = ERROR.get(layout.rsplit("_", 1)[-1], 0.005)
    for name, tensor in model.state_dict().items():
        error = (kept[name].float() - tensor.float()).abs().max()
        assert error <= largest * tensor.float().abs().max(), name
    nearness = torch.nn.functional.cosine_similarity(logits(plain), logits(model), dim=-1).mean()
    assert nearness > (0.75 if layout.rsplit("_", 1)[-1] in ERROR else 0.99)  # routers choose anew here and there


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.rsplit("_", 1)[-1] in LOADING])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_transformers_reads_the_same_numbers(layout: str, tmp_path: Path) -> None:
    if layout.endswith("int4") and NO_COMPRESSED:
        pytest.skip("needs compressed-tensors")
    folder = LAYOUTS[layout](tmp_path / layout)
    model = source(folder)
    theirs = load(model, folder, quantization_config=LOADING[layout.rsplit("_", 1)[-1]]())
    ours = load(model, without_quantisation(folder, tmp_path / "plain"))
    for (name, a), (_, b) in zip(theirs.state_dict().items(), ours.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    assert torch.equal(logits(theirs), logits(ours))


def test_what_transformers_cannot_read(tmp_path: Path) -> None:
    nvfp4 = LAYOUTS["deepseek_v3_nvfp4"](tmp_path / "nvfp4")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):  # it knows no quantisation "modelopt"
        load(source(nvfp4), nvfp4)
    # It takes the size of a block from the number of factors: wrong where the last block is cut, as in DeepSeek-V3's
    # kv_a_proj_with_mqa of 576 rows, an error where the rows do not divide.
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16, intermediate_size=32)
    cut = deepseek_v3_fp8(tmp_path / "cut", model, mtp=False, block=16)
    name = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
    theirs = load(model, cut, quantization_config=FineGrainedFP8Config(dequantize=True)).state_dict()[name]
    ours, mine = dequantised(cut)[name], model.state_dict()[name].float()
    assert (ours - mine).abs().max() < 0.04 * mine.abs().max()
    assert (theirs.float() - mine).abs().max() > 0.1 * mine.abs().max()
    uneven = deepseek_v3_fp8(tmp_path / "uneven", mtp=False, block=16)
    with pytest.raises(RuntimeError, match="automatic conversion of the weights"):
        load(source(uneven), uneven, quantization_config=FineGrainedFP8Config(dequantize=True))
