# SPDX-License-Identifier: Apache-2.0
"""A budget spread over the layers by estimated divergences: from gradients, where measuring them is out of reach.

The sets are those of the recipe's method, as for a sensitivity; what each costs is not measured but follows from the
statistics (``methods.fisher_replay``). Nothing here is a loss, and nothing that people see calls it one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import RequestError
from ..methods import get_method
from ..methods.budget import Budget
from ..methods.fisher_replay import FisherLoss
from ..methods.selection import Selection
from ..names import ESTIMATED
from ..progress import working
from ..statistics.needs import Need
from ..statistics.stats import CalibrationStats
from ..storage.values import Json
from .allocation import allocate
from .layer_sets import accepted, layer_sets
from .sensitivity import ALL, LayerSensitivity, MethodSensitivity, decisive

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig

DAMPING = 1.0
"""Of what numbers of experts are chosen by (``methods.fisher_replay``): without it domains whose next tokens are
nearly certain are given up. The sum that is reported is without it, in nats."""


def estimated_sensitivity(stats: CalibrationStats, config: MoEPrunerConfig) -> MethodSensitivity:
    """What each layer would lose alone, estimated, for the sets of a recipe's method.

    Args:
        stats: The statistics, domains weighted as they are to count.
        config: The recipe; its budget is not used.

    Raises:
        RequestError: If the statistics lack what is needed.
    """
    sets = layer_sets(stats, config, None)
    layers = {}
    with working("estimating divergences", len(sets), "layer", "estimated divergences of") as work:
        for index, by_count in work.over(sets.items()):
            loss = FisherLoss(stats, index, DAMPING)
            kl = {count: {ALL: loss(retained)} for count, retained in by_count.items()}
            layers[index] = LayerSensitivity(stats.num_experts[index], by_count, kl)
    return MethodSensitivity(decisive(config), layers)


def check_estimates(stats: CalibrationStats) -> None:
    """Raise unless statistics hold what estimates follow from.

    Raises:
        RequestError: With the way to gather it.
    """
    missing = sorted(map(str, {Need.ROUTING, Need.FISHER} - stats.needs))
    if missing:
        have = ", ".join(sorted(map(str, stats.needs))) or "nothing"
        raise RequestError(
            f"allocation {ESTIMATED!r} needs the statistics {' and '.join(missing)}, and these hold {have}. Calibrate "
            "again and gather them (score --fisher)."
        )


def selected_by_estimate(stats: CalibrationStats, config: MoEPrunerConfig, budget: Budget) -> Selection:
    """The sets of a method for the numbers of experts whose estimated divergences have the least sum.

    Args:
        stats: The statistics, domains weighted as they are to count.
        config: The recipe.
        budget: The experts to retain in all layers together.

    Raises:
        RequestError: If the budget cannot be kept to, or the statistics lack what is needed.
    """
    method, options = get_method(config.method), config.options()
    accepts = accepted(config, budget)
    counts = allocate(estimated_sensitivity(stats, config), budget, accepts=accepts).num_experts
    exactly = budget.exactly(counts)
    selection = method.select(stats, exactly, options)
    losses = {
        layer: FisherLoss(stats, layer)(retained)
        for layer, retained in selection.retained.items()
        if len(retained) < budget.original[layer]
    }
    note = (
        "the numbers of experts follow from estimates, by gradients, of what layers lose, and nothing of it was "
        "measured: compare or evaluate the result"
    )
    findings: Json = {**selection.findings, "sum of estimated divergences": round(sum(losses.values()), 6)}
    return Selection(selection.retained, selection.scores, (*selection.notes, note), findings, selection.ties)
