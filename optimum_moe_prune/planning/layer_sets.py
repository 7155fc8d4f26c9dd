# SPDX-License-Identifier: Apache-2.0
"""What a method would retain in each layer, by number of experts: the sets that are measured, or estimated."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..architectures.routers import RoutingRule
from ..errors import RequestError
from ..methods import get_method
from ..methods.budget import Budget, checked_layers
from ..methods.limits import MOST_COUNTS, allowed_counts, least_kept
from ..methods.super_experts import super_experts
from ..names import BY_SENSITIVITY
from ..progress import working
from ..statistics.progressive import PROGRESSIVE
from ..statistics.stats import CalibrationStats
from .progressive import protected_then

if TYPE_CHECKING:
    from ..config import MoEPrunerConfig

logger = logging.getLogger(__name__)


def protected_experts(stats: CalibrationStats, config: MoEPrunerConfig) -> tuple[dict[int, set[int]], str | None]:
    """The experts that a recipe retains in any case, by layer, and what is to be said of super experts among them."""
    protect = {layer: set(experts) for layer, experts in config.protect.items()}
    if PROGRESSIVE in stats.provenance:
        return protected_then(stats), None
    if not config.protect_super_experts:
        return protect, None
    found = super_experts(stats)
    for layer, experts in found.items():
        if layer not in config.skip_layers:
            protect.setdefault(layer, set()).update(experts)
    named = "; ".join(f"layer {layer}: {', '.join(map(str, experts))}" for layer, experts in found.items() if experts)
    return protect, f"super experts protected: {named or 'none found'}"


def layer_sets(
    stats: CalibrationStats, config: MoEPrunerConfig, counts: Sequence[int] | None, most: int = MOST_COUNTS
) -> dict[int, dict[int, tuple[int, ...]]]:
    """The sets of experts to measure, by layer and number of experts, fewest first; by default of so many at most."""
    method, options = get_method(config.method), config.options()
    if config.needs_text and not stats.samples:
        raise RequestError(f"method {method.name!r} needs a calibration; give calibration texts.")
    stats.require(config.needs, method.name)
    protect, _ = protected_experts(stats, config)
    grid = check_grid(config, stats.num_experts, stats.routing, counts, protect, most)
    layers = {layer: stats.num_experts[layer] for layer in grid}
    whole = _whole(stats, config, protect, layers)
    sets: dict[int, dict[int, tuple[int, ...]]] = {layer: {} for layer in layers}
    measured = sorted({count for values in grid.values() for count in values})
    doing = f"choosing experts of every number ({method.name})"
    with working(doing, len(measured), "number", "chose experts for") as work:
        for count in work.over(measured):
            numbers = {layer: count if count in grid[layer] else total for layer, total in layers.items()}
            budget = whole.exactly(numbers)
            try:
                if method.check is not None:
                    method.check(budget, options)
            except RequestError as error:
                logger.warning("%s: %d experts a layer are not measured: %s", method.name, count, error)
                continue
            retained = method.select(stats, budget, options).retained
            for layer in layers:
                if count in grid[layer]:
                    sets[layer][count] = retained[layer]
    return sets


def accepted(config: MoEPrunerConfig, budget: Budget) -> Callable[[int, int], bool]:
    """Whether a method can choose so many experts in a layer."""
    method, options = get_method(config.method), config.options()

    def accepts(layer: int, count: int) -> bool:
        try:
            if method.check is not None:
                method.check(budget.exactly({layer: count}), options)
        except RequestError:
            return False
        return True

    return accepts


def sets_at(
    stats: CalibrationStats, config: MoEPrunerConfig, num_experts: Mapping[int, int]
) -> dict[int, dict[int, tuple[int, ...]]]:
    """The set that a method retains of each layer at a number of experts; none where it refuses them."""
    method, options = get_method(config.method), config.options()
    protect, _ = protected_experts(stats, config)
    budget = _whole(stats, config, protect, {layer: stats.num_experts[layer] for layer in num_experts})
    budget = budget.exactly(dict(num_experts))
    try:
        if method.check is not None:
            method.check(budget, options)
    except RequestError:
        return {}
    retained = method.select(stats, budget, options).retained
    return {layer: {count: retained[layer]} for layer, count in num_experts.items()}


def _whole(
    stats: CalibrationStats, config: MoEPrunerConfig, protect: Mapping[int, Iterable[int]], layers: Mapping[int, int]
) -> Budget:
    """The budget that keeps all experts of some layers."""
    protected = {layer: tuple(sorted(protect.get(layer, ()))) for layer in layers}
    total = sum(layers.values())
    return Budget(dict(layers), total, stats.routing, protected, config.seed, config.count_multiple_of)


def check_grid(
    config: MoEPrunerConfig,
    num_experts: Mapping[int, int],
    rule: RoutingRule,
    counts: Sequence[int] | None = None,
    protect: Mapping[int, Iterable[int]] | None = None,
    most: int = MOST_COUNTS,
) -> dict[int, list[int]]:
    """Numbers of experts to measure, by layer.

    Args:
        config: The recipe.
        num_experts: Experts in each MoE layer.
        rule: How the routers choose.
        counts: Those asked for; by default all, or ``most`` of them.
        protect: In place of the recipe's own.
        most: How many are measured by default.

    Raises:
        RequestError: If the method takes no number for each layer, the recipe names a layer or expert that is not
            there, or none can be measured.
    """
    if BY_SENSITIVITY not in get_method(config.method).takes:
        raise RequestError(f"method {config.method!r} takes no number of experts for each layer; it is not measured.")
    protect = config.protect if protect is None else protect
    layers, protected = checked_layers(
        num_experts, {layer: tuple(experts) for layer, experts in protect.items()}, config.skip_layers
    )
    grid = {}
    for layer, total in layers.items():
        allowed = allowed_counts(rule, total, rule.least_with(protected[layer], total), config.count_multiple_of)
        grid[layer] = _grid([count for count in allowed if count < total], counts, most)
    measurable = {count for values in grid.values() for count in values}
    if not measurable:
        raise RequestError(
            "no number of experts can be measured"
            + (f" of {', '.join(map(str, counts))}" if counts else "")
            + f"; each layer keeps at least {least_kept(rule, config.count_multiple_of)}, and at most one less than "
            "it has."
        )
    if left_out := sorted(set(counts or ()) - measurable):
        logger.warning("%s experts in a layer cannot be measured and are left out.", ", ".join(map(str, left_out)))
    return grid


def _grid(allowed: Sequence[int], counts: Sequence[int] | None, most: int) -> list[int]:
    """Numbers of experts to measure in a layer: of those allowed the ones asked for, or evenly spaced ones.

    Evenly from above, so that they add up to round budgets.
    """
    if counts is not None:
        return sorted(set(counts) & set(allowed))
    step = max(1, -(-len(allowed) // most))
    return sorted({*allowed[-step::-step], *allowed[:1]})
