# SPDX-License-Identifier: Apache-2.0
"""Statistics and plans as small arrays.

Shapes: D domains, L MoE layers, E experts of the largest layer, P plans; what a smaller layer lacks is NaN.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from ...architectures.fingerprint import same_routers
from ...errors import RequestError
from ...methods import get_method
from ...plan import PruningPlan
from ...progress import progress
from ...statistics.stats import CalibrationStats, Need

SCORES = ("reap", "frequency")
"""Methods whose scores are shown where a plan has none of its own, the best first."""


def by_layer(values: Mapping[int, Sequence[float] | np.ndarray]) -> np.ndarray:
    """Values ``(E,)`` of each layer as one array ``(L, E)``, layers in rising order."""
    table = np.full((len(values), max(map(len, values.values()))), np.nan)
    for row, (_, line) in enumerate(sorted(values.items())):
        table[row, : len(line)] = line
    return table


def by_domain(stats: CalibrationStats, *names: str) -> list[np.ndarray]:
    """Sums over the samples of each domain, ``(D, L, E)`` for each per-sample statistic."""
    member = np.array([[s.domain == domain for s in stats.samples] for domain in stats.domains], dtype=np.float64)
    shape = len(member), len(stats.layers), max(stats.num_experts.values())
    sums = [np.full(shape, np.nan) for _ in names]
    for row, (_, layer) in enumerate(progress(sorted(stats.layers.items()), "reading the statistics", unit="layer")):
        for table, name in zip(sums, names, strict=True):
            table[:, row, : layer.num_experts] = member @ layer.tensors[name].double().numpy()
    return sums


def routing_share(stats: CalibrationStats) -> np.ndarray | None:
    """Share of each domain's routing that goes to each expert ``(D, L, E)``; None if it was not gathered."""
    if not stats.samples or Need.ROUTING not in stats.needs:
        return None
    (routed,) = by_domain(stats, "routed_tokens")
    total = np.nansum(routed, axis=2, keepdims=True)
    return np.divide(routed, total, out=0 * routed, where=total > 0)


def single_error(stats: CalibrationStats) -> np.ndarray | None:
    """Squared error of a layer with one expert alone, as a share of its squared output ``(D, L, E)``."""
    if not stats.samples or Need.SINGLE_ERROR not in stats.needs:
        return None
    error, output = by_domain(stats, "single_error", "output_energy")
    share = np.divide(error, output, out=np.full_like(error, np.nan), where=output > 0)
    return share if np.isfinite(share).any() else None


def known_scores(stats: CalibrationStats) -> dict[str, np.ndarray]:
    """Scores ``(L, E)`` of those methods of ``SCORES`` whose statistics were gathered."""
    scores = {}
    for name in SCORES if stats.samples else ():
        method = get_method(name)
        options = method.options()
        if method.scores is not None and method.needs(options) <= stats.needs:
            scores[name] = by_layer(method.scores(stats, options))
    return scores


def relative(values: np.ndarray) -> np.ndarray:
    """Scores ``(L, E)`` in units of the mean magnitude of their layer; 1 where all of a layer are 0."""
    known = np.isfinite(values)
    mean = np.where(known, np.abs(values), 0).sum(1, keepdims=True) / np.maximum(known.sum(1, keepdims=True), 1)
    return np.divide(values, mean, out=np.where(known, 1.0, np.nan), where=known & (mean > 0))


# ------------------------------------------------------------------------------------------- plans


def named(plans: Iterable[PruningPlan] | Mapping[str, PruningPlan]) -> dict[str, PruningPlan]:
    """Plans by a name that tells them apart: the one given, or method and sparsity.

    Raises:
        RequestError: If something is no plan.
    """
    if isinstance(plans, PruningPlan):
        plans = [plans]
    given = plans.items() if isinstance(plans, Mapping) else (("", plan) for plan in plans)
    unique: dict[str, PruningPlan] = {}
    for key, plan in given:
        if not isinstance(plan, PruningPlan):
            raise RequestError(f"plans must be PruningPlan objects, and one is a {type(plan).__name__}.")
        name = str(key) or f"{plan.method}, {plan.sparsity:.0%} pruned"
        names = (name if n == 1 else f"{name} ({n})" for n in itertools.count(1))
        unique[next(free for free in names if free not in unique)] = plan
    return unique


def retained_grid(plan: PruningPlan) -> np.ndarray:
    """1 for a retained expert, 0 for a pruned one ``(L, E)``."""
    grid = by_layer({layer: np.zeros(count) for layer, count in plan.original_num_experts.items()})
    for row, (_, experts) in enumerate(sorted(plan.retained.items())):
        grid[row, list(experts)] = 1
    return grid


def score_grid(plan: PruningPlan) -> np.ndarray | None:
    """The plan's own scores ``(L, E)``, NaN in layers without; None where it has none."""
    unknown = {layer: np.full(count, np.nan) for layer, count in plan.original_num_experts.items()}
    return by_layer({**unknown, **plan.scores}) if plan.scores else None


def mismatch(plan: PruningPlan, stats: CalibrationStats) -> str | None:
    """Why a plan and statistics cannot be related, in words for people; None where they can."""
    if not same_routers(plan.made_for, stats.model):
        return "the plan was made for another model than the statistics"
    if plan.original_num_experts != stats.num_experts:
        return "the plan names other layers or numbers of experts than the statistics"
    return None


def coverage(plan: PruningPlan, routing: np.ndarray) -> np.ndarray:
    """Share of each domain's routing, in the original model, that went to retained experts ``(L, D)``."""
    return np.nansum(routing * retained_grid(plan), axis=2).T


def overlap(plans: Mapping[str, PruningPlan]) -> np.ndarray:
    """For each pair of plans the share of the first one's experts that the second retains too ``(P, P)``."""
    sets = [{(layer, e) for layer, experts in plan.retained.items() for e in experts} for plan in plans.values()]
    return np.array([[len(a & b) / len(a) for b in sets] for a in sets])
