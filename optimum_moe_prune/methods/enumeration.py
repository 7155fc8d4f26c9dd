# SPDX-License-Identifier: Apache-2.0
r"""Enumeration: the set of experts with which the layer's output changes least.

.. math:: \arg\min_{|S| = r} L_{recon}(S), \qquad L_{recon}(S) = \sum_s \|F_S(X_s) - F_{all}(X_s)\|_F

over the calibration samples :math:`s`. NAEE, arXiv 2402.14800, which re-runs the layer for each set; here every loss
comes from router logits and Gram matrices (see ``replay``), exactly.

Up to ``max_sets`` sets all are tried. Beyond, experts are dropped one at a time, always the one whose removal raises
the loss least; for how a layer of 60 experts is enumerated the paper says nothing, Mosaic Pruning uses this
elimination. Where the router has groups, a set holds as many experts of each: no other sets are counted and tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..errors import RequestError
from ..progress import working
from ..statistics.needs import Need
from .budget import UniformBudget
from .registry import register_method
from .selection import Selection
from .sets import num_sets

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats, LayerStats
    from .replay_leaders import Found
    from .replay_search import Replay

Search = Literal["auto", "exhaustive", "greedy"]


MOST_SETS = 2_000_000


@dataclass(frozen=True)
class SearchOptions:
    """How the set with the least reconstruction error is searched.

    Attributes:
        search: ``"exhaustive"``, ``"greedy"`` backward elimination, or ``"auto"``: exhaustive up to ``max_sets`` sets.
        max_sets: The most sets that ``"auto"`` tries.
    """

    search: Search = "auto"
    max_sets: int = 20_000

    def __post_init__(self) -> None:
        if self.max_sets < 1:
            raise ValueError(f"max_sets is {self.max_sets}; it must be at least 1.")


@register_method(
    "enumeration",
    kind="set",
    summary="the set with the least reconstruction error, by exhaustive or greedy search",
    source="NAEE, arXiv 2402.14800",
    formula=(
        "In each layer the set is kept whose output is nearest to the whole layer's: the norm of the difference, "
        "summed over calibration samples; exactly over all sets where they are few enough, else by dropping the "
        "expert that costs least, one at a time."
    ),
    needs={Need.ROUTING, Need.GRAM},
    options=SearchOptions,
    by_layer=True,
)
def enumeration(stats: CalibrationStats, budget: UniformBudget, options: SearchOptions) -> Selection:
    """The retained experts."""
    with working("choosing experts (enumeration)", len(budget.num_experts), "layer", "chose experts in") as work:
        found = {
            index: search_set(stats.layers[index], index, count, budget, options)
            for index, count in work.over(budget.num_experts.items())
        }
    return Selection(
        {index: best.retained for index, best in found.items()},
        notes=search_notes(budget.num_experts, budget, options),
        ties={index: best.tied for index, best in found.items() if best.tied},
    )


def _num_sets(index: int, size: int, budget: UniformBudget) -> int:
    """The sets of ``size`` experts of a layer that hold the protected ones."""
    return num_sets(budget.rule, budget.original[index], size, budget.protected[index])


def search_notes(sizes: Mapping[int, int], budget: UniformBudget, options: SearchOptions) -> tuple[str, ...]:
    """What is to be said of searches for sets of these sizes, by layer: where not all sets are tried."""
    if options.search != "auto":
        return ()
    searches = {(_num_sets(index, size, budget), size): None for index, size in sizes.items()}
    return tuple(
        f"{sets} sets of {size} experts are more than max_sets={options.max_sets}; eliminated greedily"
        for sets, size in searches
        if sets > options.max_sets
    )


def best_set(
    layer: LayerStats, index: int, size: int, budget: UniformBudget, options: SearchOptions
) -> tuple[int, ...]:
    """The set of ``size`` experts of a layer, holding the protected ones, with the least (or a greedily small) loss.

    Raises:
        RequestError: If an exhaustive search is asked for that would never end.
    """
    return search_set(layer, index, size, budget, options).retained


def reconstruction(layer: LayerStats) -> Replay:
    """The losses of sets of a layer by what its output differs."""
    from ..statistics.mapped import mapped  # they need torch
    from .replay_search import Replay

    tensors = layer.tensors
    return Replay(tensors["logits"], mapped(tensors, "gram"), layer.routing, layer.token_sample, layer.loss_weights)


def search_set(
    layer: LayerStats,
    index: int,
    size: int,
    budget: UniformBudget,
    options: SearchOptions,
    replay_of: Callable[[LayerStats], Replay] = reconstruction,
) -> Found:
    """As :func:`best_set`, by whatever losses, with the experts between which only their numbers decided."""
    from .replay_leaders import Found  # it needs torch

    required = budget.protected[index]
    if size == len(required):
        return Found(required)
    sets = _num_sets(index, size, budget)
    if options.search == "exhaustive" and sets > MOST_SETS:
        raise RequestError(
            f"search='exhaustive' would try {sets} sets of {size} experts in layer {index}; the most is {MOST_SETS}. "
            "Use search='greedy'."
        )
    replay = replay_of(layer)
    if options.search == "exhaustive" or (options.search == "auto" and sets <= options.max_sets):
        return replay.search_all(size, required)
    return replay.search_greedily(size, required)
