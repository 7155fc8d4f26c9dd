# SPDX-License-Identifier: Apache-2.0
r"""Soft frequency: the probability the router gave the expert, summed over the tokens that chose it.

.. math:: s_e = \sum_{t \in X_e} p_{t,e}

with :math:`p` the router's probabilities over all experts and :math:`X_e` the tokens that have :math:`e` among their
top K. SEER-MoE, arXiv 2404.05089.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..statistics.needs import Need
from .registry import NoOptions, register_method
from .selection import Scores

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@register_method(
    "soft_frequency",
    kind="scores",
    summary="router probability summed over routed tokens",
    source="SEER-MoE, arXiv 2404.05089",
    formula="An expert's score is the router's probability of it, summed over the tokens routed to it.",
    needs={Need.ROUTING},
    by_layer=True,
)
def soft_frequency(stats: CalibrationStats, options: NoOptions) -> Scores:
    """Scores ``{layer: (E,)}``."""
    return {index: layer.total("routed_probability").numpy() for index, layer in stats.layers.items()}
