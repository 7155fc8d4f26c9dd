# SPDX-License-Identifier: Apache-2.0
"""SGLang 0.5.23, read in source; files are those below its package ``sglang/srt``.

- Numbers of experts: every implementation but one builds all layers with one number of its config, and of
  ``per_layer_config`` only the head sizes of Gemma 4 are read (``utils/hf_transformers/config.py``, lines 73 to 132).
  The one is Nemotron-H: its own config class ``NemotronHPuzzleConfig`` (``configs/nemotron_h.py``, lines 523 to 559)
  reads ``block_configs``, a list with what each layer has of its own, of ``model_type`` ``nemotron_h_puzzle``, which
  transformers does not know. Run here, it raises ``AmbiguousGlobalPerLayerAttributeError`` where ``per_layer_config``
  stands beside: one file cannot serve both, and such a plan is refused.
- Expert parallelism: the number of experts has to be a multiple of the devices
  (``layers/moe/fused_moe_triton/layer.py``, line 414; ``eplb/expert_location.py``, line 256).
- Numbers that are no power of two take slower routing kernels (``layers/moe/topk.py``, lines 1506 and 2026;
  ``kernels/ops/moe/moe_topk_softmax.py``, line 93); none is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from .served import IN_SGLANG, READ_BY_SGLANG, is_implemented, missing_keys, with_routing_keys
from .target import CHECKPOINT, READ, Target, architecture_name, is_uniform, quantisation_of

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec
    from ..compat import ModelConfig

_NOT_MORE_DEVICES = {
    "afmoe.py": 167,
    "cohere2_moe.py": 241,
    "deepseek_v2.py": 714,
    "dots3_common/modeling.py": 285,
    "exaone_moe.py": 143,
    "glm4_moe.py": 422,
    "glm4_moe_lite.py": 193,
    "hunyuan.py": 127,
    "laguna.py": 147,
    "lfm2_moe.py": 118,
    "longcat_flash.py": 272,
    "mimo_v2.py": 427,
    "minimax_m2.py": 520,
    "minimax_m3.py": 405,
    "qwen2_moe.py": 273,
    "qwen3_moe.py": 246,
    "sarvam_moe.py": 252,
    "step3p5.py": 133,
}
"""Implementations that raise where the tensor-parallel size is above the number of experts, and the line."""


def _count_multiple(spec: MoESpec, config: ModelConfig, parallel_size: int) -> int:
    return parallel_size


def _why_multiple(spec: MoESpec, config: ModelConfig, parallel_size: int) -> str:
    return f"it spreads experts over {parallel_size} devices evenly only"


def _check(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int] | None, parallel_size: int) -> str | None:
    if quantisation_of(config).get("quant_method") == "torchao":
        return "reads nothing that torchao quantised (layers/quantization/__init__.py, line 63)"
    if not is_uniform(counts):
        if architecture_name(config) == "NemotronHForCausalLM":
            return "reads layers of different sizes of this model from block_configs alone, not from per_layer_config"
        return "builds all layers with the same number of experts"
    if counts is None or parallel_size == 1:
        return None
    file = IN_SGLANG.get(architecture_name(config), "")
    if min(counts.values()) < parallel_size and file in _NOT_MORE_DEVICES:
        where = f"models/{file}, line {_NOT_MORE_DEVICES[file]}"
        return f"refuses more devices than experts for this model ({where})"
    if any(count % parallel_size for count in counts.values()):
        return "spreads experts evenly only (layers/moe/fused_moe_triton/layer.py, line 414)"
    return None


SGLANG = Target(
    name="sglang",
    program="SGLang",
    version="0.5.23",
    opens=CHECKPOINT,
    uniform="yes",
    unequal="no: one number for all layers",
    quantised="as published, but for torchao",
    evidence=READ,
    parallel="devices over which experts are spread (--ep-size)",
    count_multiple=_count_multiple,
    why_multiple=_why_multiple,
    check=_check,
    config=with_routing_keys,
    lacks=partial(missing_keys, read=READ_BY_SGLANG),
    knows=partial(is_implemented, files=IN_SGLANG),
)
