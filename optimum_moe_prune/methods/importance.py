# SPDX-License-Identifier: Apache-2.0
r"""Importance: Pathfinder's best paths by the importance of experts alone, without transitions.

An ablation of MoE Pathfinder, arXiv 2512.18425 ("IS"): the weight of a path is the product of
:math:`e_i = \mathrm{softmax}_i(-L_i / (\tau \|F_{all}\|_F))` along it. Everything else is as in ``pathfinder``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..statistics.needs import Need
from .budget import Budget
from .path_selection import on_best_paths
from .pathfinder import GLOBAL_FIRST, ImportanceOptions, log_importance
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
        "As MoE Pathfinder, with the importance of the experts alone: a softmax of minus each expert's error when "
        "it stands in for its layer."
    ),
    needs={Need.SINGLE_ERROR},
    options=ImportanceOptions,
    allocations=GLOBAL_FIRST,
)
def importance(stats: CalibrationStats, budget: Budget, options: ImportanceOptions) -> Selection:
    """The retained experts."""
    return on_best_paths(stats, budget, log_importance(stats, options.tau), None, options.num_paths)
