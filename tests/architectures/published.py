# SPDX-License-Identifier: Apache-2.0
"""Tiny models in folders laid out as they are published: names, number formats, side files.

``LAYOUTS["deepseek_v3_fp8"](folder)`` writes one and returns the folder; ``dequantised(folder)`` reads its weights
back without transformers. Every writer takes the model to publish, and makes a tiny one of bfloat16 when it gets none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from architectures.published_deepseek import deepseek_v3_fp8, deepseek_v3_nvfp4, deepseek_v4_native, kimi_k25_int4
from architectures.published_formats import dequantised, read
from architectures.published_others import (
    ernie4_5_moe,
    gemma4,
    gpt_oss_mxfp4,
    granitemoe,
    minimax_m2_fp8,
    nemotron_h,
    qwen3_5_moe_nested,
    qwen3_moe_fp8,
)

WRITERS = (
    deepseek_v3_fp8,
    gpt_oss_mxfp4,
    qwen3_5_moe_nested,
    kimi_k25_int4,
    deepseek_v3_nvfp4,
    qwen3_moe_fp8,
    minimax_m2_fp8,
    deepseek_v4_native,
    granitemoe,
    nemotron_h,
    ernie4_5_moe,
    gemma4,
)
LAYOUTS: dict[str, Callable[..., Path]] = {writer.__name__: writer for writer in WRITERS}

__all__ = ["LAYOUTS", "dequantised", "read", *LAYOUTS]
