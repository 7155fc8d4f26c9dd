# SPDX-License-Identifier: Apache-2.0
"""From graphs of experts, one for each sample, to the experts that are retained: those on the best paths.

Shared by ``pathfinder`` and its ablations; the rules are stated there.

Shapes: S samples, L MoE layers, ``E_l`` experts in layer l, m paths.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..progress import progress
from ..storage.values import Json
from .budget import Budget, choose_ranked
from .paths import best_after, k_best_paths, max_marginals
from .selection import Selection
from .ties import sorted_ties, tied_by_keys, tied_in_layer

if TYPE_CHECKING:
    from ..statistics.stats import CalibrationStats

_DIGITS = 9  # participation and path weights are compared to so many decimals, beyond are rounding errors

Importance = Sequence[np.ndarray]
"""Log weights ``(S, E_l)`` of the experts of each MoE layer."""

Transitions = Callable[[int], list[np.ndarray]]
"""The number of a sample -> log weights ``(E_l, E_{l+1})`` between adjacent MoE layers."""


@dataclass(frozen=True)
class Outliers:
    """Experts that are kept before any others, and such that are kept after all others.

    Attributes:
        first: The former by layer.
        last: The latter by layer.
    """

    first: Mapping[int, tuple[int, ...]]
    last: Mapping[int, tuple[int, ...]]


def on_best_paths(
    stats: CalibrationStats,
    budget: Budget,
    importance: Importance | None,
    transitions: Transitions | None,
    num_paths: int,
    *,
    ends: Importance | None = None,
    outliers: Outliers | None = None,
) -> Selection:
    """The experts on the best paths of each sample, as many as the budget keeps.

    Args:
        stats: The samples and layers.
        budget: How many.
        importance: None where paths weigh nothing but their transitions.
        transitions: None where paths weigh nothing but the importance of their experts.
        num_paths: The most paths of a sample.
        ends: Further weights of experts, which the first and the last layer have.
        outliers: Experts that come first, and some that come last, whatever paths they are on.

    Returns:
        Its findings tell how the paths fitted into the budget.
    """
    entropies = importance
    importance = node_weights(stats, importance, ends, outliers)
    layers = sorted(stats.layers)
    counts = [stats.num_experts[layer] for layer in layers]
    weights = sample_weights(stats)
    paths, best, total = _explored(stats, importance, transitions, weights, num_paths)
    rank = {layer: first_path(paths, column, counts[column]) for column, layer in enumerate(layers)}
    by_paths = {layer: rank[layer].copy() for layer in layers}
    if outliers is not None:
        for layer, experts in outliers.first.items():
            rank[layer][list(experts)] = -1
    fitting = most_paths(rank, budget, num_paths)
    counted = min(fitting + 1, num_paths)
    keys = {
        layer: sort_keys(
            rank[layer] < fitting,
            participation(paths, weights, column, counts[column], counted),
            best[column],
            total[column],
        )
        for column, layer in enumerate(layers)
    }
    on_paths = sum(int((by_paths[layer] < max(fitting, 1)).sum()) for layer in budget.original)
    notes = []
    if without := sum(len(p) == 0 for p in paths):
        notes.append(
            f"{without} of {len(paths)} samples have no path: all meet an expert of activity or probability 0"
        )
    if not fitting:
        notes.append(
            f"the single best paths of {len(paths)} samples use {on_paths} experts, more than the budget of "
            f"{budget.total} holds: the experts on the most of them are kept"
        )
    findings: Json = {} if entropies is None else {"importance_entropy": entropy_shares(layers, entropies)}
    findings |= {"paths_per_sample": fitting, "experts_on_paths": on_paths, "samples": len(paths)}
    if outliers is not None:
        findings |= {"outliers_kept": _by_layer(outliers.first), "outliers_left_out": _by_layer(outliers.last)}
    retained = choose_ranked(keys, budget)
    ties = {layer: set(experts) for layer, experts in tied_by_keys(keys, budget, retained).items()}
    for layer in layers:
        if layer in budget.original:  # of equally good paths it is chance which of them were counted
            through = [key[2:] for key in keys[layer]]
            ties.setdefault(layer, set()).update(tied_in_layer(through, budget, layer, retained[layer]))
    return Selection(retained, notes=tuple(notes), findings=findings, ties=sorted_ties(ties))


def node_weights(
    stats: CalibrationStats, importance: Importance | None, ends: Importance | None, outliers: Outliers | None
) -> Importance | None:
    """The weights of experts: their importance and what the ends add; outliers that come last are on no path."""
    given = [weights for weights in (importance, ends) if weights is not None]
    if outliers is None and len(given) < 2:
        return given[0] if given else None
    nodes = [np.zeros((len(stats.samples), count)) for _, count in sorted(stats.num_experts.items())]
    for weights in given:
        nodes = [node + weight for node, weight in zip(nodes, weights, strict=True)]
    if outliers is not None:
        for node, layer in zip(nodes, sorted(stats.layers), strict=True):
            node[:, list(outliers.last[layer])] = -np.inf
    return nodes


def find_outliers(scores: Mapping[int, np.ndarray], ranges: float) -> Outliers:
    """Experts whose score stands far out in its layer.

    Args:
        scores: Of each layer's experts ``(E_l,)``.
        ranges: How many interquartile ranges above the third quartile, or below the first, are far.
    """
    first, last = {}, {}
    for layer, values in scores.items():
        low, high = np.quantile(values, [0.25, 0.75])
        far = ranges * (high - low)
        first[layer] = tuple(np.flatnonzero(values > high + far).tolist())
        last[layer] = tuple(np.flatnonzero(values < low - far).tolist())
    return Outliers(first, last)


def _by_layer(experts: Mapping[int, Sequence[int]]) -> dict[str, list[int]]:
    return {str(layer): list(those) for layer, those in sorted(experts.items()) if those}


def sample_graphs(
    stats: CalibrationStats, importance: Importance | None, transitions: Transitions | None
) -> Iterator[tuple[list[np.ndarray], list[np.ndarray]]]:
    """The graph of each sample as log weights: nodes ``(E_l,)`` of each layer, edges ``(E_l, E_{l+1})`` between."""
    counts = [count for _, count in sorted(stats.num_experts.items())]
    for sample in range(len(stats.samples)):
        yield (
            [np.zeros(count) for count in counts] if importance is None else [layer[sample] for layer in importance],
            [np.zeros(pair) for pair in itertools.pairwise(counts)] if transitions is None else transitions(sample),
        )


def best_paths(
    stats: CalibrationStats, importance: Importance | None, transitions: Transitions | None, num_paths: int
) -> Iterator[np.ndarray]:
    """The best paths of each sample, best first: ``(m, L)`` int32, the expert in each MoE layer.

    Args:
        stats: The samples and layers.
        importance: None for 0.
        transitions: None for 0.
        num_paths: The most paths of a sample; fewer come back where its graph has fewer.
    """
    graphs = sample_graphs(stats, importance, transitions)
    for nodes, edges in progress(graphs, "finding paths", unit="sample", total=len(stats.samples)):
        yield k_best_paths(nodes, edges, num_paths)[1].astype(np.int32)


def marginals(
    stats: CalibrationStats, importance: Importance | None, transitions: Transitions | None, weights: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """What the best path through each expert weighs, relative to the best of all, over all samples.

    Args:
        stats: The samples and layers.
        importance: None for 0.
        transitions: None for 0.
        weights: Of the samples ``(S,)``.

    Returns:
        For each layer ``(E_l,)`` the largest logarithm over samples, and the weighted sum over samples.
    """
    return _explored(stats, importance, transitions, weights, 0)[1:]


def _explored(
    stats: CalibrationStats,
    importance: Importance | None,
    transitions: Transitions | None,
    weights: np.ndarray,
    num_paths: int,
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """What :func:`best_paths` and :func:`marginals` say, each sample's graph made once; no paths if 0 are wanted."""
    counts = [count for _, count in sorted(stats.num_experts.items())]
    best, total = [np.full(count, -np.inf) for count in counts], [np.zeros(count) for count in counts]
    graphs, paths = sample_graphs(stats, importance, transitions), []
    bar = progress(graphs, "finding paths", unit="sample", total=len(stats.samples))
    for weight, (nodes, edges) in zip(weights, bar, strict=True):
        after = best_after(nodes, edges)
        if num_paths:
            paths.append(k_best_paths(nodes, edges, num_paths, after)[1].astype(np.int32))
        for column, marginal in enumerate(max_marginals(nodes, edges, after)):
            best[column] = np.maximum(best[column], marginal)
            total[column] += weight * np.exp(marginal)
    return paths, best, total


