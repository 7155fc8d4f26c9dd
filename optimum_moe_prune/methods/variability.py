# SPDX-License-Identifier: Apache-2.0
r"""Variability: generalists and the experts with the highest Activation Variability Score, without clustering.

.. math:: S_{var}(e) = \sum_t q_t \log_2 (q_t N), \qquad q_t = p_{t,e} / \sum_{t'} p_{t',e}

over all :math:`N` tokens: the divergence, in bits, of the expert's activation over tokens from an even one. A
specialist, active on few tokens, scores high. The ablation "GVP" of Mosaic Pruning, arXiv 2511.19822; how many
generalists it uses is not published, and 0 is our default (then it is the pure ranking).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import RequestError
from ..progress import working
from ..statistics.needs import Need
from .budget import UniformBudget
from .enumeration import SearchOptions, search_notes, search_set
from .limits import allowed_counts
from .registry import register_method
from .selection import Selection
from .ties import sorted_ties, still_tied, tied_in_layer

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats, LayerStats
    from .replay_leaders import Found


@dataclass(frozen=True)
class GeneralistOptions(SearchOptions):
    """Options of methods that begin with generalists; ``search`` and ``max_sets`` as in ``enumeration``.

    Attributes:
        num_generalists: Experts chosen for the least reconstruction error, at most as many as are retained.
    """

    num_generalists: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generalists < 0:
            raise ValueError(f"num_generalists is {self.num_generalists}; it cannot be negative.")


def needs(options: GeneralistOptions) -> frozenset[Need]:
    """``GRAM`` only where there are generalists."""
    return frozenset({Need.ROUTING} | ({Need.GRAM} if options.num_generalists else set()))


def variability_scores(layer: LayerStats) -> np.ndarray:
    """Activation Variability Scores ``(E,)`` in bits, from sums; 0 for an expert whose probability is always 0."""
    total = layer.total("probability").numpy()
    tokens = layer.total("routed_tokens").sum().item() / layer.routing.top_k
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = layer.total("probability_log2").numpy() / total - np.log2(total) + np.log2(tokens)
    return np.where(total > 0, scores, 0.0)


def check(budget: UniformBudget, options: GeneralistOptions) -> None:
    """Refuse more generalists than a layer keeps experts.

    Raises:
        RequestError: Naming the layer.
    """
    for index, count in budget.num_experts.items():
        if options.num_generalists > count:
            raise RequestError(
                f"num_generalists is {options.num_generalists}, and the budget keeps {count} experts in layer "
                f"{index}; ask for at most that many."
            )


def generalists(layer: LayerStats, index: int, budget: UniformBudget, options: GeneralistOptions) -> tuple[int, ...]:
    """The generalists of a layer, the protected experts among them; more of them if more are protected."""
    return search_generalists(layer, index, budget, options).retained


def search_generalists(layer: LayerStats, index: int, budget: UniformBudget, options: GeneralistOptions) -> Found:
    """As :func:`generalists`, with the experts between which only their numbers decided."""
    return search_set(layer, index, num_generalists(index, budget, options), budget, options)


def num_generalists(index: int, budget: UniformBudget, options: GeneralistOptions) -> int:
    """How many generalists a layer has; where its router has groups, the next number that can be a layer.

    A set whose groups are not equal is none, so it has no reconstruction loss.
    """
    rule, protected, asked = budget.rule, budget.protected[index], options.num_generalists
    if asked <= len(protected) or rule.groups == 1:
        return max(asked, len(protected))
    total = budget.original[index]
    return next(n for n in allowed_counts(rule, total, rule.least_with(protected, total)) if n >= asked)


def generalist_notes(budget: UniformBudget, options: GeneralistOptions) -> tuple[str, ...]:
    """What is to be said of the search for generalists."""
    numbers = {i: num_generalists(i, budget, options) for i in budget.num_experts}
    more = {n for i, n in numbers.items() if n > max(options.num_generalists, len(budget.protected[i]))}
    notes = tuple(
        f"num_generalists={options.num_generalists} is raised to {n}, the next number that the router's "
        f"{budget.rule.groups} groups can share"
        for n in sorted(more)
    )
    return notes + search_notes(numbers, budget, options)


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
