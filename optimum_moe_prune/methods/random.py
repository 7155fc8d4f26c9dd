# SPDX-License-Identifier: Apache-2.0
"""Random: a seeded uniform choice in each layer. A baseline of both papers; needs no calibration.

A layer's draw depends on the seed and the layer alone, and a smaller budget keeps a subset of what a larger one keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .budget import Budget, choose
from .registry import ALLOCATIONS, NoOptions, register_method
from .selection import Selection

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@register_method(
    "random",
    kind="set",
    summary="a seeded uniform choice",
    source="baseline of Mosaic Pruning and MoE Pathfinder",
    formula="Experts were drawn at random, as a baseline.",
    needs=frozenset(),
    allocations=ALLOCATIONS,
)
def random(stats: CalibrationStats, budget: Budget, options: NoOptions) -> Selection:
    """The retained experts."""
    draws = {layer: _draw(count, [budget.seed, layer]) for layer, count in budget.original.items()}
    return Selection(choose(draws, budget))


def _draw(count: int, seed: list[int]) -> np.ndarray:
    """A random order of experts as random scores ``(count,)``, comparable between layers."""
    generator = np.random.default_rng(seed)
    order = generator.permutation(count)
    scores = np.empty(count)
    scores[order] = np.sort(generator.random(count))[::-1]
    return scores
