# SPDX-License-Identifier: Apache-2.0
r"""Frequency: how many tokens chose the expert.

.. math:: s_e = |X_e|

with :math:`X_e` the tokens that have :math:`e` among their top K. A baseline of both papers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..statistics.needs import Need
from .registry import NoOptions, register_method
from .selection import Scores

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@register_method(
    "frequency",
    kind="scores",
    summary="tokens routed to the expert",
    source="baseline of Mosaic Pruning and MoE Pathfinder",
    formula="An expert's score is the number of tokens routed to it.",
    needs={Need.ROUTING},
    by_layer=True,
)
def frequency(stats: CalibrationStats, options: NoOptions) -> Scores:
    """Scores ``{layer: (E,)}``."""
    return {index: layer.total("routed_tokens").numpy() for index, layer in stats.layers.items()}
