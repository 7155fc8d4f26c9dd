# SPDX-License-Identifier: Apache-2.0
r"""REAP, router-weighted expert activation pruning: the mean contribution of the expert to the tokens routed to it.

.. math:: s_e = \frac{1}{|X_e|} \sum_{t \in X_e} g_{t,e} \|f_e(x_t)\|_2

with :math:`g` the weight of the expert. An expert without routed tokens scores 0. REAP, arXiv 2510.13999, ICLR 2026.

Which weight is meant differs between readings, so it is an option: ``applied``, the weight the model multiplies with
(the authors' code renormalises where the model does, which is the same); ``probability``, the router's probability
over all experts; ``renormalised``, divided by the sum over the chosen ones whatever the model does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..statistics.needs import Need
from .registry import per_routed_token, register_method
from .selection import Scores

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@dataclass(frozen=True)
class Options:
    """Options of ``reap``.

    Attributes:
        gate: Which weight ``g`` is.
    """

    gate: Literal["applied", "probability", "renormalised"] = "applied"


@register_method(
    "reap",
    kind="scores",
    summary="mean router-weighted output norm over routed tokens",
    source="REAP, arXiv 2510.13999",
    formula=(
        "An expert's score is the mean, over the tokens routed to it, of the norm of its output times the weight "
        "the router gives it."
    ),
    needs={Need.ROUTING, Need.ROUTED_NORMS},
    options=Options,
    by_layer=True,
)
def reap(stats: CalibrationStats, options: Options) -> Scores:
    """Scores ``{layer: (E,)}``."""
    return {index: per_routed_token(layer, f"norm_{options.gate}") for index, layer in stats.layers.items()}
