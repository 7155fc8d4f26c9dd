# SPDX-License-Identifier: Apache-2.0
"""Counts, rounding, protection, and requests that cannot be met."""

from __future__ import annotations

import re

import numpy as np
import pytest

from optimum_moe_prune import RequestError, RunError
from optimum_moe_prune.methods.budget import choose, choose_ranked, global_budget, num_removed, uniform_budget

LAYERS = {0: 8, 1: 8, 3: 8}


@pytest.mark.parametrize(
    ("sparsity", "experts", "removed"),
    [(0.5, 8, 4), (0.25, 60, 15), (0.06, 8, 0), (0.0625, 8, 1), (0.19, 8, 2), (0.5, 7, 4)],
)
def test_sparsity_rounds_half_up(sparsity: float, experts: int, removed: int) -> None:
    assert num_removed(sparsity, experts) == removed


def test_skipped_layers_are_outside_the_budget() -> None:
    budget = uniform_budget(LAYERS, 2, sparsity=0.5, skip_layers=[1], protect={3: [7, 2]})
    assert budget.num_experts == {0: 4, 3: 4}
    assert budget.protected == {0: (), 3: (2, 7)}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "give exactly one of num_experts .* sparsity"),
        ({"num_experts": 4, "sparsity": 0.5}, "give exactly one of num_experts .* sparsity"),
        ({"num_experts": 0}, r"num_experts=0 leaves layer 0 with 0 experts, and every token uses 2. Ask for 2 to 7"),
        ({"num_experts": 1}, r"num_experts=1 leaves layer 0 with 1 experts, and every token uses 2. Ask for 2 to 7"),
        ({"num_experts": 8}, r"num_experts=8 leaves layer 0 with all its 8 experts: nothing to prune. Ask for 2 to 7"),
        ({"num_experts": 9}, r"num_experts=9 asks for more experts than layer 0 has \(8\). Ask for 2 to 7"),
        ({"sparsity": 0.0}, "sparsity is 0.0; the fraction of experts to remove lies between 0 and 1"),
        ({"sparsity": 1.0}, "sparsity is 1.0; .* between 0 and 1"),
        ({"sparsity": -0.5}, "sparsity is -0.5; .* between 0 and 1"),
        ({"sparsity": 1.5}, "sparsity is 1.5; .* between 0 and 1"),
        ({"sparsity": float("nan")}, "sparsity is nan; .* between 0 and 1"),
        ({"sparsity": 0.05}, r"sparsity=0.05 removes 0 of 8 experts, which leaves .* nothing to prune"),
        ({"sparsity": 0.9}, r"sparsity=0.9 removes 7 of 8 experts, which leaves layer 0 with 1 experts"),
        (
            {"num_experts": 4, "skip_layers": [2]},
            "skip_layers names layer 2, which has no experts; the MoE layers are 0-1, 3",
        ),
        ({"num_experts": 4, "protect": {2: [0]}}, "protect names layer 2, which has no experts"),
        ({"num_experts": 4, "protect": {0: [8]}}, "protect names expert 8 of layer 0, which has experts 0 to 7"),
        ({"num_experts": 4, "protect": {0: range(5)}}, "protect names 5 experts of layer 0, and the budget keeps 4"),
        ({"num_experts": 4, "skip_layers": [0], "protect": {0: [8]}}, "protect names expert 8 of layer 0"),
        ({"num_experts": 4, "skip_layers": [0, 1, 3]}, "skip_layers names every MoE layer"),
    ],
)
def test_impossible_requests_are_refused(request_: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        uniform_budget(LAYERS, 2, **request_)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (7, 3), (128, 8), (2, 1), (512, 10)])
def test_the_range_a_refusal_names_is_right(experts: int, top_k: int) -> None:
    with pytest.raises(RequestError) as refused:
        uniform_budget({0: experts}, top_k, sparsity=1e-6)
    least, most = re.search(r"Ask for a sparsity of (\S+) to (\S+)\.$", str(refused.value)).groups()
    assert uniform_budget({0: experts}, top_k, sparsity=float(least)).num_experts == {0: experts - 1}
    assert uniform_budget({0: experts}, top_k, sparsity=float(most)).num_experts == {0: top_k}


def test_where_every_expert_is_used_none_can_go() -> None:
    with pytest.raises(RequestError, match="every token uses all 4 experts of layer 0: none can be removed"):
        uniform_budget({0: 4}, 4, num_experts=3)


def test_rounding_is_kept() -> None:
    assert uniform_budget(LAYERS, 2, sparsity=0.3).notes == ["sparsity 0.3 rounds to 0.25"]
    assert uniform_budget(LAYERS, 2, sparsity=0.25).notes == []


def test_ties_go_to_the_lower_index_and_protection_comes_first() -> None:
    scores = {0: np.array([1.0, 3.0, 1.0, 3.0, 0.0])}
    assert choose(scores, uniform_budget({0: 5}, 2, num_experts=3)) == {0: (0, 1, 3)}
    assert choose(scores, uniform_budget({0: 5}, 2, num_experts=3, protect={0: [4]})) == {0: (1, 3, 4)}


def test_scores_that_are_not_finite_are_named() -> None:
    with pytest.raises(RunError, match="layer 0: expert 1 has no finite score"):
        choose({0: np.array([1.0, np.nan, 2.0])}, uniform_budget({0: 3}, 1, num_experts=2))


# ------------------------------------------------------------------------------------------- one budget for all layers


