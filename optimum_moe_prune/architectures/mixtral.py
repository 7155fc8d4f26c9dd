# SPDX-License-Identifier: Apache-2.0
"""Mixtral: every layer is sparse; the chosen weights are divided by their sum and kept in float32."""

from .spec import MoESpec

MIXTRAL = MoESpec(
    model_type="mixtral",
    block_class="MixtralSparseMoeBlock",
    layer_class="MixtralDecoderLayer",
    count_key="num_local_experts",
    renormalise=True,
    cast_weights=False,
    file_block="block_sparse_moe",
    file_experts=(
        ("w1", "intermediate_size", "hidden_size"),
        ("w2", "hidden_size", "intermediate_size"),
        ("w3", "intermediate_size", "hidden_size"),
    ),
)
