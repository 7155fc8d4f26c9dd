# SPDX-License-Identifier: Apache-2.0
"""From the paths of each sample to the experts that stay, step by step."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from oracles import softmax_rule
from synthetic import Tokens, statistics_of

from optimum_moe_prune import CalibrationStats
from optimum_moe_prune.methods.budget import global_budget, uniform_budget
from optimum_moe_prune.methods.path_selection import (
    best_paths,
    entropy_shares,
    first_path,
    marginals,
    most_paths,
    on_best_paths,
    participation,
    sample_graphs,
    sample_weights,
    sort_keys,
)

PATHS = [np.array([[0, 1], [2, 1], [0, 0]]), np.array([[0, 3], [1, 3]]), np.zeros((0, 2), dtype=int)]
"""Of three samples through two layers of four experts; the last has none."""


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    random = torch.Generator().manual_seed(3)
    shape = (3, 4, 5)
    samples = [
        (
            domain,
            Tokens(
                torch.randn(shape, generator=random), torch.randn(*shape, 2, generator=random), torch.zeros(3, 4, 2)
            ),
        )
        for domain in "aab"
    ]
    return statistics_of(samples, softmax_rule(1))


def logs(stats: CalibrationStats, seed: int) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(3, 3, 5)), rng.normal(size=(3, 2, 5, 5))  # by layer and sample; by sample and pair


@pytest.mark.parametrize("factors", ["both", "importance", "transitions"])
def test_best_paths_and_marginals_of_each_sample(stats: CalibrationStats, factors: str) -> None:
    nodes, edges = logs(stats, 0)
    importance = None if factors == "transitions" else list(nodes)
    transitions = None if factors == "importance" else (lambda sample: list(edges[sample]))
    if importance is None:
        nodes = np.zeros_like(nodes)
    if transitions is None:
        edges = np.zeros_like(edges)
    found = list(best_paths(stats, importance, transitions, 7))
    best, total = marginals(stats, importance, transitions, np.array([1.0, 2.0, 0.5]))
    through = np.full((3, 3, 5), -np.inf)  # sample, layer, expert
    for sample, (v, e) in enumerate(sample_graphs(stats, importance, transitions)):
        np.testing.assert_array_equal(v, nodes[:, sample])
        np.testing.assert_array_equal(e, edges[sample])
        weight = {
            path: sum(nodes[i, sample, n] for i, n in enumerate(path))
            + sum(edges[sample, i, a, b] for i, (a, b) in enumerate(itertools.pairwise(path)))
            for path in itertools.product(range(5), repeat=3)
        }
        order = sorted(weight, key=lambda path: -weight[path])
        assert found[sample].dtype == np.int32 and [tuple(p) for p in found[sample].tolist()] == order[:7]
        for path, layer in itertools.product(order, range(3)):
            relative = weight[path] - weight[order[0]]
            through[sample, layer, path[layer]] = max(through[sample, layer, path[layer]], relative)
    np.testing.assert_allclose(best, through.max(0), atol=1e-12)
    np.testing.assert_allclose(total, np.einsum("s,sle->le", [1.0, 2.0, 0.5], np.exp(through)), atol=1e-12)


def test_the_rank_of_the_first_path_through_each_expert() -> None:
    assert first_path(PATHS, 0, 4).tolist() == [0, 1, 1, np.inf]
    assert first_path(PATHS, 1, 4).tolist() == [2, 0, np.inf, 0]


def test_participation_counts_paths_with_the_weights_of_samples() -> None:
    weights = np.array([1.0, 10.0, 100.0])
    assert participation(PATHS, weights, 0, 4, 1).tolist() == [11, 0, 0, 0]
    assert participation(PATHS, weights, 0, 4, 2).tolist() == [11, 10, 1, 0]
    assert participation(PATHS, weights, 1, 4, 3).tolist() == [1, 2, 0, 20]


def test_paths_grow_while_their_experts_fit() -> None:
    rank = {0: np.array([0, 1, 1, np.inf, 3]), 1: np.array([2, 0, np.inf, 0, 0])}

    def held(m: int, protected: dict[int, set[int]], floor: int) -> int:
        return sum(max(floor, len(protected[layer] | set(np.flatnonzero(rank[layer] < m).tolist()))) for layer in rank)

    for top_k, total in itertools.product((1, 2, 3), range(6, 10)):
        for protect in ({}, {0: (3,)}, {1: (1, 2)}):
            budget = global_budget({0: 5, 1: 5}, softmax_rule(top_k), total_experts=total, protect=protect)
            fixed = {layer: set(budget.protected[layer]) for layer in rank}
            for most in (1, 2, 5):
                fitting = [m for m in range(1, most + 1) if held(m, fixed, top_k) <= total]
                assert most_paths(rank, budget, most) == max(fitting, default=0)
    # Skipped layers are outside the budget, and a uniform one is counted as a whole.
    skipping = global_budget({0: 5, 1: 5}, softmax_rule(1), total_experts=3, skip_layers=(1,))
    assert most_paths(rank, skipping, 5) == 3
    assert most_paths(rank, uniform_budget({0: 5, 1: 5}, softmax_rule(1), num_experts=2), 5) == 1


def test_keys_compare_in_their_order() -> None:
    inside = np.array([True, False, True, True, True, True])
    count = np.array([1.0, 9.0, 2.0, 1.0, 1.0, 1.0 + 1e-12])
    best = np.array([-1.0, 0.0, -2.0, 0.0, -1.0, -1.0])
    total = np.array([3.0, 9.0, 1.0, 1.0, 4.0, 4.0])
    keys = sort_keys(inside, count, best, total)
    assert sorted(range(6), key=lambda e: keys[e]) == [2, 3, 4, 5, 0, 1]
    assert keys[4] == keys[5], "what differs by rounding is equal"
    assert keys[2] == (False, -2.0, 2.0, -1.0)


def test_entropy_is_a_share_of_the_largest() -> None:
    even, sure = np.log(np.full((2, 4), 0.25)), np.log([[1 - 3e-9, 1e-9, 1e-9, 1e-9]])
    assert entropy_shares([3, 7], [even, sure]) == {"3": 1.0, "7": 0.0}
    half = np.log([[0.5, 0.5 - 2e-12, 1e-12, 1e-12], [0.25] * 4])
    assert entropy_shares([0], [half]) == {"0": 0.75}


def test_samples_count_once_or_with_their_domains_share(stats: CalibrationStats) -> None:
    assert sample_weights(stats).tolist() == [1.0, 1.0, 1.0]
    assert sample_weights(stats.with_domain_weights({"a": 1.0, "b": 3.0})).tolist() == pytest.approx(
        [0.375, 0.375, 2.25]
    )


def test_samples_without_a_path_are_named(stats: CalibrationStats) -> None:
    edges = np.zeros((3, 2, 5, 5))
    edges[2, 1] = -np.inf
    edges[:2, 0, 0] = 5.0
    budget = global_budget(stats.num_experts, stats.routing, total_experts=9)
    selection = on_best_paths(stats, budget, None, lambda sample: list(edges[sample]), 1)
    assert selection.notes == ("1 of 3 samples have no path: all meet an expert of activity or probability 0",)
    assert selection.findings["samples"] == 3 and selection.findings["paths_per_sample"] == 1
    assert sum(map(len, selection.retained.values())) == 9 and 0 in selection.retained[0]


def test_what_the_findings_say_of_paths(stats: CalibrationStats) -> None:
    """The experts on the paths that fit; where not even the best ones do, those on the best ones."""
    nodes, edges = logs(stats, 1)
    paths = list(best_paths(stats, list(nodes), lambda sample: list(edges[sample]), 4))
    for total in (4, 12):
        budget = global_budget(stats.num_experts, stats.routing, total_experts=total)
        selection = on_best_paths(stats, budget, list(nodes), lambda sample: list(edges[sample]), 4)
        fitting = selection.findings["paths_per_sample"]
        used = {pair for sample in paths for path in sample[: max(fitting, 1)] for pair in enumerate(path.tolist())}
        assert selection.findings["experts_on_paths"] == len(used)
        kept = {(layer, e) for layer, experts in selection.retained.items() for e in experts}
        assert used <= kept if fitting else len(kept) == total
        assert bool(selection.notes) == (not fitting)
        if not fitting:
            assert selection.notes == (
                f"the single best paths of 3 samples use {len(used)} experts, more than the budget of {total} holds: "
                "the experts on the most of them are kept",
            )
            count = Counter(pair for sample in paths for pair in enumerate(sample[0].tolist()))
            assert all(count[pair] == 1 for pair in used - kept) or max(count.values()) == 1
