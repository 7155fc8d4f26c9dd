# SPDX-License-Identifier: Apache-2.0
"""Counts, rounding, protection, and requests that cannot be met."""

from __future__ import annotations

import re

import numpy as np
import pytest

from optimum_moe_prune import RequestError, RunError
from optimum_moe_prune.budget import Budget, choose, num_removed, uniform_budget

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
        ({}, "give exactly one of num_experts .* and sparsity"),
        ({"num_experts": 4, "sparsity": 0.5}, "give exactly one of num_experts .* and sparsity"),
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
    assert choose(scores, Budget({0: 3}, {0: ()})) == {0: (0, 1, 3)}
    assert choose(scores, Budget({0: 3}, {0: (4,)})) == {0: (1, 3, 4)}


def test_scores_that_are_not_finite_are_named() -> None:
    with pytest.raises(RunError, match="layer 0: expert 1 has no finite score"):
        choose({0: np.array([1.0, np.nan, 2.0])}, Budget({0: 2}, {0: ()}))
