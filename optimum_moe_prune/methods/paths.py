# SPDX-License-Identifier: Apache-2.0
"""The best paths through a layered graph: one node in each layer, an edge between each pair in adjacent layers.

Weights are logarithms, so the weight of a path is the sum over its nodes and edges; minus infinity is a node or edge
that no path uses. Layers may have different numbers of nodes.

Both functions rest on one pass from the last layer to the first, which finds the best continuation of every node.

Shapes: L layers, ``E_l`` nodes in layer l, m paths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEVER = -np.inf
_ROUNDING = 1e-12  # of the largest weight: sums of the same numbers in another order differ by less
_BISECTIONS = 10


def k_best_paths(
    nodes: Sequence[np.ndarray], edges: Sequence[np.ndarray], num_paths: int, after: Sequence[np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The ``num_paths`` paths of the largest weight, exactly.

    From the first layer to the last, only the m beginnings of paths are kept whose best completion weighs most. That
    loses nothing: a beginning that is left out stands behind m others, each of which has a completion of its own that
    weighs at least as much as anything the left-out one can become. Nor is every step from them tried: m of them go
    along their best completions, so the steps that cost more than the last of these is behind are left out as well.
    What is left is little more than m a layer, where trying all takes ``m E_l``.

    Args:
        nodes: Log weights ``(E_l,)`` of each layer's nodes.
        edges: Log weights ``(E_l, E_{l+1})`` between adjacent layers, one array fewer than layers.
        num_paths: How many, at least 1; fewer come back where the graph has fewer.
        after: What :func:`best_after` says of these, where it is known.

    Returns:
        The weights, highest first, ``(m,)`` float64, and the node of each layer on each path, ``(m, L)`` int64. Of
        paths with equal weights which one comes first is the same in every run.

    Raises:
        ValueError: If shapes do not fit, or ``num_paths`` is below 1.
    """
    if num_paths < 1:
        raise ValueError(f"num_paths is {num_paths}; it must be at least 1.")
    after = best_after(nodes, edges) if after is None else after
    weight = np.asarray(nodes[0], dtype=np.float64)
    potential = weight + after[0]
    node = _best(potential, np.arange(len(weight)), num_paths)
    weight, potential = weight[node], potential[node]
    if not len(node):
        return weight, np.empty((0, len(nodes)), dtype=np.int64)
    taken = [(node, node)]
    for layer in range(1, len(nodes)):
        last = taken[-1][1]
        ends = np.bincount(last, minlength=len(nodes[layer - 1])) > 0
        used, tail = np.flatnonzero(ends), (np.cumsum(ends) - 1)[last]
        step = edges[layer - 1][used] + nodes[layer]
        loss = after[layer - 1][used, None] - (step + after[layer])  # of potential, by not going the best way
        rounding = _ROUNDING * _largest(weight, after[layer - 1], after[layer])
        beginning, over = _worth_trying(tail, potential, loss, num_paths, rounding)
        node = over % len(nodes[layer])
        weight = weight[beginning] + step.ravel()[over]
        potential = weight + after[layer][node]
        kept = _best(potential, beginning * len(nodes[layer]) + node, num_paths)
        weight, potential = weight[kept], potential[kept]
        taken.append((beginning[kept], node[kept]))
    order = np.argsort(-weight, kind="stable")
    paths, row = np.empty((len(order), len(nodes)), dtype=np.int64), order
    for layer in range(len(nodes) - 1, -1, -1):
        beginning, node = taken[layer]
        paths[:, layer], row = node[row], beginning[row]
    return weight[order], paths


