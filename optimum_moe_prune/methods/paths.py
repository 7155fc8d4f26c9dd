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


def k_best_paths(
    nodes: Sequence[np.ndarray], edges: Sequence[np.ndarray], num_paths: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ``num_paths`` paths of the largest weight, exactly.

    From the first layer to the last, only the m beginnings of paths are kept whose best completion weighs most. That
    loses nothing: a beginning that is left out stands behind m others, each of which has a completion of its own that
    weighs at least as much as anything the left-out one can become. So a layer costs ``m E_l``, not ``m E_l^2``.

    Args:
        nodes: Log weights ``(E_l,)`` of each layer's nodes.
        edges: Log weights ``(E_l, E_{l+1})`` between adjacent layers, one array fewer than layers.
        num_paths: How many, at least 1; fewer come back where the graph has fewer.

    Returns:
        The weights, highest first, ``(m,)`` float64, and the node of each layer on each path, ``(m, L)`` int64. Of
        paths with equal weights which one comes first is the same in every run.

    Raises:
        ValueError: If shapes do not fit, or ``num_paths`` is below 1.
    """
    if num_paths < 1:
        raise ValueError(f"num_paths is {num_paths}; it must be at least 1.")
    after = _best_after(nodes, edges)
    weight = np.asarray(nodes[0], dtype=np.float64)
    first, weight = _keep(weight, weight + after[0], num_paths)
    paths = first[:, None]
    for layer in range(1, len(nodes)):
        candidates = weight[:, None] + (edges[layer - 1][paths[:, -1]] + nodes[layer])
        kept, weight = _keep(candidates.ravel(), (candidates + after[layer]).ravel(), num_paths)
        beginning, node = np.divmod(kept, len(nodes[layer]))
        paths = np.concatenate([paths[beginning], node[:, None]], axis=1)
    order = np.argsort(-weight, kind="stable")
    return weight[order], paths[order]


def max_marginals(nodes: Sequence[np.ndarray], edges: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The weight of the best path through each node, ``(E_l,)`` for each layer, relative to the best of all paths.

    So 0 for the nodes of the best path and below 0 for others; minus infinity for all where there is no path.

    Args:
        nodes: As for :func:`k_best_paths`.
        edges: As for :func:`k_best_paths`.
    """
    after = _best_after(nodes, edges)
    before = [np.zeros(len(nodes[0]))]
    for layer in range(1, len(nodes)):
        arriving = (before[-1] + nodes[layer - 1])[:, None] + edges[layer - 1]
        before.append(arriving.max(axis=0))
    through = [b + n + a for b, n, a in zip(before, nodes, after, strict=True)]
    best = through[0].max()
    return [np.minimum(t - best, 0.0) if best > NEVER else np.full(len(t), NEVER) for t in through]


def _best_after(nodes: Sequence[np.ndarray], edges: Sequence[np.ndarray]) -> list[np.ndarray]:
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


def _keep(weight: np.ndarray, potential: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``count`` candidates of the highest potential, best first, and their weights; ties to the first ones."""
    if len(potential) > count:
        bar = np.partition(potential, len(potential) - count)[len(potential) - count]
        above = np.flatnonzero(potential > bar)
        level = np.flatnonzero(potential == bar)[: count - len(above)]
        kept = np.sort(np.concatenate([above, level]))
    else:
        kept = np.arange(len(potential))
    kept = kept[potential[kept] > NEVER]
    kept = kept[np.argsort(-potential[kept], kind="stable")]
    return kept, weight[kept]
