# SPDX-License-Identifier: Apache-2.0
"""Formats of weights that other tools write: what a checkpoint is whose tensors this package does not find."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from ..storage.values import Json

_BY_TENSORS = (
    (r"^blk\.\d+\.|^token_embd\.weight$", "GGUF (llama.cpp)", "its tensors have llama.cpp's names"),
    (r"\.trellis$", "EXL3 (ExLlamaV3)", "its weights are trellis, suh and svh tensors"),
    (r"\.q_invperm$|\.q_scale_max$", "EXL2 (ExLlamaV2)", "its weights are q_weight, q_scale and q_invperm tensors"),
    (r"quant_state\.bitsandbytes__|\.(?:nested_)?absmax$|\.SCB$", "bitsandbytes", "its weights have a quant_state"),
    (r"\.g_idx$", "GPTQ", "its weights are qweight, qzeros, scales and g_idx tensors"),
    (r"\.qzeros$", "AWQ", "its weights are qweight, qzeros and scales tensors"),
    (r"\.W_q$", "HQQ", "its weights are W_q tensors"),
    (r"\.codebooks$", "AQLM", "its weights are codes and codebooks"),
    (r"\.centroids\.", "VPTQ", "its weights are indices and centroids"),
    (r"\.Qidxs$", "QuIP#", "its weights are Qidxs tensors"),
    (r"\.weight\._data$", "optimum-quanto", "its weights are _data and _scale tensors"),
    (r"\.switch_mlp\.", "MLX", "its experts are switch_mlp tensors"),
    (r"\.weight_packed$", "compressed-tensors", "its weights are weight_packed tensors"),
    (r"\.weight_scale_2$", "ModelOpt NVFP4", "its weights have a weight_scale_2"),
    (r"_blocks$", "MXFP4", "its weights are _blocks and _scales tensors"),
    (r"^(?:decoder|module|model\.decoder)\..*\.linear_fc[12]\.", "Megatron", "its tensors have Megatron's names"),
    (
        r"^layers\.\d+\.attention\.w[qkvo]\.",
        "Mistral's or Meta's own",
        "its tensors are named as in consolidated files",
    ),
)
"""Names that only one format has, the most telling first; what it is, and what tells it."""
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "gguf": "GGUF (llama.cpp)",
    "exl2": "EXL2 (ExLlamaV2)",
    "exl3": "EXL3 (ExLlamaV3)",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "vptq": "VPTQ",
    "quanto": "optimum-quanto",
    "mxfp4": "MXFP4",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "ModelOpt",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
    "torchao": "torchao",
    "quark": "Quark",
    "fp8": "FP8",
    "fbgemm_fp8": "FBGEMM FP8",
    "eetq": "EETQ",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "bitnet": "BitNet",
}


def foreign_format(
    config: Json, tensors: Iterable[str], metadata: Mapping[str, str] = MappingProxyType({})
) -> str | None:
    """What another tool wrote, in words that follow "the checkpoint is"; None if nothing tells.

    Args:
        config: The model's ``config.json``.
        tensors: The names of its tensors.
        metadata: Of its files, where a writer may name itself.
    """
    names = list(tensors)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and {"group_size", "bits"} <= mlx.keys() and any(n.endswith(".scales") for n in names):
        return f"MLX, quantised to {mlx['bits']} bits in groups of {mlx['group_size']} (config.json's quantization)"
    found = (part["quantization_config"] for part in parts if isinstance(part.get("quantization_config"), dict))
    settings: Json = next(found, {})
    method = str(settings.get("quant_method") or "").lower()
    method = method or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & settings.keys() else "")
    if method:
        bits = settings.get("bits") or settings.get("w_bit")
        said = f", quantised to {bits} bits" if bits else ""
        return f"{_METHODS.get(method, method)}{said} (config.json's quantization_config)"
    for pattern, what, why in _BY_TENSORS:
        if any(map(re.compile(pattern).search, names)):
            return f"{what} ({why})"
    return "MLX (its files say so)" if metadata.get("format") == "mlx" else None
