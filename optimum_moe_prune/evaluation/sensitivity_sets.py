# SPDX-License-Identifier: Apache-2.0
"""What a sensitivity measures: the sets of each layer alone, and whole plans over sparsities."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..config import MoEPrunerConfig
from ..errors import RequestError
from ..methods import get_method
from ..names import BY_SENSITIVITY
from ..planning.build import quiet_plan
from ..planning.layer_sets import check_grid as check_grid
from ..planning.layer_sets import layer_sets as layer_sets
from ..planning.layer_sets import sets_at as sets_at
from ..planning.sensitivity import Retained, Sensitivity
from ..progress import working
from ..statistics.stats import CalibrationStats
from ..storage.values import Json

logger = logging.getLogger(__name__)

SPARSITIES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
"""Of whole models, by default; those that a model has too few experts for are left out."""


def whole_plans(
    stats: CalibrationStats,
    config: MoEPrunerConfig,
    sparsities: Sequence[float],
    domain_weights: Mapping[str, float] | None,
    sensitivity: Sensitivity | None = None,
) -> list[tuple[str, float, Retained]]:
    """Allocation, sparsity and experts of the plans of a method; those that cannot be made are left out.

    Args:
        stats: What the method chooses from.
        config: The recipe; its budget is not used.
        sparsities: The budgets.
        domain_weights: A share for each domain.
        sensitivity: What the layers lose, for the plans that follow from it; without, the method's own allocations.
    """
    method = get_method(config.method)
    own = sorted(method.allocations, reverse=True)
    if method.measures and sensitivity is None:
        return []
    level = logging.INFO if tuple(sparsities) == SPARSITIES else logging.WARNING  # those asked for are missed
    plans = []
    allocations = own if sensitivity is None or method.measures else [BY_SENSITIVITY]
    budgets = [(allocation, sparsity) for allocation in allocations for sparsity in sparsities]
    with working(f"planning whole models ({config.method})", len(budgets), "plan", "made") as work:
        for allocation, sparsity in work.over(budgets):
            budget: Json = {"num_experts": None, "total_experts": None, "sparsity": sparsity}
            recipe = replace(config, allocation=allocation, progressive=False, **budget)
            try:
                plan = quiet_plan(stats, recipe, domain_weights, sensitivity)
            except RequestError as error:
                logger.log(
                    level, "%s, %s: sparsity %g is not measured: %s", config.method, allocation, sparsity, error
                )
            else:
                plans.append((allocation, sparsity, plan.retained))
    return plans
