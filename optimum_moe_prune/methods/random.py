# SPDX-License-Identifier: Apache-2.0
"""Random: a seeded uniform choice in each layer. A baseline of both papers; needs no calibration.

A layer's draw depends on the seed and the layer alone, and a smaller budget keeps a subset of what a larger one keeps.
"""

import numpy as np

from ..budget import Budget
from ..stats import CalibrationStats
from .registry import NoOptions, Retained, register_method


@register_method(
    "random",
    kind="set",
    summary="a seeded uniform choice",
    source="baseline of Mosaic Pruning and MoE Pathfinder",
    needs=frozenset(),
)
def random(stats: CalibrationStats, budget: Budget, options: NoOptions) -> Retained:
    """Retained experts ``{layer: experts}``."""
    retained = {}
    for layer, count in budget.num_experts.items():
        order = np.random.default_rng([budget.seed, layer]).permutation(stats.num_experts[layer]).tolist()
        protected = budget.protected[layer]
        drawn = [expert for expert in order if expert not in protected]
        retained[layer] = tuple(sorted([*protected, *drawn[: count - len(protected)]]))
    return retained
