# SPDX-License-Identifier: Apache-2.0
"""Best paths against all paths (small graphs), networkx (larger ones) and each other."""

from __future__ import annotations

import itertools

import networkx
import numpy as np
import pytest

from optimum_moe_prune.methods.paths import k_best_paths, max_marginals

Graph = tuple[list[np.ndarray], list[np.ndarray]]


def random_graph(rng: np.random.Generator, widths: list[int], ties: bool = False, holes: float = 0.0) -> Graph:
    def draw(*shape: int) -> np.ndarray:
        values = rng.integers(-2, 3, size=shape).astype(float) if ties else rng.normal(scale=3, size=shape)
        return np.where(rng.random(shape) < holes, -np.inf, values)

    return [draw(w) for w in widths], [draw(a, b) for a, b in itertools.pairwise(widths)]


def weight_of(graph: Graph, path: tuple[int, ...]) -> float:
    nodes, edges = graph
    on_edges = sum(edges[i][a, b] for i, (a, b) in enumerate(itertools.pairwise(path)))
    return float(sum(nodes[i][n] for i, n in enumerate(path)) + on_edges)


def all_paths(graph: Graph) -> list[tuple[float, tuple[int, ...]]]:
    every = itertools.product(*(range(len(n)) for n in graph[0]))
    return sorted(((weight_of(graph, path), path) for path in every), reverse=True)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("holes", [0.0, 0.3])
@pytest.mark.parametrize("widths", [[4], [3, 5], [4, 2, 5, 3], [2, 2, 2, 2, 2, 2], [1, 6, 1, 4]])
def test_the_best_paths_of_small_graphs_are_those_of_brute_force(widths: list[int], ties: bool, holes: float) -> None:
    rng = np.random.default_rng(sum(widths))
    for _ in range(10):
        graph = random_graph(rng, widths, ties, holes)
        expected = [entry for entry in all_paths(graph) if entry[0] > -np.inf]
        for count in (1, 2, 7, 1000):
            weights, paths = k_best_paths(*graph, count)
            best = expected[:count]
            np.testing.assert_allclose(weights, [w for w, _ in best], atol=1e-12)
            assert paths.shape == (len(best), len(widths)) and len(set(map(tuple, paths))) == len(best)
            np.testing.assert_allclose([weight_of(graph, tuple(p)) for p in paths], weights, atol=1e-12)
            if not ties:
                assert list(map(tuple, paths)) == [path for _, path in best]


def test_the_best_paths_of_a_larger_graph_weigh_what_networkx_finds() -> None:
    widths, count = [6, 9, 7, 8, 9, 6, 8], 60
    nodes, edges = random_graph(np.random.default_rng(1), widths)
    # Shortest paths want weights of at least 0: shift each layer's by its largest, which shifts every path alike.
    graph, shift = networkx.DiGraph(), 0.0
    steps = [np.zeros((1, widths[0])), *edges]
    for layer, step in enumerate(steps):
        gain = step + nodes[layer]
        shift += gain.max()
        for i, j in np.ndindex(gain.shape):
            tail = "source" if layer == 0 else (layer - 1, i)
            graph.add_edge(tail, (layer, j), cost=gain.max() - gain[i, j])
    for i in range(widths[-1]):
        graph.add_edge((len(widths) - 1, i), "target", cost=0.0)
    found = itertools.islice(networkx.shortest_simple_paths(graph, "source", "target", weight="cost"), count)
    expected = [shift - networkx.path_weight(graph, path, "cost") for path in found]
    np.testing.assert_allclose(k_best_paths(nodes, edges, count)[0], expected, rtol=1e-10)


@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_max_marginals_are_the_best_path_through_each_node(holes: float) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        graph = random_graph(rng, [3, 4, 2, 5], holes=holes)
        every = all_paths(graph)
        for layer, found in enumerate(max_marginals(*graph)):
            for node, value in enumerate(found):
                expected = max(weight for weight, path in every if path[layer] == node) - every[0][0]
                np.testing.assert_allclose(value, expected if every[0][0] > -np.inf else -np.inf, atol=1e-12)