def sample_weights(stats: CalibrationStats) -> np.ndarray:
    """What each sample counts ``(S,)``: 1, or an equal part of its domain's share; 1 on average."""
    import torch

    from ..statistics import weights as domain_weights

    voices = torch.ones(len(stats.samples))
    if stats.domain_weights is None:
        return voices.double().numpy()
    return domain_weights.sample_weights(stats.samples, stats.domain_weights, voices).numpy()


def first_path(paths: Sequence[np.ndarray], column: int, num_experts: int) -> np.ndarray:
    """The rank, from 0, of the first path of any sample through each expert of a layer; infinity for none."""
    first = np.full(num_experts, np.inf)
    for sample_paths in paths:
        np.minimum.at(first, sample_paths[:, column], np.arange(len(sample_paths)))
    return first


def most_paths(rank: Mapping[int, np.ndarray], budget: Budget, num_paths: int) -> int:
    """The most paths of each sample whose experts, with the protected and the fewest allowed, fit into the budget.

    Args:
        rank: Of the first path through each expert ``(E_l,)``, by layer (:func:`first_path`).
        budget: How many experts.
        num_paths: The most paths looked at.

    Returns:
        From 0, where not even the best path of each sample fits, to ``num_paths``.
    """
    size = np.zeros(num_paths, dtype=np.int64)
    for layer in budget.original:
        first = rank[layer].copy()
        first[list(budget.protected[layer])] = -1
        groups = [np.sort(first[experts]) for experts in budget.rule.grouped(range(len(first)), len(first))]
        on_paths = np.max([np.searchsorted(group, np.arange(num_paths), side="right") for group in groups], axis=0)
        more = max(budget.total, len(first)) + 1  # than the layer can keep
        allowed = np.array([*budget.allowed(layer), more])
        size += allowed[np.searchsorted(allowed, len(groups) * on_paths)]
    return int((size <= budget.total).sum())


