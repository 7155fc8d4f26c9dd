# SPDX-License-Identifier: Apache-2.0
r"""EAN, expert activation norm: the norm of the expert's output, summed over the tokens routed to it.

.. math:: s_e = \sum_{t \in X_e} \|f_e(x_t)\|_2

A baseline of REAP, arXiv 2510.13999.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..statistics.needs import Need
from .registry import NoOptions, register_method
from .selection import Scores

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@register_method(
    "ean",
    kind="scores",
    summary="output norm summed over routed tokens",
    source="baseline of REAP, arXiv 2510.13999",
    formula="An expert's score is the norm of its output summed over the tokens routed to it.",
    needs={Need.ROUTING, Need.ROUTED_NORMS},
    by_layer=True,
)
def ean(stats: CalibrationStats, options: NoOptions) -> Scores:
    """Scores ``{layer: (E,)}``."""
    return {index: layer.total("norm").numpy() for index, layer in stats.layers.items()}