def trying_every_step(graph: Graph, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The best paths with every step from every beginning tried: of equal ones the earlier beginning, then node."""
    nodes, edges = graph
    after = [np.zeros(len(nodes[-1]))]
    for layer in range(len(nodes) - 2, -1, -1):
        after.insert(0, (edges[layer] + (nodes[layer + 1] + after[0])).max(axis=1))
    weight, paths = np.zeros(1), np.zeros((1, 0), dtype=int)
    for layer, node in enumerate(nodes):
        step = edges[layer - 1][paths[:, -1]] + node if layer else node[None]
        candidates = weight[:, None] + step
        potential = (candidates + after[layer]).ravel()
        order = np.argsort(-potential, kind="stable")[:count]
        order = order[potential[order] > -np.inf]
        weight = candidates.ravel()[order]
        beginning, last = np.divmod(order, len(node))
        paths = np.concatenate([paths[beginning], last[:, None]], axis=1)
    order = np.argsort(-weight, kind="stable")
    return weight[order], paths[order]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("holes", [0.0, 0.4])
@pytest.mark.parametrize("factors", [False, True])
def test_steps_that_are_not_tried_would_not_have_been_taken(ties: bool, holes: float, factors: bool) -> None:
    rng = np.random.default_rng(5)
    for widths in ([12, 20, 9, 16, 30], [40, 40, 40, 40], [3, 50, 2, 50]):
        nodes, edges = random_graph(rng, widths, ties, holes)
        if factors:  # as transitions of means are: equal steps from every node
            edges = [edge[:1] + edge[:, :1] for edge in edges]
        for count in (1, 5, 60, 700):
            found, expected = k_best_paths(nodes, edges, count), trying_every_step((nodes, edges), count)
            assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


def test_of_one_layer_every_node_is_a_path() -> None:
    nodes = [np.log([0.2, 0.5, 0.3])]
    weights, paths = k_best_paths(nodes, [], 5)
    assert paths.tolist() == [[1], [2], [0]] and np.allclose(np.exp(weights), [0.5, 0.3, 0.2])
    assert np.allclose(np.exp(max_marginals(nodes, [])[0]), [0.4, 1.0, 0.6])


def test_more_paths_begin_with_the_same_ones() -> None:
    graph = random_graph(np.random.default_rng(3), [8, 8, 8, 8, 8], ties=True)
    few, many = (k_best_paths(*graph, count) for count in (50, 400))
    assert np.array_equal(few[0], many[0][:50])


def test_a_graph_without_a_path_gives_none() -> None:
    nodes = [np.zeros(3), np.full(2, -np.inf), np.zeros(3)]
    weights, paths = k_best_paths(nodes, [np.zeros((3, 2)), np.zeros((2, 3))], 5)
    assert weights.shape == (0,) and paths.shape == (0, 3)
    assert all((marginal == -np.inf).all() for marginal in max_marginals(nodes, [np.zeros((3, 2)), np.zeros((2, 3))]))


def test_a_graph_of_real_size_is_exact() -> None:
    """48 layers of 128 nodes without transitions: the best paths change few nodes of the best one."""
    rng = np.random.default_rng(4)
    nodes = [rng.normal(size=128) for _ in range(48)]
    weights, paths = k_best_paths(nodes, [np.zeros((128, 128))] * 47, 500)
    best = np.array([node.max() for node in nodes])
    np.testing.assert_allclose(weights[0], best.sum())
    assert list(paths[0]) == [int(node.argmax()) for node in nodes]
    # With independent layers, sums of gaps to the best: the 500 smallest among one, two and three changed layers.
    gaps = [np.sort(node.max() - node)[1:40] for node in nodes]
    single = np.concatenate(gaps)
    assert np.isclose(weights[1], best.sum() - single.min())
    small = [gap[gap < weights[0] - weights[-1] + 1e-9] for gap in gaps]
    totals = np.array([0.0])
    for gap in small:
        totals = np.sort(np.concatenate([totals, (totals[:, None] + gap).ravel()]))[:500]
    assert np.allclose(weights, best.sum() - totals)


@pytest.mark.parametrize(
    ("nodes", "edges", "count", "message"),
    [
        ([np.zeros(2)], [], 0, "num_paths is 0"),
        ([np.zeros(2)], [np.zeros((2, 2))], 1, "1 layers of nodes and 1 of edges"),
        ([], [], 1, "0 layers of nodes and 0 of edges"),
        ([np.zeros(2), np.zeros(3)], [np.zeros((3, 2))], 1, r"the edges after layer 0 have shape \(3, 2\)"),
    ],
)
def test_graphs_that_do_not_fit_are_refused(
    nodes: list[np.ndarray], edges: list[np.ndarray], count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        k_best_paths(nodes, edges, count)
