# SPDX-License-Identifier: Apache-2.0
"""How a plan came about: its recipe run again on the statistics it was made from.

A plan says what is retained; its recipe and the statistics say why. Clusters and paths come from the functions of the
methods themselves. Where they lead to another choice (a plan edited by hand, other statistics), the report says so.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...config import MoEPrunerConfig
from ...errors import RequestError
from ...methods import pathfinder
from ...methods.budget import Budget, UniformBudget
from ...methods.clustering import silhouette
from ...methods.generalists import generalists
from ...methods.mosaic import Clusters, cluster_layer
from ...methods.path_selection import best_paths
from ...names import BY_SENSITIVITY, ESTIMATED
from ...plan import PruningPlan
from ...planning.build import budget_for
from ...planning.layer_sets import protected_experts
from ...progress import progress
from ...statistics.mapped import mapped
from ...statistics.progressive import PROGRESSIVE
from ...statistics.stats import CalibrationStats
from .data import mismatch

_SILHOUETTE_ROWS = 500  # the mean of these is within 0.01 or so of that of all
PATH_METHODS = ("pathfinder", "transition", "importance")


@dataclass(frozen=True)
class Recipe:
    """What a plan was made with: the method's options, the statistics with its domain weights, and the budget."""

    options: Any
    stats: CalibrationStats
    budget: Budget


@dataclass(frozen=True)
class MosaicLayer:
    """One layer of a Mosaic plan.

    Attributes:
        layer: Its number.
        generalists: Retained before clustering.
        clusters: The clusters of the other experts; None where only generalists are retained.
        shares: Share of the kept tokens in each domain, falling ``(D,)``.
        vectors: The clusters' performance vectors, domains in the order of ``shares`` ``(C, D)``.
        silhouette: Of the domains, from -1 to 1; None where there is one domain.
        agrees: Whether this is what the plan retains.
    """

    layer: int
    generalists: tuple[int, ...]
    clusters: Clusters | None
    shares: np.ndarray
    vectors: np.ndarray
    silhouette: float | None
    agrees: bool

    @property
    def representatives(self) -> tuple[int, ...]:
        """The expert that is retained for each cluster."""
        return () if self.clusters is None else self.clusters.representatives

    @property
    def members(self) -> dict[int, list[int]]:
        """The experts of each cluster by its representative, large clusters first."""
        if self.clusters is None:
            return {}
        experts, label = np.array(self.clusters.experts), self.clusters.label
        groups = {expert: experts[label == n].tolist() for n, expert in enumerate(self.representatives)}
        return dict(sorted(groups.items(), key=lambda group: -len(group[1])))

    @property
    def cut(self) -> float | None:
        """The distance at which the tree is cut: 0 if among experts that are alike; None without one tree."""
        if self.clusters is None or len(self.clusters.trees) > 1 or not len(tree := self.clusters.trees[0]):
            return None
        heights = [0.0, *tree[:, 2], 1.3 * tree[-1, 2]]
        merges = len(self.clusters.experts) - len(self.representatives)
        return (heights[merges] + heights[merges + 1]) / 2

    @property
    def merges(self) -> int:
        """How often experts are joined until each tree is one."""
        return 0 if self.clusters is None else sum(map(len, self.clusters.trees))

    @property
    def tied(self) -> int:
        """How many of the merges are at the same distance as another one of their tree."""
        counts = [np.unique(_levels(tree), return_counts=True)[1] for tree in self._trees]
        return int(sum(count[count > 1].sum() for count in counts))

    @property
    def has_tree(self) -> bool:
        """Whether a tree says something: where most distances tie, it shows an order that is not there."""
        return 2 * self.tied < self.merges

    @property
    def arbitrary(self) -> bool:
        """Whether a cut runs between merges at the same distance: which of them come first is chance."""
        if self.clusters is None:
            return False
        start = 0
        for tree in self.clusters.trees:
            leaves = len(tree) + 1
            merges = leaves - len(set(self.clusters.label[start : start + leaves].tolist()))
            start += leaves
            if 0 < merges < len(tree) and _levels(tree)[merges - 1] == _levels(tree)[merges]:
                return True
        return False

    @property
    def _trees(self) -> tuple[np.ndarray, ...]:
        return () if self.clusters is None else tuple(tree for tree in self.clusters.trees if len(tree))


def _levels(tree: np.ndarray) -> np.ndarray:
    """Distances of merges in parts of the largest, without what is rounding."""
    return np.round(tree[:, 2] / (tree[-1, 2] or 1.0), 9)