def participation(
    paths: Sequence[np.ndarray], weights: np.ndarray, column: int, num_experts: int, num_paths: int
) -> np.ndarray:
    """On how many of the first paths of each sample the experts of a layer are ``(E_l,)``, weighted by sample."""
    count = np.zeros(num_experts)
    for sample_paths, weight in zip(paths, weights, strict=True):
        np.add.at(count, sample_paths[:num_paths, column], weight)
    return count


def sort_keys(
    inside: np.ndarray, count: np.ndarray, best: np.ndarray, total: np.ndarray
) -> list[tuple[bool, float, float, float]]:
    """What a layer's experts are sorted by, lowest = keep first.

    Args:
        inside: Whether an expert is on the paths that fit into the budget ``(E_l,)``.
        count: Its participation.
        best: What the best path through it weighs, in the sample where that is most.
        total: The same, summed over samples.
    """
    numbers = [(-values.round(_DIGITS)).tolist() for values in (count, best, total)]
    return list(zip((~inside).tolist(), *numbers, strict=True))


def entropy_shares(layers: Sequence[int], importance: Importance) -> dict[str, float]:
    """The mean entropy of each layer's importance as a share of the largest possible: near 1 all experts are alike."""
    shares = {}
    for index, logs in zip(layers, importance, strict=True):
        entropy = -(np.exp(logs) * logs).sum(axis=1)
        shares[str(index)] = round(float(entropy.mean() / np.log(max(2, logs.shape[1]))), 4)
    return shares
