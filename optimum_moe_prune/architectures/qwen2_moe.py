# SPDX-License-Identifier: Apache-2.0
"""Qwen2-MoE: dense layers may stand between sparse ones, and a shared expert beside the routed ones.

Weights are divided by their sum only if ``norm_topk_prob`` says so, and rounded to the dtype of the logits.
"""

from .spec import MoESpec

QWEN2_MOE = MoESpec(
    model_type="qwen2_moe",
    block_class="Qwen2MoeSparseMoeBlock",
    layer_class="Qwen2MoeDecoderLayer",
    count_key="num_experts",
    renormalise="norm_topk_prob",
    cast_weights=True,
    file_experts=(
        ("gate_proj", "moe_intermediate_size", "hidden_size"),
        ("up_proj", "moe_intermediate_size", "hidden_size"),
        ("down_proj", "hidden_size", "moe_intermediate_size"),
    ),
)
