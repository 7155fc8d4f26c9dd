# SPDX-License-Identifier: Apache-2.0
r"""Importance: Pathfinder's best paths by the importance of experts alone, without transitions.

An ablation of MoE Pathfinder, arXiv 2512.18425 ("IS"): the weight of a path is the product of
the importances :math:`e_i` along it (``alone``). Everything else is as in ``pathfinder``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .budget import Budget
from .pathfinder import GLOBAL_FIRST, ImportanceOptions, importance_needs, selected
from .registry import register_method
from .selection import Selection

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@register_method(
    "importance",
    kind="set",
    summary="the experts on the best paths by reconstruction loss",
    source="ablation of MoE Pathfinder, arXiv 2512.18425",
    formula=(
        "As MoE Pathfinder, with the importance of the experts alone: how well each stands in for its layer, against "
        "the others."
    ),
    needs=importance_needs,
    options=ImportanceOptions,
    allocations=GLOBAL_FIRST,
)
def importance(stats: CalibrationStats, budget: Budget, options: ImportanceOptions) -> Selection:
    """The retained experts."""
    return selected(stats, budget, options)
