# SPDX-License-Identifier: Apache-2.0
"""How a plan came about: Mosaic's clusters and Pathfinder's paths, found again from the statistics it was made from.

A plan says what is retained; its recipe and the statistics say why. The same functions run as when it was made, so
that what is shown is what happened. Where the outcome is another one (a plan edited by hand, other statistics), the
report says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import RequestError
from ...methods import BY_SENSITIVITY, mosaic, pathfinder
from ...methods.budget import Budget, UniformBudget
from ...methods.clustering import silhouette
from ...methods.path_selection import best_paths
from ...methods.variability import generalists
from ...plan import PruningPlan
from ...planning.build import budget_for, plan_needs, protected_experts
from ...progress import progress
from ...statistics.stats import CalibrationStats
from .data import mismatch

if TYPE_CHECKING:
    from ...config import MoEPrunerConfig

PATH_METHODS = ("pathfinder", "transition", "importance")


@dataclass(frozen=True)
class Recipe:
    """What a plan was made with: its recipe, the statistics with its domain weights, and the budget."""

    config: MoEPrunerConfig
    stats: CalibrationStats
    budget: Budget


@dataclass(frozen=True)
class MosaicLayer:
    """One layer of a Mosaic plan.

    Attributes:
        layer: Its number.
        generalists: Retained before clustering.
        experts: Those that were clustered, C of them.
        domain_share: Share of the kept tokens in each of K domains, falling.
        silhouette: Of the domains, from -1 to 1; None where there is one domain.
        vectors: Mean error of each expert in each domain ``(C, K)``.
        tree: Ward's merges ``(C - 1, 4)``, as scipy writes them.
        label: Cluster of each expert ``(C,)``.
        scores: Activation Variability Score of each expert ``(C,)``, bits.
        representatives: The expert that stands for each cluster.
        agrees: Whether this is what the plan retains.
    """

    layer: int
    generalists: tuple[int, ...]
    experts: tuple[int, ...]
    domain_share: np.ndarray
    silhouette: float | None
    vectors: np.ndarray
    tree: np.ndarray
    label: np.ndarray
    scores: np.ndarray
    representatives: tuple[int, ...]
    agrees: bool

    @property
    def cut(self) -> float | None:
        """The distance at which the tree is cut: 0 if it is cut among experts that are alike; None if it is not."""
        merges = len(self.experts) - len(self.representatives)
        if not self.representatives or not len(self.tree):
            return None
        heights = [0.0, *self.tree[:, 2].tolist(), 1.3 * float(self.tree[-1, 2])]
        return (heights[merges] + heights[merges + 1]) / 2

    @property
    def clusters(self) -> list[tuple[int, tuple[int, ...]]]:
        """Each cluster's representative and members."""
        members = [np.flatnonzero(self.label == number) for number in range(len(self.representatives))]
        return [
            (expert, tuple(self.experts[row] for row in rows))
            for expert, rows in zip(self.representatives, members, strict=True)
        ]


@dataclass(frozen=True)
class PathGraph:
    """The best paths of all samples.

    Attributes:
        layers: Numbers of the MoE layers, L of them.
        samples: How many samples there are.
        paths_per_sample: How many paths of each are counted.
        trimmed: Whether even the single best paths did not fit into the budget.
        nodes: For each layer and expert, the samples with a path through it ``(E_l,)``.
        edges: For each layer but the last, the samples with a path over each edge to the next ``(E_l, E_{l+1})``.
        best: As ``edges``, of the single best path of each sample alone.
    """

    layers: tuple[int, ...]
    samples: int
    paths_per_sample: int
    trimmed: bool
    nodes: list[np.ndarray]
    edges: list[np.ndarray]
    best: list[np.ndarray]


