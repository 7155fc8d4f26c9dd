# SPDX-License-Identifier: Apache-2.0
"""Counts, rounding, protection, and requests that cannot be met."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import numpy as np
import pytest
from oracles import softmax_rule

from optimum_moe_prune import RequestError, RunError
from optimum_moe_prune.architectures.routers import SoftmaxTopK
from optimum_moe_prune.methods.budget import (
    allowed_counts,
    choose,
    choose_ranked,
    global_budget,
    num_removed,
    rounding_note,
    uniform_budget,
)

LAYERS = {0: 8, 1: 8, 3: 8}


@dataclass(frozen=True)
class InFours(SoftmaxTopK):
    """A router whose layers keep a multiple of four experts, as one that chooses among equal groups would."""

    @property
    def fewest(self) -> int:
        return 4

    def allows(self, num_experts: int) -> bool:
        return num_experts % 4 == 0


IN_FOURS = InFours(2, True, False)


@pytest.mark.parametrize(
    ("sparsity", "experts", "removed"),
    [(0.5, 8, 4), (0.25, 60, 15), (0.06, 8, 0), (0.0625, 8, 1), (0.19, 8, 2), (0.5, 7, 4)],
)
def test_sparsity_rounds_half_up(sparsity: float, experts: int, removed: int) -> None:
    assert num_removed(sparsity, experts) == removed


def test_skipped_layers_are_outside_the_budget() -> None:
    budget = uniform_budget(LAYERS, softmax_rule(2), sparsity=0.5, skip_layers=[1], protect={3: [7, 2]})
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
        uniform_budget(LAYERS, softmax_rule(2), **request_)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (60, 4), (7, 3), (128, 8), (2, 1), (512, 10)])
def test_the_range_a_refusal_names_is_right(experts: int, top_k: int) -> None:
    with pytest.raises(RequestError) as refused:
        uniform_budget({0: experts}, softmax_rule(top_k), sparsity=1e-6)
    found = re.search(r"Ask for a sparsity of (\S+?)(?: to (\S+))?\.$", str(refused.value))
    least, most = found[1], found[2] or found[1]
    assert uniform_budget({0: experts}, softmax_rule(top_k), sparsity=float(least)).num_experts == {0: experts - 1}
    assert uniform_budget({0: experts}, softmax_rule(top_k), sparsity=float(most)).num_experts == {0: top_k}


def test_where_every_expert_is_used_none_can_go() -> None:
    with pytest.raises(RequestError, match="every token uses all 4 experts of layer 0: none can be removed"):
        uniform_budget({0: 4}, softmax_rule(4), num_experts=3)


def test_rounding_is_kept() -> None:
    budget = uniform_budget(LAYERS, softmax_rule(2), sparsity=0.3)
    assert rounding_note(budget, 0.3) == "sparsity 0.3 rounds to 0.25"
    assert rounding_note(budget, 0.25) is None and rounding_note(budget, None) is None


def test_ties_go_to_the_lower_index_and_protection_comes_first() -> None:
    scores = {0: np.array([1.0, 3.0, 1.0, 3.0, 0.0])}
    assert choose(scores, uniform_budget({0: 5}, softmax_rule(2), num_experts=3)) == {0: (0, 1, 3)}
    assert choose(scores, uniform_budget({0: 5}, softmax_rule(2), num_experts=3, protect={0: [4]})) == {0: (1, 3, 4)}


def test_scores_that_are_not_finite_are_named() -> None:
    with pytest.raises(RunError, match="layer 0: expert 1 has no finite score"):
        choose({0: np.array([1.0, np.nan, 2.0])}, uniform_budget({0: 3}, softmax_rule(1), num_experts=2))


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
    budget = global_budget(LAYERS, softmax_rule(2), **request_)
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
        global_budget(LAYERS, softmax_rule(2), **request_)


@pytest.mark.parametrize(("layers", "top_k"), [({0: 8, 1: 8}, 2), ({0: 60, 5: 60, 7: 12}, 4), ({0: 3, 1: 2}, 1)])
def test_the_range_a_global_refusal_names_is_right(layers: dict[int, int], top_k: int) -> None:
    with pytest.raises(RequestError) as refused:
        global_budget(layers, softmax_rule(top_k), sparsity=1e-6)
    least, most = re.search(r"Ask for a sparsity of (\S+) to (\S+)\.$", str(refused.value)).groups()
    assert global_budget(layers, softmax_rule(top_k), sparsity=float(least)).total == sum(layers.values()) - 1
    assert global_budget(layers, softmax_rule(top_k), sparsity=float(most)).total == top_k * len(layers)
    with pytest.raises(RequestError, match="none can be removed"):
        global_budget(dict.fromkeys(layers, top_k), softmax_rule(top_k), num_experts=top_k)


def test_global_choice_equals_a_straight_loop() -> None:
    rng = np.random.default_rng(0)
    for trial in range(50):
        layers = {0: 6, 2: 9, 3: 4}
        scores = {layer: np.round(rng.gamma(1.0, size=count), 1) * 10**layer for layer, count in layers.items()}
        protect = {2: [int(rng.integers(9))]} if trial % 2 else {}
        budget = global_budget(layers, softmax_rule(2), num_experts=int(rng.integers(2, 6)), protect=protect)
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
    kept = choose(equal, global_budget(LAYERS, softmax_rule(2), sparsity=0.5))
    assert kept == {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 3: (0, 1, 2, 3)}


def test_ranks_of_several_numbers_are_compared_in_order() -> None:
    keys = {0: [(0, 5.0), (1, 1.0), (0, 1.0), (1, 0.5)], 1: [(0, 2.0), (1, 9.0), (0, 2.0), (1, 0.7)]}
    assert choose_ranked(keys, global_budget({0: 4, 1: 4}, softmax_rule(1), num_experts=2)) == {0: (0, 2), 1: (0, 2)}
    assert choose_ranked(keys, global_budget({0: 4, 1: 4}, softmax_rule(1), sparsity=0.375)) == {
        0: (0, 2, 3),
        1: (0, 2),
    }
    assert choose_ranked(keys, uniform_budget({0: 4, 1: 4}, softmax_rule(1), num_experts=3)) == {
        0: (0, 2, 3),
        1: (0, 2, 3),
    }


def test_a_budget_cannot_be_written_into() -> None:
    budget = uniform_budget(LAYERS, softmax_rule(2), sparsity=0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.total = 3
    assert not {"notes", "findings", "note"} & set(dir(budget))


# ------------------------------------------------------------------------------------------- rules that leave gaps


def test_the_numbers_that_a_rule_allows() -> None:
    assert allowed_counts(softmax_rule(2), 5) == [2, 3, 4, 5]
    assert allowed_counts(softmax_rule(2), 5, least=4) == [4, 5]
    assert allowed_counts(softmax_rule(2), 2) == allowed_counts(softmax_rule(3), 2) == [2]
    assert allowed_counts(IN_FOURS, 14) == [4, 8, 12, 14]
    assert allowed_counts(IN_FOURS, 14, least=5) == [8, 12, 14]
    budget = uniform_budget({0: 16, 2: 16}, IN_FOURS, num_experts=8, protect={2: range(5)})
    assert budget.floor == 4 and budget.allowed(0) == [4, 8, 12, 16] and budget.allowed(2) == [8, 12, 16]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"num_experts": 6}, "num_experts=6 leaves layer 0 with 6 experts, and its router does not allow that number. "
            "Ask for 4 or 8."),
        ({"num_experts": 3}, "leaves layer 0 with 3 experts, and its router does not allow that number. Ask for 4, 8"),
        ({"num_experts": 1}, "leaves layer 0 with 1 experts, and every token uses 2. Ask for 4, 8, 12."),
        ({"num_experts": 2}, "leaves layer 0 with 2 experts, and its router does not allow that number. Ask for 4, 8"),
        ({"sparsity": 0.4}, "sparsity=0.4 removes 6 of 16 experts, which leaves layer 0 with 10 experts, and its "
            "router does not allow that number. Ask for a sparsity of 0.25 or 0.5."),
    ],
)  # fmt: skip
def test_a_number_that_the_rule_does_not_allow_is_refused(request_: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        uniform_budget({0: 16}, IN_FOURS, **request_)
    for sparsity in (0.25, 0.5, 0.75):
        assert uniform_budget({0: 16}, IN_FOURS, sparsity=sparsity).total == 16 * (1 - sparsity)
    with pytest.raises(RequestError, match="the router needs all 4 experts of layer 0: none can be removed"):
        uniform_budget({0: 4}, IN_FOURS, num_experts=2)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"total_experts": 22}, "total_experts=22 keeps 22 of the 40 experts in 3 layers, and the numbers that the "
            "routers allow in a layer add up to 20 or 24. Ask for 20 or 24."),
        ({"total_experts": 13}, "each layer keeps at least the 4 that every token uses and those protected, together "
            "16. Ask for 16, 20, "),
        ({"sparsity": 0.42}, "sparsity=0.42 keeps 23 of the 40 experts in 3 layers, and the numbers that the routers "
            "allow in a layer add up to 20 or 24. Ask for a sparsity of 0.4 or 0.5."),
        ({"num_experts": 9}, "add up to 24 or 28. Ask for 8 or 12."),
        ({"total_experts": 40}, "nothing to prune. Ask for 16, "),
    ],
)  # fmt: skip
def test_a_total_that_the_rule_does_not_allow_is_refused(request_: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        global_budget({0: 16, 1: 8, 2: 16}, IN_FOURS, protect={0: range(6)}, **request_)


def test_many_numbers_are_not_all_listed() -> None:
    with pytest.raises(RequestError, match=re.escape("Ask for 8, 12, 16, ..., 124.")):
        global_budget({0: 64, 1: 64}, IN_FOURS, total_experts=2)
    with pytest.raises(RequestError, match=re.escape("Ask for a sparsity of 0.1, 0.2, 0.3, ..., 0.9.")):
        uniform_budget({0: 40}, IN_FOURS, sparsity=0.01)


def test_numbers_that_do_not_lie_evenly_cannot_be_spread() -> None:
    with pytest.raises(RequestError, match=r"do not lie evenly.* use allocation 'uniform'"):
        global_budget({0: 16, 1: 10}, IN_FOURS, total_experts=16)


def test_a_choice_over_all_layers_keeps_what_the_rule_allows() -> None:
    rng = np.random.default_rng(1)
    layers = {0: 16, 1: 8, 2: 16}
    for total in range(16, 40, 4):
        scores = {layer: rng.gamma(1.0, size=count) for layer, count in layers.items()}
        budget = global_budget(layers, IN_FOURS, total_experts=total, protect={0: range(6)})
        kept = choose(scores, budget)
        sizes = {layer: len(experts) for layer, experts in kept.items()}
        assert sum(sizes.values()) == total and all(sizes[layer] in budget.allowed(layer) for layer in layers)
        # The next four of a layer go in by their sum, so no step left out adds more than one taken.
        relative = {layer: -values / values.mean() for layer, values in scores.items()}
        taken, left = [], []
        for layer, count in layers.items():
            first = [*range(6)] if layer == 0 else []
            order = [*first, *sorted(set(range(count)) - set(first), key=lambda e, v=relative[layer]: v[e])]
            assert set(kept[layer]) == set(order[: sizes[layer]])
            steps = [relative[layer][order[low : low + 4]].sum() for low in budget.allowed(layer)[:-1]]
            done = budget.allowed(layer).index(sizes[layer])
            taken += steps[:done]
            left += steps[done:]
        assert not taken or not left or max(taken) <= min(left)


# ------------------------------------------------------------------------------------------- edges


def test_layers_of_different_sizes_become_equal() -> None:
    """The smaller ones may stay whole; that nothing smaller is allowed there stops nobody."""
    assert uniform_budget({0: 8, 1: 4}, softmax_rule(2), num_experts=4).num_experts == {0: 4, 1: 4}
    assert uniform_budget({0: 8, 1: 2}, softmax_rule(2), num_experts=2).num_experts == {0: 2, 1: 2}
    with pytest.raises(RequestError, match=r"leaves layer 0 .* Ask for 2 to 7, or leave layer 0 as it is"):
        uniform_budget({0: 8, 1: 4}, softmax_rule(2), num_experts=8)
    with pytest.raises(RequestError, match=r"more experts than layer 1 has \(4\). Ask for 2 to 3, or leave layer 1"):
        uniform_budget({0: 8, 1: 4}, softmax_rule(2), num_experts=6)


def test_a_budget_may_hold_the_protected_ones_alone() -> None:
    budget = uniform_budget({0: 8}, softmax_rule(2), num_experts=3, protect={0: (1, 4, 7)})
    assert choose({0: np.arange(8.0)}, budget) == {0: (1, 4, 7)}
    assert budget.seed == global_budget({0: 8}, softmax_rule(2), num_experts=3).seed == 0


def test_what_is_offered_where_no_mean_fits() -> None:
    with pytest.raises(RequestError, match=r"together 9\. Ask for a sparsity instead\."):
        global_budget({0: 8, 1: 2}, softmax_rule(2), num_experts=2, protect={0: range(7)})
    with pytest.raises(RequestError, match=r"nothing to prune\. Ask for 1 to 3\."):
        global_budget({0: 4, 1: 4}, softmax_rule(1), num_experts=4)


def test_layers_are_named_in_their_order() -> None:
    with pytest.raises(RequestError, match=r"skip_layers names layer 2, .* MoE layers are 0-1, 3, 5-6"):
        uniform_budget({5: 4, 6: 4, 0: 4, 3: 4, 1: 4}, softmax_rule(2), num_experts=3, skip_layers=[17, 2])