@pytest.mark.parametrize(
    ("request_", "total"),
    [
        ({"sparsity": 0.5}, 12),
        ({"sparsity": 0.25}, 18),
        ({"sparsity": 0.3}, 17),
        ({"num_experts": 3}, 9),
        ({"sparsity": 0.5, "skip_layers": [1]}, 8),
        ({"num_experts": 5, "skip_layers": [0]}, 10),
        ({"total_experts": 13}, 13),
        ({"total_experts": 7, "skip_layers": [0]}, 7),
    ],
)
def test_a_global_budget_counts_over_all_layers(request_: dict[str, object], total: int) -> None:
    budget = global_budget(LAYERS, 2, **request_)
    assert budget.total == total and budget.floor == 2
    assert set(budget.original) == set(LAYERS) - set(request_.get("skip_layers", []))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            {"sparsity": 0.01},
            r"sparsity=0.01 keeps 24 of the 24 experts in 3 layers: nothing to prune. Ask for a spar",
        ),
        (
            {"sparsity": 0.9},
            r"keeps 2 of the 24 experts in 3 layers, and each layer keeps at least the 2 .* together 6",
        ),
        ({"num_experts": 1}, r"num_experts=1 on average keeps 3 of the 24 .* together 6. Ask for 2 to 7"),
        ({"num_experts": 8}, r"num_experts=8 on average keeps 24 .* nothing to prune. Ask for 2 to 7"),
        ({"num_experts": 2, "protect": {0: range(8)}}, r"keeps 6 .* those protected, together 12. Ask for 4 to 7"),
        ({"total_experts": 5}, r"total_experts=5 keeps 5 of the 24 .* together 6. Ask for 6 to 23"),
        ({"total_experts": 24}, r"total_experts=24 keeps 24 .* nothing to prune. Ask for 6 to 23"),
        ({"num_experts": 4, "total_experts": 12}, "give exactly one of"),
        ({"num_experts": 4, "protect": {2: [0]}}, "protect names layer 2, which has no experts"),
        ({"num_experts": 4, "protect": {0: [8]}}, "protect names expert 8 of layer 0"),
        ({"sparsity": 1.5}, "sparsity is 1.5; .* between 0 and 1"),
        ({"num_experts": 4, "skip_layers": [0, 1, 3]}, "skip_layers names every MoE layer"),
        ({}, "give exactly one of"),
    ],
)
def test_impossible_global_requests_are_refused(request_: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        global_budget(LAYERS, 2, **request_)


@pytest.mark.parametrize(("layers", "top_k"), [({0: 8, 1: 8}, 2), ({0: 60, 5: 60, 7: 12}, 4), ({0: 3, 1: 2}, 1)])
def test_the_range_a_global_refusal_names_is_right(layers: dict[int, int], top_k: int) -> None:
    with pytest.raises(RequestError) as refused:
        global_budget(layers, top_k, sparsity=1e-6)
    least, most = re.search(r"Ask for a sparsity of (\S+) to (\S+)\.$", str(refused.value)).groups()
    assert global_budget(layers, top_k, sparsity=float(least)).total == sum(layers.values()) - 1
    assert global_budget(layers, top_k, sparsity=float(most)).total == top_k * len(layers)
    with pytest.raises(RequestError, match="none can be removed"):
        global_budget(dict.fromkeys(layers, top_k), top_k, num_experts=top_k)


def test_global_choice_equals_a_straight_loop() -> None:
    rng = np.random.default_rng(0)
    for trial in range(50):
        layers = {0: 6, 2: 9, 3: 4}
        scores = {layer: np.round(rng.gamma(1.0, size=count), 1) * 10**layer for layer, count in layers.items()}
        protect = {2: [int(rng.integers(9))]} if trial % 2 else {}
        budget = global_budget(layers, 2, num_experts=int(rng.integers(2, 6)), protect=protect)
        found = choose(scores, budget)
        relative = {layer: values / values.mean() for layer, values in scores.items()}
        expected = {}
        for layer, values in relative.items():
            best = sorted(range(len(values)), key=lambda e, v=values: (-v[e], e))
            first = list(protect.get(layer, []))
            expected[layer] = (first + [e for e in best if e not in first])[:2]
        while sum(map(len, expected.values())) < budget.total:
            _, expert, layer = min(
                (-relative[layer][e], e, layer)
                for layer in layers
                for e in range(layers[layer])
                if e not in expected[layer]
            )
            expected[layer].append(expert)
        assert found == {layer: tuple(sorted(experts)) for layer, experts in expected.items()}


def test_global_ties_favour_no_layer() -> None:
    equal = {layer: np.zeros(8) for layer in LAYERS}
    kept = choose(equal, global_budget(LAYERS, 2, sparsity=0.5))
    assert kept == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 3: (0, 1, 2, 3)}


def test_ranks_of_several_numbers_are_compared_in_order() -> None:
    keys = {0: [(0, 5.0), (1, 1.0), (0, 1.0), (1, 0.5)], 1: [(0, 2.0), (1, 9.0), (0, 2.0), (1, 0.7)]}
    assert choose_ranked(keys, global_budget({0: 4, 1: 4}, 1, num_experts=2)) == {0: (0, 2), 1: (0, 2)}
    assert choose_ranked(keys, global_budget({0: 4, 1: 4}, 1, sparsity=0.375)) == {0: (0, 2, 3), 1: (0, 2)}
    assert choose_ranked(keys, uniform_budget({0: 4, 1: 4}, 1, num_experts=3)) == {0: (0, 2, 3), 1: (0, 2, 3)}
