# SPDX-License-Identifier: Apache-2.0
r"""Variability: generalists and the experts with the highest Activation Variability Score, without clustering.

.. math:: S_{var}(e) = \sum_t q_t \log_2 (q_t N), \qquad q_t = p_{t,e} / \sum_{t'} p_{t',e}

over all :math:`N` tokens: the divergence, in bits, of the expert's activation over tokens from an even one. A
specialist, active on few tokens, scores high. The ablation "GVP" of Mosaic Pruning, arXiv 2511.19822; how many
generalists it uses is not published, and 0 is our default (then it is the pure ranking).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..progress import working
from ..statistics.needs import Need
from .budget import UniformBudget
from .generalists import GeneralistOptions, check, generalist_needs, generalist_notes, search_generalists
from .registry import register_method
from .selection import Selection
from .ties import sorted_ties, still_tied, tied_in_layer

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats, LayerStats


def needs(options: GeneralistOptions) -> frozenset[Need]:
    """Router probabilities, and what the search for generalists reads."""
    return frozenset({Need.ROUTING}) | generalist_needs(options)


def variability_scores(layer: LayerStats) -> np.ndarray:
    """Activation Variability Scores ``(E,)`` in bits, from sums; 0 for an expert whose probability is always 0."""
    total = layer.total("probability").numpy()
    tokens = layer.total("routed_tokens").sum().item() / layer.routing.top_k
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = layer.total("probability_log2").numpy() / total - np.log2(total) + np.log2(tokens)
    return np.where(total > 0, scores, 0.0)


@register_method(
    "variability",
    kind="set",
    summary="generalists, then the highest Activation Variability Scores",
    source="ablation of Mosaic Pruning, arXiv 2511.19822",
    formula=(
        "In each layer a few generalists are kept first, the experts that together come nearest to the whole "
        "layer's output; then those whose router probability varies most over tokens (its Kullback-Leibler "
        "divergence from an even spread)."
    ),
    needs=needs,
    options=GeneralistOptions,
    check=check,
    by_layer=True,
)
def variability(stats: CalibrationStats, budget: UniformBudget, options: GeneralistOptions) -> Selection:
    """The retained experts."""
    retained, tied = {}, {}
    with working("choosing experts (variability)", len(budget.num_experts), "layer", "chose experts in") as work:
        for index, count in work.over(budget.num_experts.items()):
            layer = stats.layers[index]
            first, key = search_generalists(layer, index, budget, options), -variability_scores(layer)
            retained[index] = tuple(sorted(budget.order(index, key, first.retained)[:count]))
            among_scores = tied_in_layer(key.tolist(), budget, index, retained[index], first.retained)
            tied[index] = among_scores | still_tied(first.tied, retained[index])
    return Selection(retained, notes=generalist_notes(budget, options), ties=sorted_ties(tied))