@dataclass(frozen=True)
class PathGraph:
    """The best paths of all samples.

    Attributes:
        paths_per_sample: How many paths of each sample are counted.
        trimmed: Whether even the single best paths did not fit into the budget.
        nodes: For each MoE layer and expert, the samples with a path through it ``(E_l,)``.
        edges: For each layer but the last, the samples with a path over each edge to the next ``(E_l, E_{l+1})``.
    """

    paths_per_sample: int
    trimmed: bool
    nodes: list[np.ndarray]
    edges: list[np.ndarray]


def recipe_of(plan: PruningPlan, stats: CalibrationStats) -> Recipe:
    """What a plan was made with.

    Raises:
        RequestError: If the plan does not belong to the statistics, has no recipe that can be read, or these
            statistics lack what the method reads.
    """
    if problem := mismatch(plan, stats):
        raise RequestError(f"{problem}.")
    try:
        config = MoEPrunerConfig.from_dict(plan.config)
        config.require_budget()
    except (TypeError, ValueError) as error:
        raise RequestError(f"the recipe in the plan cannot be read: {error}") from error
    if config.method != plan.method:
        raise RequestError(f"the recipe in the plan is one for method {config.method!r}.")
    stats.require(config.needs, config.method)
    progressive = config.progressive and config.needs_text
    if progressive != (PROGRESSIVE in stats.provenance):
        raise RequestError(
            "the plan and the statistics are not of one calibration: layers were pruned meanwhile (progressive=True) "
            f"in that of the {'plan' if progressive else 'statistics'} alone."
        )
    calibration = plan.provenance.get("calibration")
    weights = calibration.get("domain_weights") if isinstance(calibration, dict) else None
    try:
        weighted = stats.with_domain_weights(weights)
    except (AttributeError, TypeError) as error:
        raise RequestError("the domain weights in the plan cannot be read.") from error
    budget = budget_for(config, weighted.num_experts, weighted.routing, protected_experts(weighted, config)[0])
    if config.allocates in (BY_SENSITIVITY, ESTIMATED) or progressive:  # layer by layer: the numbers that it retains
        budget = budget.exactly({layer: len(plan.retained[layer]) for layer in budget.original})
    return Recipe(config.options(), weighted, budget)


def mosaic_layers(plan: PruningPlan, recipe: Recipe) -> Iterator[MosaicLayer]:
    """How Mosaic chose, layer by layer; layers that keep all their experts are left out."""
    options, budget = recipe.options, recipe.budget
    assert isinstance(budget, UniformBudget)
    for index, count in progress(sorted(budget.num_experts.items()), "clustering again", unit="layer"):
        layer = recipe.stats.layers[index]
        if count == layer.num_experts:
            continue
        first = generalists(layer, index, budget, options)
        found, quality = None, -np.inf
        shares: np.ndarray = np.zeros(0)
        vectors: np.ndarray = np.zeros((0, 0))
        if count > len(first):
            found = cluster_layer(layer, first, count - len(first), budget.seed, options)
            inputs = mapped(layer.tensors, "inputs")
            quality = silhouette(inputs, found.domain, budget.seed, most=_SILHOUETTE_ROWS)
            shares = np.bincount(found.domain, weights=layer.token_weights.numpy())
            order = np.argsort(-shares, kind="stable")
            shares, vectors = shares[order] / shares.sum(), found.vectors[:, order]
        chosen = {*first, *(() if found is None else found.representatives)}
        known = quality if np.isfinite(quality) else None
        yield MosaicLayer(index, first, found, shares, vectors, known, chosen == set(plan.retained[index]))


def path_graph(plan: PruningPlan, recipe: Recipe) -> PathGraph:
    """The best paths that decided about a plan of ``PATH_METHODS``, counted over samples."""
    options = recipe.options
    counts = [count for _, count in sorted(recipe.stats.num_experts.items())]
    grown: Any = plan.provenance.get("findings", {}).get("paths_per_sample")
    grown = grown if type(grown) is int and 0 <= grown <= options.num_paths else 1
    nodes = [np.zeros(count, dtype=np.int64) for count in counts]
    edges = [np.zeros(pair, dtype=np.int64) for pair in itertools.pairwise(counts)]
    weights = pathfinder.path_weights(recipe.stats, options)
    for paths in best_paths(recipe.stats, weights.nodes(recipe.stats), weights.transitions, max(1, grown)):
        for column, node in enumerate(nodes):
            node[np.unique(paths[:, column])] += 1
        for column, edge in enumerate(edges):
            used = np.ravel_multi_index((paths[:, column], paths[:, column + 1]), edge.shape)
            edge.ravel()[np.unique(used)] += 1
    return PathGraph(max(1, grown), grown == 0, nodes, edges)
