# SPDX-License-Identifier: Apache-2.0
r"""Variability: generalists and the experts with the highest Activation Variability Score, without clustering.

.. math:: S_{var}(e) = \sum_t q_t \log_2 (q_t N), \qquad q_t = p_{t,e} / \sum_{t'} p_{t',e}

over all :math:`N` tokens: the divergence, in bits, of the expert's activation over tokens from an even one. A
specialist, active on few tokens, scores high. The ablation "GVP" of Mosaic Pruning, arXiv 2511.19822; how many
generalists it uses is not published, and 0 is our default (then it is the pure ranking).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..budget import Budget
from ..errors import RequestError
from ..stats import CalibrationStats, LayerStats, Need
from .enumeration import Search, best_set
from .registry import Retained, register_method


@dataclass(frozen=True)
class Options:
    """Options of ``variability``.

    Attributes:
        num_generalists: Experts chosen for the least reconstruction error; the others are ranked.
        search: How the generalists are searched, as in ``enumeration``.
        max_sets: The most sets that ``search="auto"`` tries.
    """

    num_generalists: int = 0
    search: Search = "auto"
    max_sets: int = 20_000

    def __post_init__(self) -> None:
        if self.num_generalists < 0:
            raise ValueError(f"num_generalists is {self.num_generalists}; it cannot be negative.")


def needs(options: Options) -> frozenset[Need]:
    """``GRAM`` only where there are generalists."""
    return frozenset({Need.ROUTING} | ({Need.GRAM} if options.num_generalists else set()))


def variability_scores(layer: LayerStats) -> np.ndarray:
    """Activation Variability Scores ``(E,)`` in bits, from sums; 0 for an expert whose probability is always 0."""
    total = layer.total("probability").numpy()
    tokens = layer.total("routed_tokens").sum().item() / layer.routing.top_k
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = layer.total("probability_log2").numpy() / total - np.log2(total) + np.log2(tokens)
    return np.where(total > 0, scores, 0.0)


def generalists(
    layer: LayerStats, index: int, count: int, budget: Budget, search: Search, max_sets: int
) -> tuple[int, ...]:
    """``count`` generalists of a layer, the protected experts among them; more if more are protected.

    Raises:
        RequestError: If more generalists are asked for than the budget keeps.
    """
    if count > budget.num_experts[index]:
        raise RequestError(
            f"num_generalists is {count}, and the budget keeps {budget.num_experts[index]} experts in layer "
            f"{index}; ask for "
            "at most that many."
        )
    protected = budget.protected[index]
    return best_set(layer, max(count, len(protected)), protected, search, max_sets)


@register_method(
    "variability",
    kind="set",
    summary="generalists, then the highest Activation Variability Scores",
    source="ablation of Mosaic Pruning, arXiv 2511.19822",
    needs=needs,
    options=Options,
)
def variability(stats: CalibrationStats, budget: Budget, options: Options) -> Retained:
    """Retained experts ``{layer: experts}``."""
    retained = {}
    for index, count in budget.num_experts.items():
        layer = stats.layers[index]
        first = generalists(layer, index, options.num_generalists, budget, options.search, options.max_sets)
        order = np.argsort(-variability_scores(layer), kind="stable").tolist()
        ranked = [expert for expert in order if expert not in first]
        retained[index] = tuple(sorted([*first, *ranked[: count - len(first)]]))
    return retained