def recipe_of(plan: PruningPlan, stats: CalibrationStats) -> Recipe:
    """What a plan was made with.

    Raises:
        RequestError: If the plan does not belong to the statistics, has no recipe that can be read, or these
            statistics lack what the method reads.
    """
    from ...config import MoEPrunerConfig  # transformers, only where a plan is explained

    if problem := mismatch(plan, stats):
        raise RequestError(f"{problem}.")
    try:
        config = MoEPrunerConfig.from_dict(plan.config)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the recipe in the plan cannot be read: {error}") from error
    if config.method != plan.method:
        raise RequestError(f"the recipe in the plan is one for method {config.method!r}.")
    stats.require(plan_needs(config), config.method)
    calibration = plan.provenance.get("calibration")
    weights = calibration.get("domain_weights") if isinstance(calibration, dict) else None
    try:
        weighted = stats.with_domain_weights(weights)
    except (AttributeError, TypeError) as error:
        raise RequestError("the domain weights in the plan cannot be read.") from error
    protect, _ = protected_experts(weighted, config)
    budget = budget_for(config, weighted.num_experts, weighted.routing, protect)
    return Recipe(config, weighted, budget if config.allocates != BY_SENSITIVITY else _by_layer(plan, budget))


def _by_layer(plan: PruningPlan, budget: Budget) -> UniformBudget:
    """The budget of a plan whose sets were measured layer by layer: the numbers that it retains."""
    counts = {layer: len(plan.retained[layer]) for layer in budget.original}
    return UniformBudget(
        budget.original, sum(counts.values()), budget.rule, budget.protected, budget.seed, num_experts=counts
    )


def mosaic_layers(plan: PruningPlan, recipe: Recipe) -> Iterator[MosaicLayer]:
    """How Mosaic chose, layer by layer; layers that keep all their experts are left out."""
    options, budget = recipe.config.options(), recipe.budget
    assert isinstance(budget, UniformBudget)
    for index, count in progress(sorted(budget.num_experts.items()), "clustering again", unit="layer"):
        layer = recipe.stats.layers[index]
        if count == layer.num_experts:
            continue
        first = generalists(layer, index, budget, options)
        clusters = count - len(first)
        if clusters <= 0:
            others = tuple(expert for expert in range(layer.num_experts) if expert not in first)
            none, agrees = np.zeros(0), first == plan.retained[index]
            yield MosaicLayer(index, first, others, none, None, none, none, none, none, (), agrees)
            continue
        found = mosaic.cluster_layer(layer, first, clusters, budget.seed, options)
        quality = silhouette(
            layer.tensors["inputs"].float().numpy(), found.domain, budget.seed, weights=layer.token_weights.numpy()
        )
        share = np.bincount(found.domain, weights=layer.token_weights.numpy())
        order = np.argsort(-share, kind="stable")
        yield MosaicLayer(
            layer=index,
            generalists=first,
            experts=found.experts,
            domain_share=share[order] / share.sum(),
            silhouette=quality if np.isfinite(quality) else None,
            vectors=found.vectors[:, order],
            tree=found.tree,
            label=found.label,
            scores=found.scores,
            representatives=found.representatives,
            agrees={*first, *found.representatives} == set(plan.retained[index]),
        )


def path_graph(plan: PruningPlan, recipe: Recipe) -> PathGraph:
    """The best paths that decided about a plan of ``PATH_METHODS``, counted over samples."""
    stats, options = recipe.stats, recipe.config.options()
    layers = tuple(sorted(stats.layers))
    counts = [stats.num_experts[layer] for layer in layers]
    found: Any = plan.provenance.get("findings", {}).get("paths_per_sample")
    grown = found if type(found) is int and 0 <= found <= options.num_paths else 1
    importance = transitions = None
    if plan.method != "transition":
        importance = pathfinder.log_importance(stats, options.tau)
    if plan.method != "importance":
        transitions = pathfinder.log_transitions(stats, options.transitions)
    nodes = [np.zeros(count, dtype=np.int64) for count in counts]
    edges = [np.zeros(pair, dtype=np.int64) for pair in itertools.pairwise(counts)]
    best = [np.zeros_like(edge) for edge in edges]
    for paths in best_paths(stats, importance, transitions, max(1, grown)):
        for column, node in enumerate(nodes):
            node[np.unique(paths[:, column])] += 1
        for column, edge in enumerate(edges):
            over = paths[:, column] * edge.shape[1] + paths[:, column + 1]
            edge.flat[np.unique(over)] += 1
            best[column].flat[over[:1]] += 1
    return PathGraph(layers, len(stats.samples), max(1, grown), grown == 0, nodes, edges, best)
