# SPDX-License-Identifier: Apache-2.0
"""What vLLM 0.33.0 and SGLang 0.5.23 have in common: classes of models they implement, and keys of ``config.json``.

Read in source. Of all classes that they have, those that a known architecture's ``config.json`` can name. The file is
the one whose MoE block is built, below ``vllm/model_executor/models`` (or ``vllm``, where the path says ``models/``)
and ``sglang/srt/models``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..storage.values import Json
from .target import architecture_name

if TYPE_CHECKING:
    from ..compat import ModelConfig

IN_VLLM = {
    "AXK1ForCausalLM": "AXK1.py",
    "AfmoeForCausalLM": "afmoe.py",
    "AriaForConditionalGeneration": "aria.py",
    "BailingMoeV2_5ForCausalLM": "bailing_moe_linear.py",
    "BeamForCausalLM": "models/beam/nvidia/moe.py",
    "Cohere2MoeForCausalLM": "cohere2_moe.py",
    "DeepseekOCR2ForCausalLM": "deepseek_v2.py",
    "DeepseekV2ForCausalLM": "deepseek_v2.py",
    "DeepseekV32ForCausalLM": "deepseek_v2.py",
    "DeepseekV3ForCausalLM": "deepseek_v2.py",
    "DeepseekV4ForCausalLM": "models/deepseek_v4/nvidia/model.py",
    "Dots3NoteForCausalLM": "models/dots3_note/nvidia/model.py",
    "Ernie4_5_MoeForCausalLM": "ernie45_moe.py",
    "ExaoneMoEForCausalLM": "exaone_moe.py",
    "ExaoneMoeForCausalLM": "exaone_moe.py",
    "FlexOlmoForCausalLM": "transformers/moe.py",
    "FlintForCausalLM": "models/flint/model.py",
    "Gemma4ForCausalLM": "gemma4.py",
    "Gemma4ForConditionalGeneration": "gemma4.py",
    "Glm4MoeForCausalLM": "glm4_moe.py",
    "Glm4MoeLiteForCausalLM": "glm4_moe.py",
    "Glm4vMoeForConditionalGeneration": "glm4_moe.py",
    "Glm5NextForCausalLM": "models/glm5next/common/model.py",
    "Glm5NextForConditionalGeneration": "models/glm5next/common/model.py",
    "GlmMoeDsaForCausalLM": "deepseek_v2.py",
    "GptOssForCausalLM": "gpt_oss.py",
    "GraniteMoeForCausalLM": "granitemoe.py",
    "GraniteMoeHybridForCausalLM": "granitemoe.py",
    "GraniteMoeSWAForCausalLM": "granitemoe.py",
    "GraniteMoeSharedForCausalLM": "granitemoe.py",
    "HYV3ForCausalLM": "hy_v3.py",
    "HYV4ForCausalLM": "models/hy_v4/nvidia/moe.py",
    "HunYuanMoEV1ForCausalLM": "transformers/moe.py",
    "InklingForCausalLM": "models/inkling/nvidia/moe.py",
    "InklingForConditionalGeneration": "models/inkling/nvidia/moe.py",
    "JambaForCausalLM": "jamba.py",
    "KimiK25ForConditionalGeneration": "deepseek_v2.py",
    "KimiLinearForCausalLM": "models/kimi_k3/nvidia/model.py",
    "Kolibri1ForCausalLM": "transformers/moe.py",
    "LagunaForCausalLM": "laguna.py",
    "Lfm2MoeForCausalLM": "lfm2_moe.py",
    "Llama4ForCausalLM": "llama4.py",
    "Llama4ForConditionalGeneration": "llama4.py",
    "LongcatFlashForCausalLM": "longcat_flash.py",
    "MellumForCausalLM": "transformers/moe.py",
    "MiMoV2FlashForCausalLM": "mimo_v2.py",
    "MiniMaxM2ForCausalLM": "minimax_m2.py",
    "MiniMaxM3SparseForCausalLM": "models/minimax_m3/nvidia/model.py",
    "MiniMaxM3SparseForConditionalGeneration": "models/minimax_m3/nvidia/model.py",
    "MixtralForCausalLM": "mixtral.py",
    "MuseSparkForConditionalGeneration": "models/muse_spark/nvidia/model.py",
    "NemotronHForCausalLM": "nemotron_h.py",
    "OlmoeForCausalLM": "olmoe.py",
    "PhiMoEForCausalLM": "phimoe.py",
    "Qwen2MoeForCausalLM": "qwen2_moe.py",
    "Qwen3MoeForCausalLM": "qwen3_moe.py",
    "Qwen3NextForCausalLM": "qwen3_next.py",
    "Qwen3OmniMoeForConditionalGeneration": "qwen3_moe.py",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_moe.py",
    "Qwen3_5MoeForCausalLM": "qwen3_next.py",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_next.py",
    "Qwen4ExpForCausalLM": "qwen3_next.py",
    "Qwen4ExpForConditionalGeneration": "qwen3_next.py",
    "SarvamMLAForCausalLM": "sarvam.py",
    "SarvamMoEForCausalLM": "sarvam.py",
    "Step3p5ForCausalLM": "step3p5.py",
    "Step3p7ForConditionalGeneration": "step3p5.py",
}
IN_SGLANG = {
    "AfmoeForCausalLM": "afmoe.py",
    "BailingMoeV2_5ForCausalLM": "bailing_moe_linear.py",
    "BeamForCausalLM": "beam.py",
    "Cohere2MoeForCausalLM": "cohere2_moe.py",
    "DeepseekV2ForCausalLM": "deepseek_v2.py",
    "DeepseekV32ForCausalLM": "deepseek_v2.py",
    "DeepseekV3ForCausalLM": "deepseek_v2.py",
    "DeepseekV4ForCausalLM": "deepseek_v2.py",
    "Dots3NoteForCausalLM": "dots3_common/modeling.py",
    "Ernie4_5_MoeForCausalLM": "ernie4.py",
    "ExaoneMoEForCausalLM": "exaone_moe.py",
    "ExaoneMoeForCausalLM": "exaone_moe.py",
    "Gemma4ForCausalLM": "gemma4_causal.py",
    "Gemma4ForConditionalGeneration": "gemma4_causal.py",
    "Glm4MoeForCausalLM": "glm4_moe.py",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite.py",
    "Glm4vMoeForConditionalGeneration": "glm4_moe.py",
    "Glm5NextForConditionalGeneration": "deepseek_v2.py",
    "GlmMoeDsaForCausalLM": "deepseek_v2.py",
    "GptOssForCausalLM": "gpt_oss.py",
    "GraniteMoeForCausalLM": "granitemoe.py",
    "GraniteMoeHybridForCausalLM": "granitemoe.py",
    "GraniteMoeSWAForCausalLM": "granitemoe.py",
    "GraniteMoeSharedForCausalLM": "granitemoe.py",
    "HYV3ForCausalLM": "hunyuan_v3.py",
    "HYV4ForCausalLM": "deepseek_v2.py",
    "HunYuanMoEV1ForCausalLM": "hunyuan.py",
    "InklingForConditionalGeneration": "inkling.py",
    "KimiK25ForConditionalGeneration": "deepseek_v2.py",
    "KimiLinearForCausalLM": "kimi_linear.py",
    "LagunaForCausalLM": "laguna.py",
    "Lfm2MoeForCausalLM": "lfm2_moe.py",
    "Llama4ForCausalLM": "llama4.py",
    "Llama4ForConditionalGeneration": "llama4.py",
    "LongcatFlashForCausalLM": "longcat_flash.py",
    "MellumForCausalLM": "qwen3_moe.py",
    "MiMoV2FlashForCausalLM": "mimo_v2.py",
    "MiniMaxM2ForCausalLM": "minimax_m2.py",
    "MiniMaxM3SparseForCausalLM": "minimax_m3.py",
    "MiniMaxM3SparseForConditionalGeneration": "minimax_m3.py",
    "MixtralForCausalLM": "mixtral.py",
    "MuseSparkForConditionalGeneration": "muse_spark.py",
    "NemotronHForCausalLM": "nemotron_h.py",
    "NemotronHPuzzleForCausalLM": "nemotron_h.py",
    "OlmoeForCausalLM": "olmoe.py",
    "PhiMoEForCausalLM": "phimoe.py",
    "Qwen2MoeForCausalLM": "qwen2_moe.py",
    "Qwen3MoeForCausalLM": "qwen3_moe.py",
    "Qwen3NextForCausalLM": "qwen2_moe.py",
    "Qwen3OmniMoeForConditionalGeneration": "qwen3_moe.py",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_moe.py",
    "Qwen3_5MoeForCausalLM": "qwen2_moe.py",
    "Qwen3_5MoeForConditionalGeneration": "qwen2_moe.py",
    "Qwen4ExpForConditionalGeneration": "qwen2_moe.py",
    "SarvamMLAForCausalLM": "sarvam_moe.py",
    "SarvamMoEForCausalLM": "sarvam_moe.py",
    "Step3p5ForCausalLM": "step3p5.py",
    "Step3p7ForConditionalGeneration": "step3p5.py",
}

_NO_AUX = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_OF_BOTH: dict[str, Json] = {
    **dict.fromkeys(("deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm5_next_text", "kimi_k2"), _NO_AUX),
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
}
READ_BY_VLLM: dict[str, Json] = {**_OF_BOTH, "deepseek_v4": {"topk_method": "noaux_tc"}}
READ_BY_SGLANG: dict[str, Json] = {**_OF_BOTH, "deepseek_v2": {"scoring_func": "softmax"}, "mimo_v2_flash": _NO_AUX}
"""How routers choose, by model type: keys of published configs that classes of transformers 5 have no field for, so
that a config which was made with one lacks them.

