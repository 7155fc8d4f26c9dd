# SPDX-License-Identifier: Apache-2.0
"""How large the weights of each expert are, of a model in memory (``checkpoints.weight_sizes``: of files)."""

from __future__ import annotations

from ..checkpoints.weight_sizes import WeightSizes, WeightSums
from .blocks import MoEBlock


def weight_sizes_of(block: MoEBlock) -> WeightSizes:
    """Of the experts of a MoE block, whose weights are there; in the precision that they have."""
    sums, structure = WeightSums(block.num_experts), block.structure
    own = dict(block.experts.named_parameters()) | dict(block.experts.named_buffers())
    if structure.numbered:
        for expert in range(block.num_experts):
            for path in structure.numbered:
                if (tensor := own[f"{expert}.{path}"]).dim() >= 2:
                    sums.add(expert, tensor)
    else:
        for path in structure.expert_tensors:
            sums.add_all(own[path.removeprefix(f"{structure.experts}.")], structure.tensors[path])
    return sums.means()
