# SPDX-License-Identifier: Apache-2.0
"""Heads for further tokens (MTP) in a plan: each is planned by itself, by the method of the layers.

So the model's own layers are planned as they would be without heads; paths through the network end at its last layer,
and a head, as a network of one layer, goes by what its own experts weigh.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..architectures.routers import RoutingRule
from ..methods import get_method
from ..methods.budget import UniformBudget
from ..methods.limits import allowed_counts
from ..methods.selection import Selection, Ties
from ..names import KEEP, PRUNE
from ..statistics.stats import CalibrationStats

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig


def way_with_heads(mtp: str | None, uniform: bool) -> str:
    """What becomes of heads: what was asked for, or what loads.

    Whoever builds a head gives it the number of experts of the whole model. Where every layer keeps the same number,
    that is the number, so a head is pruned to it; where they differ it stays what it was, and a head is kept.

    Args:
        mtp: As in a recipe.
        uniform: Whether every layer keeps the same number of experts.
    """
    return mtp or (PRUNE if uniform else KEEP)


def budget_of_head(
    head: int, total: int, num_experts: Mapping[int, int], rule: RoutingRule, seed: int = 0, multiple: int = 1
) -> UniformBudget:
    """As many experts as a layer of the model keeps, or as the layers keep on average.

    Args:
        head: The layer that the head counts as.
        total: Its experts.
        num_experts: What the layers of the model keep.
        rule: How its router chooses.
        seed: Carried along.
        multiple: What the number is a multiple of.
    """
    wanted = round(sum(num_experts.values()) / len(num_experts))
    count = min((count for count in allowed_counts(rule, total, 1, multiple) if count >= wanted), default=total)
    return UniformBudget({head: total}, count, rule, {head: ()}, seed, multiple, num_experts={head: count})


def selected_in_heads(
    heads: CalibrationStats, config: MoEPrunerConfig, retained: Mapping[int, Collection[int]]
) -> Selection:
    """What a method retains in heads; nothing where they stay whole or are left out.

    Args:
        heads: Their statistics.
        config: Method, budget, and what becomes of heads.
        retained: The experts of the model's own layers.
    """
    num_experts = {layer: len(experts) for layer, experts in retained.items()}
    if way_with_heads(config.mtp, len(set(num_experts.values())) == 1) != PRUNE:
        return Selection({})
    method, options = get_method(config.method), config.options()
    chosen: dict[int, tuple[int, ...]] = {}
    scores: dict[int, Any] = {}
    ties: Ties = {}
    notes: tuple[str, ...] = ()
    for layer, total in heads.num_experts.items():
        alone = replace(heads, layers={layer: heads.layers[layer]})
        budget = budget_of_head(layer, total, num_experts, heads.routing, config.seed, config.count_multiple_of)
        selection = method.select(alone, budget, options)
        chosen |= selection.retained
        scores |= selection.scores or {}
        ties |= selection.ties
        notes += selection.notes
    return Selection(chosen, scores or None, notes, ties=ties)
