# SPDX-License-Identifier: Apache-2.0
r"""AIMER: by the experts' weights alone. A baseline beside ``random``; needs no calibration.

AIMER, arXiv 2603.18492 ("absolute mean over root mean square"). An expert with the weights :math:`w` has

.. math:: A = \frac{\overline{|w|}}{\sqrt{\overline{w^2}}},

1 where all of its weights are equally large, :math:`\sqrt{2/\pi} = 0.798` where they are normally distributed, less
where a few stand out. Those with the *lowest* are retained, so the score here is :math:`1 / A`.

What was seen of the paper leaves open whether the means are over all of an expert's matrices together or are averaged
over them. Here they are over all together, without biases; how experts are stored, in one tensor or in one each, then
makes no difference. An expert whose weights are all 0 has the score 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..statistics.needs import Need
from .registry import NoOptions, register_method
from .selection import Scores

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@register_method(
    "aimer",
    kind="scores",
    summary="the sparsest weights, without calibration",
    source="AIMER, arXiv 2603.18492",
    formula=(
        "Each expert's score is the root mean square of its weights over the mean of their absolute values, over all "
        "of its matrices together: experts with a few large weights are kept. No text had a part in it."
    ),
    needs={Need.WEIGHTS},
    tie_advice="a method that reads a calibration may tell them apart",
)
def aimer(stats: CalibrationStats, options: NoOptions) -> Scores:
    """The scores."""
    scores = {}
    for index, layer in stats.layers.items():
        magnitude, square = (layer.tensors[name].numpy() for name in ("weight_magnitude", "weight_square"))
        scores[index] = np.divide(np.sqrt(square), magnitude, out=np.zeros_like(square), where=magnitude > 0)
    return scores
