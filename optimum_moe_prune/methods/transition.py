# SPDX-License-Identifier: Apache-2.0
r"""Transition: Pathfinder's best paths by the transitions alone, without the importance of experts.

An ablation of MoE Pathfinder, arXiv 2512.18425 ("TI"): the weight of a path is the product of
:math:`t_{ij} = a_i^{(l)} p_j^{(l+1)}` along it. Everything else is as in ``pathfinder``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .budget import Budget
from .pathfinder import GLOBAL_FIRST, TransitionOptions, selected, transition_needs
from .registry import register_method
from .selection import Selection

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats


@register_method(
    "transition",
    kind="set",
    summary="the experts on the best paths by activation strength and routing probability",
    source="ablation of MoE Pathfinder, arXiv 2512.18425",
    formula=(
        "As MoE Pathfinder, with the transitions between layers alone: paths weigh the mean norm of each expert's "
        "output times the router's mean probability of the next."
    ),
    needs=transition_needs,
    options=TransitionOptions,
    allocations=GLOBAL_FIRST,
)
def transition(stats: CalibrationStats, budget: Budget, options: TransitionOptions) -> Selection:
    """The retained experts."""
    return selected(stats, budget, options)
