# SPDX-License-Identifier: Apache-2.0
"""Experts with extreme outputs, which a model can hardly do without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


def super_experts(stats: CalibrationStats) -> dict[int, tuple[int, ...]]:
    """Experts with extreme outputs, which a model can hardly do without (arXiv 2507.23279), by layer.

    Those whose largest absolute output element over routed tokens is above the 99.5th percentile of all experts, above
    a tenth of the largest, and above ten times the median of their layer (the last is ours: of a small model's experts
    the percentile always leaves one). The element and not the norm: super experts make the massive activations of
    single channels, which a norm over thousands of channels hides.

    Raises:
        RequestError: If the statistics do not hold these elements.
    """
    if any("max_element" not in set(layer.tensors) for layer in stats.layers.values()):
        raise RequestError(
            "super experts are recognised by the largest element of their outputs, which statistics of format 1 do "
            "not hold. Calibrate again, or plan without protecting super experts."
        )
    largest = {index: layer.maximum("max_element").numpy() for index, layer in stats.layers.items()}
    every = np.concatenate(list(largest.values()))
    threshold = max(float(np.percentile(every, 99.5)), float(every.max()) / 10)
    return {
        index: tuple(np.flatnonzero((values > threshold) & (values > 10 * np.median(values))).tolist())
        for index, values in largest.items()
    }
