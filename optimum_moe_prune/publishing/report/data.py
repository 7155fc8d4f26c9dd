# SPDX-License-Identifier: Apache-2.0
"""Statistics and plans as small plain arrays.

Statistics are read layer by layer and reduced at once: what stays is a number for each domain, layer and expert.

Shapes: D domains, L MoE layers, E experts of the largest layer; what a smaller layer lacks is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import RequestError
from ...methods import get_method
from ...plan import PruningPlan
from ...progress import progress
from ...statistics.stats import CalibrationStats, LayerStats, Need
from .words import plain

Plans = Mapping[str, PruningPlan]

SCORES = ("reap", "frequency")
"""Scores that are shown where a plan has none of its own, the best first."""


@dataclass(frozen=True)
class Reduced:
    """What a report shows of the statistics.

    Attributes:
        layers: Numbers of the MoE layers.
        num_experts: Experts of each.
        top_k: Experts used per token.
        domains: Names, in the order of the alphabet.
        tokens: Tokens of each domain.
        routed: Tokens of the domain that were routed to the expert ``(D, L, E)``; None if not gathered.
        error: Squared error of the layer with this expert alone, over the tokens of the domain, as a share of the
            squared output of the layer ``(D, L, E)``; None if not gathered.
        scores: Scores ``(L, E)`` of the methods of ``SCORES`` whose needs were gathered.
    """

    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    top_k: int
    domains: tuple[str, ...]
    tokens: tuple[int, ...]
    routed: np.ndarray | None
    error: np.ndarray | None
    scores: dict[str, np.ndarray]

    @property
    def routing(self) -> np.ndarray | None:
        """Share of the domain's routing that goes to each expert ``(D, L, E)``: 1 over the experts of a layer."""
        if self.routed is None:
            return None
        total = np.nansum(self.routed, axis=2, keepdims=True)
        return np.divide(self.routed, total, out=0 * self.routed, where=total > 0)


def reduce_stats(stats: CalibrationStats) -> Reduced:
    """Statistics by domain, layer and expert."""
    layers = tuple(sorted(stats.layers))
    domains = stats.domains
    member = np.array([[sample.domain == domain for sample in stats.samples] for domain in domains], dtype=np.float64)
    shape = (len(domains), len(layers), max(stats.num_experts.values()))
    has_routing = bool(domains) and Need.ROUTING in stats.needs
    has_error = bool(domains) and Need.SINGLE_ERROR in stats.needs
    routed, error = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, index in enumerate(progress(layers, "reading the statistics", unit="layer")):
        layer = stats.layers[index]
        columns = slice(layer.num_experts)
        if has_routing:
            routed[:, row, columns] = member @ _by_sample(layer, "routed_tokens")
        if has_error:
            wrong = member @ _by_sample(layer, "single_error")
            output = member @ _by_sample(layer, "output_energy")
            error[:, row, columns] = np.divide(wrong, output, out=np.full_like(wrong, np.nan), where=output > 0)
    return Reduced(
        layers=layers,
        num_experts=tuple(stats.num_experts[index] for index in layers),
        top_k=stats.model["top_k"],
        domains=tuple(domains),
        tokens=tuple(domains.values()),
        routed=routed if np.isfinite(routed).any() else None,
        error=error if np.isfinite(error).any() else None,
        scores=_scores(stats) if domains else {},
    )


def _by_sample(layer: LayerStats, name: str) -> np.ndarray:
    return layer.tensors[name].double().numpy()


def _scores(stats: CalibrationStats) -> dict[str, np.ndarray]:
    found = {}
    for name in SCORES:
        method = get_method(name)
        options = method.options()
        if method.needs(options) <= stats.needs and method.scores is not None:
            found[name] = padded(method.scores(stats, options))
    return found


def padded(values: Mapping[int, Sequence[float] | np.ndarray]) -> np.ndarray:
    """Values ``(E,)`` by layer as one array ``(L, E)``, layers in rising order."""
    table = np.full((len(values), max(map(len, values.values()))), np.nan)
    for row, (_, line) in enumerate(sorted(values.items())):
        table[row, : len(line)] = line
    return table


# ------------------------------------------------------------------------------------------- plans


def named(plans: Iterable[PruningPlan] | Mapping[str, PruningPlan]) -> dict[str, PruningPlan]:
    """Plans by a name that tells them apart: the one given, or method and sparsity.

    Raises:
        RequestError: If something is no plan.
    """
    if isinstance(plans, Mapping):
        pairs = [(plain(name), plan) for name, plan in plans.items()]
    else:
        if isinstance(plans, PruningPlan):
            plans = [plans]
        pairs = [("", plan) for plan in plans]
    found: dict[str, PruningPlan] = {}
    for given, plan in pairs:
        if not isinstance(plan, PruningPlan):
            raise RequestError(f"plans must be PruningPlan objects, and one is a {type(plan).__name__}.")
        name = given or f"{plain(plan.method)}, {plan.sparsity:.0%} pruned"
        number, base = 2, name
        while name in found:
            name, number = f"{base} ({number})", number + 1
        found[name] = plan
    return found


def retained_grid(plan: PruningPlan) -> np.ndarray:
    """1 for a retained expert, 0 for a pruned one ``(L, E)``."""
    grid = padded({layer: np.zeros(count) for layer, count in plan.original_num_experts.items()})
    for row, (_, experts) in enumerate(sorted(plan.retained.items())):
        grid[row, list(experts)] = 1
    return grid


def score_grid(plan: PruningPlan) -> np.ndarray | None:
    """The plan's scores ``(L, E)``, NaN in layers without; None where it has none at all."""
    if not plan.scores:
        return None
    return padded(
        {layer: plan.scores.get(layer, np.full(n, np.nan)) for layer, n in plan.original_num_experts.items()}
    )


def relative(values: np.ndarray) -> np.ndarray:
    """Scores ``(L, E)`` in units of the mean magnitude of their layer; 1 where all of a layer are 0."""
    there = np.isfinite(values)
    mean = np.abs(np.where(there, values, 0)).sum(axis=1, keepdims=True) / np.maximum(
        there.sum(axis=1, keepdims=True), 1
    )
    return np.divide(values, mean, out=np.where(there, 1.0, np.nan), where=there & (mean > 0))


def mismatch(plan: PruningPlan, stats: CalibrationStats) -> str | None:
    """Why a plan and statistics cannot be related, in words for people; None where they can."""
    mine, theirs = plan.made_for.get("fingerprint"), stats.model.get("fingerprint")
    if mine and theirs and mine != theirs:
        return "the plan was made for another model than the statistics"
    if plan.original_num_experts != stats.num_experts:
        return "the plan names other layers or numbers of experts than the statistics"
    return None


def coverage(plan: PruningPlan, reduced: Reduced) -> np.ndarray | None:
    """Share of each domain's routing, in the original model, that went to retained experts ``(L, D)``."""
    routing = reduced.routing
    return None if routing is None else np.nansum(routing * retained_grid(plan), axis=2).T


def overlap(plans: Plans) -> np.ndarray:
    """For each pair of plans the share of the first one's experts that the second retains too ``(P, P)``."""
    sets = [{(layer, e) for layer, experts in plan.retained.items() for e in experts} for plan in plans.values()]
    return np.array([[len(a & b) / len(a) for b in sets] for a in sets])
