# SPDX-License-Identifier: Apache-2.0
r"""MSAN, mean squared activation norm: the mean squared norm of the expert's output over the tokens routed to it.

.. math:: s_e = \frac{1}{|X_e|} \sum_{t \in X_e} \|f_e(x_t)\|_2^2

An expert without routed tokens scores 0. arXiv 2606.15716.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..statistics.needs import Need
from .registry import NoOptions, per_routed_token, register_method
from .selection import Scores

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@register_method(
    "msan",
    kind="scores",
    summary="mean squared output norm over routed tokens",
    source="arXiv 2606.15716",
    formula="An expert's score is the mean squared norm of its output over the tokens routed to it.",
    needs={Need.ROUTING, Need.ROUTED_NORMS},
    by_layer=True,
)
def msan(stats: CalibrationStats, options: NoOptions) -> Scores:
    """Scores ``{layer: (E,)}``."""
    return {index: per_routed_token(layer, "squared_norm") for index, layer in stats.layers.items()}