def max_marginals(
    nodes: Sequence[np.ndarray], edges: Sequence[np.ndarray], after: Sequence[np.ndarray] | None = None
) -> list[np.ndarray]:
    """The weight of the best path through each node, ``(E_l,)`` for each layer, relative to the best of all paths.

    So 0 for the nodes of the best path and below 0 for others; minus infinity for all where there is no path.

    Args:
        nodes, edges, after: As for :func:`k_best_paths`.
    """
    after = best_after(nodes, edges) if after is None else after
    before = [np.zeros(len(nodes[0]))]
    for layer in range(1, len(nodes)):
        arriving = (before[-1] + nodes[layer - 1])[:, None] + edges[layer - 1]
        before.append(arriving.max(axis=0))
    through = [b + n + a for b, n, a in zip(before, nodes, after, strict=True)]
    best = through[0].max()
    return [np.minimum(t - best, 0.0) if best > NEVER else np.full(len(t), NEVER) for t in through]


def best_after(nodes: Sequence[np.ndarray], edges: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The weight of the best continuation after each node ``(E_l,)``, its own weight not included."""
    if not nodes or len(edges) != len(nodes) - 1:
        raise ValueError(f"{len(nodes)} layers of nodes and {len(edges)} of edges; there must be one fewer of these.")
    for layer, weights in enumerate(edges):
        expected = (len(nodes[layer]), len(nodes[layer + 1]))
        if weights.shape != expected:
            raise ValueError(f"the edges after layer {layer} have shape {weights.shape}, and its nodes {expected}.")
    after = [np.zeros(len(nodes[-1]))]
    for layer in range(len(nodes) - 2, -1, -1):
        after.append((edges[layer] + (nodes[layer + 1] + after[-1])).max(axis=1))
    return after[::-1]


def _worth_trying(
    tail: np.ndarray, potential: np.ndarray, loss: np.ndarray, count: int, rounding: float
) -> tuple[np.ndarray, np.ndarray]:
    """Steps from beginnings of paths among which the best ``count`` are: the beginnings, and the steps ``(n,)`` each.

    Args:
        tail: The node that each beginning ends in, as a row of ``loss`` ``(m,)``.
        potential: Its weight with the best completion ``(m,)``, falling.
        loss: What each step takes from that, from 0 to infinity ``(tails, nodes)``; they are counted row by row.
        count: How many steps are wanted.
        rounding: Potentials this near are the same.
    """
    enough = len(potential) >= count
    bar, high = potential[-1] - rounding if enough else NEVER, potential[0]
    steps = np.flatnonzero((loss <= high - bar) & (loss < np.inf))
    cost, row = loss.ravel()[steps], steps // loss.shape[1]
    # Of the beginnings with the same tail those that can afford a step are the first ones: numbers tail by tail.
    by_tail = np.argsort(tail, kind="stable")
    places, start = tail[by_tail] * (len(tail) + 1) + by_tail, row * (len(tail) + 1)
    first, falling = np.searchsorted(places, start), -potential

    def affording(bar: float) -> np.ndarray:
        """How many beginnings each step leaves with a potential of at least ``bar``."""
        return np.searchsorted(places, start + np.searchsorted(falling, -(cost + bar), side="right")) - first

    if enough and len(steps) < count:  # then it is cheap to find a higher bar
        for _ in range(_BISECTIONS):
            middle = (bar + high) / 2
            bar, high = (middle, high) if affording(middle).sum() >= count else (bar, middle)
    each = affording(bar - rounding)
    place = np.arange(each.sum()) + np.repeat(first - np.cumsum(each) + each, each)
    return by_tail[place], np.repeat(steps, each)


def _largest(*weights: np.ndarray) -> float:
    """The largest magnitude of finite weights."""
    return max(float(np.abs(some[np.isfinite(some)]).max(initial=0.0)) for some in weights)


def _best(potential: np.ndarray, number: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` candidates of the highest potential, best first; ties to the lower number."""
    kept = np.flatnonzero(potential > NEVER)
    if len(kept) > count:
        bar = np.partition(potential[kept], len(kept) - count)[len(kept) - count]
        above, level = kept[potential[kept] > bar], kept[potential[kept] == bar]
        level = level[np.argsort(number[level])][: count - len(above)]
        kept = np.concatenate([above, level])
    kept = kept[np.argsort(number[kept])]
    return kept[np.argsort(-potential[kept], kind="stable")]