vLLM makes no place for the correction bias without ``topk_method`` (``deepseek_v2.py``, line 327: loading ends in
``KeyError``, run here; ``models/deepseek_v4/nvidia/model.py``, line 301) and takes softmax without ``scoring_func``
(line 387); of MiniMax-M2 it reads ``scoring_func`` as it is (``minimax_m2.py``, line 99), and without
``use_routing_bias`` has no place for the bias (line 85). SGLang reads all as they are (``models/deepseek_v2.py``,
lines 519 and 793; ``models/mimo_v2.py``, lines 386 and 474; ``models/minimax_m2.py``, lines 525 and 550), but for
DeepSeek-V4, whose config it has a class of its own for.
"""
_WRITTEN = READ_BY_VLLM | READ_BY_SGLANG


def is_implemented(config: ModelConfig, files: Mapping[str, str]) -> bool:
    """Whether a program has an implementation of a model of its own.

    Args:
        config: The model's.
        files: Those that it has, by class.
    """
    return architecture_name(config) in files


def missing_keys(config: ModelConfig, read: Mapping[str, Json]) -> str:
    """The keys for routers that a config lacks, in words; empty where there are none.

    Args:
        config: A model's.
        read: The keys that a program reads, by model type.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    keys = read.get(getattr(text, "model_type", ""), {})
    return " and ".join(key for key in keys if getattr(text, key, None) is None)


def with_routing_keys(values: Json, counts: Mapping[int, int]) -> Json:
    """A ``config.json`` with the keys for routers, in its text part where that is nested."""
    changed = {
        name: with_routing_keys(part, counts) if isinstance(part, dict) else part for name, part in values.items()
    }
    keys = _WRITTEN.get(str(values.get("model_type")), {})
    return changed | {key: value for key, value in keys.items() if values.get(key) is None}
