# SPDX-License-Identifier: Apache-2.0
r"""Fisher: the set of experts with which the model's own predictions change least, to second order.

.. math:: \arg\min_{|S| = r} D(S), \qquad D(S) = \frac{1}{2 T J} \sum_{t, j} \left( \sum_e (\pi_{te}(S) -
    \pi_{te}(all)) \, f_e(x_t) \cdot g_{tj} \right)^2

with :math:`g_{tj}` the gradient, at the experts' output, of the log-probability of labels drawn from the model's own
predictions (``fisher_replay``). So a change of the layer's output counts by what the layers above make of it, where
enumeration counts all directions alike. No paper: the Fisher information of the predictions, over exact re-routing.

Sets are searched as enumeration searches them: all where they are few enough, else by dropping one expert at a time.
Heads for further tokens (MTP) have no part in the predictions; there the experts with the most routed probability
stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..progress import working
from ..statistics.needs import Need
from .budget import UniformBudget, choose_ranked, keys_of
from .enumeration import SearchOptions, search_notes, search_set
from .registry import register_method
from .selection import Selection
from .ties import tied_by_keys

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@dataclass(frozen=True)
class FisherOptions(SearchOptions):
    """How the set is searched, and what counts.

    Attributes:
        search: As for enumeration.
        max_sets: Likewise.
        damping: How much tokens whose predictions are nearly certain count beside others: 0 as little as the
            second order says, which gives up whole domains of them.
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damping < float("inf"):
            raise ValueError(f"damping is {self.damping}; it must be a finite number of at least 0.")


@register_method(
    "fisher",
    kind="set",
    summary="the set that changes the model's predictions least, by gradients",
    source="this package: Fisher information over exact re-routing",
    formula=(
        "In each layer the set is kept that changes the model's own predictions least to second order: the change of "
        "the layer's output, weighed by gradients of the log-probabilities of labels drawn from these predictions; "
        "exactly over all sets where they are few enough, else by dropping the expert that costs least, one at a time."
    ),
    needs={Need.ROUTING, Need.FISHER},
    options=FisherOptions,
)
def fisher(stats: CalibrationStats, budget: UniformBudget, options: FisherOptions) -> Selection:
    """The retained experts."""
    from .fisher_replay import fisher_replay  # it needs torch

    if any(stats.layers[index].is_head for index in budget.num_experts):
        return _by_routing(stats, budget)
    replay_of = partial(fisher_replay, damping=options.damping)
    with working("choosing experts (fisher)", len(budget.num_experts), "layer", "chose experts in") as work:
        found = {
            index: search_set(stats.layers[index], index, count, budget, options, replay_of)
            for index, count in work.over(budget.num_experts.items())
        }
    return Selection(
        {index: best.retained for index, best in found.items()},
        notes=search_notes(budget.num_experts, budget, options),
        ties={index: best.tied for index, best in found.items() if best.tied},
    )


def _by_routing(stats: CalibrationStats, budget: UniformBudget) -> Selection:
    """What heads retain, of whose experts no gradients are known."""
    scores = {index: stats.layers[index].total("routed_probability").numpy() for index in budget.num_experts}
    keys = keys_of(scores, budget)
    chosen = choose_ranked(keys, budget)
    note = "heads have no part in the model's predictions: there the experts with the most routed probability stay"
    return Selection(chosen, notes=(note,), ties=tied_by_keys(keys, budget, chosen))
