# SPDX-License-Identifier: Apache-2.0
"""Experts with extreme outputs, which a model can hardly do without."""

from __future__ import annotations

import numpy as np

from ..statistics.stats import CalibrationStats


def super_experts(stats: CalibrationStats) -> dict[int, tuple[int, ...]]:
    """Experts with extreme outputs, which a model can hardly do without (arXiv 2507.23279).

    Those whose largest output norm over routed tokens is above the 99.5th percentile of all experts, above a tenth of
    the largest, and above ten times the median of their layer (the last is ours: a small model does not always have
    one).
    """
    largest = {index: layer.maximum("max_norm").numpy() for index, layer in stats.layers.items()}
    every = np.concatenate(list(largest.values()))
    threshold = max(float(np.percentile(every, 99.5)), float(every.max()) / 10)
    return {
        index: tuple(np.flatnonzero((norms > threshold) & (norms > 10 * np.median(norms))).tolist())
        for index, norms in largest.items()
    }
