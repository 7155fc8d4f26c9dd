# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.33.0, read in source; files are those below its package ``vllm``.

Its own loader was run here on a processor, without its kernels: of pruned checkpoints of Mixtral, Qwen2-MoE, Qwen3-MoE
and DeepSeek-V3 every expert that it held was that of the file, to the bit; of a Mixtral with unequal layers it raised
``AmbiguousGlobalPerLayerAttributeError``. Nothing was generated with it.

- Numbers of experts: every implementation builds all layers with one number of its config. ``per_layer_config`` is
  read for the shapes of attention (``transformers_utils/model_arch_config_convertor.py``, lines 44 to 71, which takes
  the largest number of experts of all layers), and no MoE block asks for that of its own layer: it reads the config
  of the model, where transformers raises. Blocks of NVIDIA's puzzle models are read by code that comes with those
  checkpoints (``get_nemotron_h_config_for_layer``; ``model_executor/models/nemotron_h.py``, line 349), not by its own.
- Expert parallelism: experts that do not divide are spread unevenly, the first devices get one more
  (``model_executor/layers/fused_moe/expert_map_manager.py``, lines 67 to 69), but for the load balancer
  (``model_executor/layers/fused_moe/layer.py``, line 274) and for the models named below.
- Groups: where they do not divide the number of experts, tokens are routed without them and nothing is said
  (``model_executor/layers/fused_moe/router/grouped_topk_router.py``, lines 298 to 306). No plan keeps such a number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from .served import IN_VLLM, READ_BY_VLLM, is_implemented, missing_keys, with_routing_keys
from .target import CHECKPOINT, READ, Target, architecture_name, is_uniform, quantisation_of

if TYPE_CHECKING:
    from ..architectures.spec import MoESpec
    from ..compat import ModelConfig

_NOT_MORE_DEVICES = {
    "cohere2_moe.py": 309,
    "ernie45_moe.py": 150,
    "exaone_moe.py": 83,
    "hy_v3.py": 138,
    "laguna.py": 156,
    "lfm2_moe.py": 112,
    "mimo_v2.py": 138,
    "minimax_m2.py": 80,
    "models/hy_v4/nvidia/moe.py": 101,
    "models/minimax_m3/nvidia/model.py": 209,
    "qwen2_moe.py": 136,
    "qwen3_moe.py": 154,
    "qwen3_next.py": 176,
    "step3p5.py": 332,
}
"""Implementations that raise where the tensor-parallel size is above the number of experts, and the line."""
_EVEN_ONLY = {"gpt_oss.py": 1322, "models/deepseek_v4/nvidia/model.py": 356}
"""Implementations that cannot spread experts unevenly, load balancer or not, and the line."""
_BLOCK_FP8 = 4
"""For fp8 in blocks on Blackwell: ``model_executor/layers/fused_moe/experts/trtllm_fp8_moe.py``, line 464."""


def _count_multiple(spec: MoESpec, config: ModelConfig, parallel_size: int) -> int:
    return math.lcm(parallel_size, _BLOCK_FP8 if _is_block_fp8(config) else 1)


def _why_multiple(spec: MoESpec, config: ModelConfig, parallel_size: int) -> str:
    why = [f"its expert load balancer takes only numbers that {parallel_size} devices share evenly"]
    if _is_block_fp8(config):
        why = [
            *(why if parallel_size > 1 else []),
            f"its kernel for fp8 in blocks takes only multiples of {_BLOCK_FP8}",
        ]
    return " and ".join(why)


def _is_block_fp8(config: ModelConfig) -> bool:
    settings = quantisation_of(config)
    return settings.get("quant_method") == "fp8" and bool(settings.get("weight_block_size"))


def _check_quantised(config: ModelConfig) -> str | None:
    settings = quantisation_of(config)
    if settings.get("quant_method") == "bitsandbytes":
        return "reads nothing that bitsandbytes quantised (model_executor/layers/quantization/__init__.py, line 15)"
    if settings.get("quant_method") == "torchao" and "experts" in str(settings.get("quant_type")):
        where = "model_executor/layers/quantization/torchao.py, line 244"
        return f"takes linear layers alone of what torchao quantised ({where})"
    return None


def _check(spec: MoESpec, config: ModelConfig, counts: Mapping[int, int] | None, parallel_size: int) -> str | None:
    if (why := _check_quantised(config)) is not None:
        return why
    if not is_uniform(counts):
        if architecture_name(config) == "NemotronHForCausalLM":
            return (
                "has layers of different sizes of this model built only by code that comes with NVIDIA's checkpoints"
            )
        return "builds all layers with the same number of experts"
    file = IN_VLLM.get(architecture_name(config), "")
    if counts is None or parallel_size == 1 or not file:
        return None
    count, where = min(counts.values()), f"{file}, line {{}}"
    if count < parallel_size and file in _NOT_MORE_DEVICES:
        return f"refuses more devices than experts for this model ({where.format(_NOT_MORE_DEVICES[file])})"
    if count % parallel_size and file in _EVEN_ONLY:
        return f"spreads experts of this model evenly only ({where.format(_EVEN_ONLY[file])})"
    return None


VLLM = Target(
    name="vllm",
    program="vLLM",
    version="0.33",
    opens=CHECKPOINT,
    uniform="yes",
    unequal="no: one number for all layers",
    quantised="as published, but for bitsandbytes and experts by torchao; fp8 in blocks on Blackwell: multiples of 4",
    evidence=READ,
    parallel="devices over which experts are spread (--tensor-parallel-size with --enable-expert-parallel)",
    count_multiple=_count_multiple,
    why_multiple=_why_multiple,
    check=_check,
    config=with_routing_keys,
    lacks=partial(missing_keys, read=READ_BY_VLLM),
    knows=partial(is_implemented, files=IN_VLLM),
    tried="its loader, on outputs of four types",
)
