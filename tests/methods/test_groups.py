# SPDX-License-Identifier: Apache-2.0
"""Routers with groups of experts, and counts of a multiple: rules, budgets, refusals and choices against all sets."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
from oracles import softmax_rule
from synthetic import GroupedTopK, random_statistics

from optimum_moe_prune import RequestError
from optimum_moe_prune.architectures.routers import RoutingRule, SoftmaxTopK
from optimum_moe_prune.architectures.rules import TopK
from optimum_moe_prune.methods.budget import Budget, choose, choose_ranked, global_budget, uniform_budget
from optimum_moe_prune.methods.limits import check_retained, num_removed
from optimum_moe_prune.methods.path_selection import best_paths, first_path, most_paths, on_best_paths
from optimum_moe_prune.methods.replay import errors_without, squared_errors
from optimum_moe_prune.methods.replay_search import Replay
from optimum_moe_prune.methods.sets import num_sets, sets_of

Set = tuple[int, ...]


@dataclass(frozen=True)
class InGroups(SoftmaxTopK):
    """A rule that says nothing of groups but how many there are."""

    groups: int = 2


RULES: dict[str, RoutingRule] = {
    "one group": softmax_rule(2),
    "defaults": InGroups(3, True, False),
    "by the two best": GroupedTopK(3, groups=2, top_groups=1),
    "by the best": GroupedTopK(2, groups=4, top_groups=2, best=1),
    "four groups": GroupedTopK(4, groups=4, top_groups=3),
    "the general rule": TopK(3, score="sigmoid", groups=4, top_groups=2),
}


def members(rule: RoutingRule, experts: int) -> list[range]:
    size = experts // rule.groups
    return [range(first, first + size) for first in range(0, experts, size)]


def fewest(rule: RoutingRule) -> int:
    """As the router's own code needs them."""
    if isinstance(rule, (GroupedTopK, TopK)) and rule.groups > 1:
        return rule.groups * max(getattr(rule, "best", 2), -(-rule.top_k // rule.top_groups))
    return next(n for n in itertools.count(rule.top_k) if n % rule.groups == 0)


def is_layer(rule: RoutingRule, kept: Iterable[int], experts: int) -> bool:
    kept = set(kept)
    counts = {len(kept & set(group)) for group in members(rule, experts)}
    return len(counts) == 1 and (len(kept) >= fewest(rule) or len(kept) == experts)


def subsets(experts: int, size: int | None = None) -> Iterable[Set]:
    sizes = range(experts + 1) if size is None else [size]
    return itertools.chain.from_iterable(itertools.combinations(range(experts), n) for n in sizes)


# ------------------------------------------------------------------------------------------- what a rule says


@pytest.mark.parametrize("name", RULES)
def test_what_can_be_a_layer(name: str) -> None:
    rule = RULES[name]
    assert rule.fewest == fewest(rule)
    assert [n for n in range(1, 9) if rule.allows(n)] == [
        n for n in range(1, 9) if n % rule.groups == 0 and n >= fewest(rule)
    ]
    for kept in subsets(8):
        held = [len(set(kept) & set(group)) for group in members(rule, 8)]
        assert [len(group) for group in rule.grouped(kept, 8)] == held
        assert rule.least_with(kept, 8) == min(
            n for n in range(9) if n % rule.groups == 0 and all(n // rule.groups >= count for count in held)
        )
        for size in range(fewest(rule), 9):
            possible = any(is_layer(rule, part, 8) for part in itertools.combinations(kept, size))
            assert rule.admits(kept, size, 8) == possible
        if rule.groups > 1:
            assert not any(rule.admits(kept, size, 8) for size in range(1, fewest(rule)))


@pytest.mark.parametrize(("score", "best"), [("sigmoid", 2), ("sigmoid", 1), ("sqrtsoftplus", 2)])
def test_the_general_rule_chooses_of_what_is_left_of_each_group(score: str, best: int) -> None:
    """Also where groups are not equal, which searches come by: as if the others were at minus infinity."""
    group_score = "top2" if best == 2 else "max"
    rule = TopK(3, score=score, groups=2, top_groups=1, group_score=group_score)
    logits = 2 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0))
    scores = logits.sigmoid() if score == "sigmoid" else torch.nn.functional.softplus(logits).sqrt()
    for kept in subsets(10):
        if min(len(set(kept) & set(group)) for group in members(rule, 10)) < 3:
            continue
        chosen, weights = rule.choose(logits, kept)
        for token, row in enumerate(scores.tolist()):
            left = [sorted((row[e], e) for e in group if e in kept)[::-1] for group in members(rule, 10)]
            first = max(left, key=lambda group: sum(value for value, _ in group[:best]))[:3]
            assert chosen[token].tolist() == [e for _, e in first]
            total = sum(value for value, _ in first)
            assert weights[token].tolist() == pytest.approx([value / total for value, _ in first], rel=1e-5)


def test_groups_of_a_long_layer_stand_side_by_side() -> None:
    rule = GroupedTopK(8, groups=8, top_groups=4)
    assert rule.grouped(reversed(range(256)), 256) == [[*reversed(range(n, n + 32))] for n in range(0, 256, 32)]


def test_only_a_layer_with_equal_groups_chooses_as_the_masked_one() -> None:
    """Why groups bind: the pruned model cuts the experts that are left into groups anew."""
    rule = RULES["by the two best"]
    logits = 2 * torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    for kept in subsets(8):
        if len(kept) < fewest(rule) or len(kept) % 2:
            continue
        groups = logits[:, list(kept)].sigmoid().view(200, 2, -1)
        best = groups.topk(2).values.sum(-1).argmax(1)
        inside = groups[torch.arange(200), best].topk(3).indices
        pruned = torch.tensor(kept)[best[:, None] * len(kept) // 2 + inside]
        same = bool((rule.choose(logits, kept)[0].sort(1).values == pruned.sort(1).values).all())
        assert same == is_layer(rule, kept, 8)


# ------------------------------------------------------------------------------------------- all sets


@pytest.mark.parametrize("required", [(), (3,), (0, 1), (1, 6), (0, 1, 2), (2, 3, 4, 5)])
@pytest.mark.parametrize("name", RULES)
def test_all_sets_in_their_order(name: str, required: Set) -> None:
    rule = RULES[name]
    for size in range(len(required), 9):
        found = list(sets_of(rule, 8, size, required))
        expected = [
            kept
            for kept in subsets(8, size)
            if set(required) <= set(kept) and (rule.groups == 1 or (size >= fewest(rule) and is_layer(rule, kept, 8)))
        ]
        assert found == expected and num_sets(rule, 8, size, required) == len(expected)


def test_no_set_is_made_to_be_thrown_away() -> None:
    """Of 32 experts in 8 groups: filtering all would take minutes."""
    rule = GroupedTopK(8, groups=8, top_groups=4)
    assert num_sets(rule, 32, 16) == 6**8 and num_sets(rule, 32, 16, (0, 1, 31)) == 3 * 6**6
    first = list(itertools.islice(sets_of(rule, 32, 16), 7))
    assert first[0] == (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29)
    assert first[6] == (*first[0][:12], 24, 26, 28, 29)


@pytest.mark.parametrize("required", [(), (2, 3)])
def test_searches_keep_groups_equal_where_experts_are_ranked(required: Set) -> None:
    """Where all groups are chosen from, the chosen are simply the best; the model cuts groups all the same."""
    rule = InGroups(2, True, False)
    layer = random_statistics(rule, 1, 8, tokens=12).layers[0]
    tensors = layer.tensors
    replay = Replay(tensors["logits"], tensors["gram"], rule, layer.token_sample, layer.loss_weights)

    def loss(kept: Iterable[int]) -> float:
        return float(replay.loss_by_definition(sorted(kept)))

    sets = [kept for kept in subsets(8, 4) if is_layer(rule, kept, 8) and set(required) <= set(kept)]
    assert replay.best_set(4, required) == min(sets, key=loss)
    left = set(range(8))
    while len(left) > 4:
        free = [e for e in left - set(required) if sum(o // 4 == e // 4 for o in left) > 2]
        left.remove(min(free, key=lambda e: loss(left - {e})))
    assert replay.eliminate(4, required) == tuple(sorted(left))


# ------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("name", RULES)
def test_the_numbers_that_hold_the_protected(name: str, multiple: int) -> None:
    rule = RULES[name]
    sizes: dict[Set, set[int]] = {}
    for kept in subsets(8):
        if len(kept) < 8 and len(kept) % multiple == 0 and is_layer(rule, kept, 8):
            for size in range(5):
                for fixed in itertools.combinations(kept, size):
                    sizes.setdefault(fixed, set()).add(len(kept))
    for size in range(5):
        for fixed in subsets(8, size):
            budget = Budget({0: 8}, 8, rule, {0: fixed}, multiple=multiple)
            smaller = sorted(sizes.get(fixed, set()))
            assert budget.allowed(0) == ([*smaller, 8] if 8 % multiple == 0 or not smaller else smaller)


def offered(message: str) -> tuple[str, list[str]]:
    """What a refusal tells to ask for: how it joins them, and the numbers."""
    found = re.search(r"Ask for (?:a sparsity of )?([\d., toe-]+?)(?:\.$|, or leave)", message.replace(" or ", " o "))
    assert found is not None, message
    text = found[1]
    joint = next((joint for joint in (" o ", " to ", ", ") if joint in text), "")
    return joint, [part for part in (text.split(joint) if joint else [text]) if part != "..."]


ASKED = [
    *({"num_experts": n} for n in range(1, 26)),
    *({"total_experts": n} for n in range(1, 49)),
    *({"sparsity": s / 40} for s in range(1, 40)),
]


@pytest.mark.parametrize("protect", [{}, {0: (0, 1, 2, 7)}, {2: (5, 6, 7, 8, 9)}], ids=str)
@pytest.mark.parametrize("multiple", [1, 4, 6, 10])
@pytest.mark.parametrize("name", RULES)
def test_a_request_is_met_or_what_is_offered_can_be(name: str, multiple: int, protect: dict[int, Set]) -> None:
    rule, layers = RULES[name], {0: 24, 2: 24}
    settings = {"protect": protect, "multiple": multiple}
    held = [max(len(set(fixed) & set(group)) for group in members(rule, 24)) for fixed in protect.values()]
    least = max(fewest(rule), rule.groups * max(held, default=0))
    possible = [n for n in range(least, 24) if n % rule.groups == 0 and n % multiple == 0]
    for request in ASKED:
        for make in (uniform_budget, global_budget):
            if make is uniform_budget and "total_experts" in request:
                continue
            try:
                budget = make(layers, rule, **request, **settings)
            except RequestError as refused:
                asked, message = next(iter(request.values())), str(refused)
                if not possible and make is uniform_budget:
                    assert re.search(r"protect fewer( experts)?\.$", message, re.IGNORECASE), message
                    continue
                if "protect names" in message:
                    count = int(re.search(r"keep (\d+) or more", message)[1])
                    assert count == possible[0] and asked != count
                    assert uniform_budget(layers, rule, num_experts=count, **settings).total == 2 * count
                    continue
                if "Ask for a sparsity instead" in message:
                    assert all(mean * 2 not in budget_totals(rule, multiple, protect) for mean in range(1, 24))
                    continue
                joint, values = offered(message)
                kind = next(iter(request))
                numbers = [float(value) if kind == "sparsity" else int(value) for value in values]
                for number in numbers:
                    made = make(layers, rule, **{kind: number}, **settings)
                    assert made.total < 48
                if joint == " o ":
                    assert numbers[0] < asked < numbers[1]
                    between = [n for n in range(*sorted(left(make, layers, kind, n) for n in numbers))][1:]
                    totals = possible if make is uniform_budget else budget_totals(rule, multiple, protect)
                    if kind == "num_experts" and make is global_budget:
                        totals = [n // 2 for n in totals if n % 2 == 0]
                    assert not set(between) & set(totals), message
            else:
                if make is uniform_budget:
                    assert set(budget.num_experts.values()) <= set(possible)
                else:
                    assert budget.total in budget_totals(rule, multiple, protect)


def left(make: Any, layers: dict[int, int], kind: str, number: float) -> int:
    total = 24 if make is uniform_budget else sum(layers.values())
    return total - num_removed(number, total) if kind == "sparsity" else int(number)


def budget_totals(rule: RoutingRule, multiple: int, protect: dict[int, Set]) -> set[int]:
    """The totals that two layers of 24 experts can have."""
    counts = []
    for layer in (0, 2):
        held = rule.groups * max(len(set(protect.get(layer, ())) & set(group)) for group in members(rule, 24))
        least = max(fewest(rule), held)
        counts.append([n for n in range(least, 25) if n % rule.groups == 0 and n % multiple == 0] or [24])
    return {a + b for a, b in itertools.product(*counts)} - {48}


def test_refusals_say_what_is_true() -> None:
    rule = GroupedTopK(8, groups=8, top_groups=4)
    layers = dict.fromkeys(range(3, 61), 256)
    many = "each of the router's 8 groups must keep the same number, at least 2"

    def refused(make: Any, **request: Any) -> str:
        with pytest.raises(RequestError) as error:
            make(layers, rule, **request)
        return str(error.value)

    assert refused(uniform_budget, num_experts=124) == (
        f"num_experts=124 leaves layer 3 with 124 experts, and {many}. Ask for 120 or 128."
    )
    assert refused(uniform_budget, sparsity=0.3) == (
        f"sparsity=0.3 removes 77 of 256 experts, which leaves layer 3 with 179 experts, and {many}. "
        "Ask for a sparsity of 0.2812 or 0.3125."
    )
    assert refused(uniform_budget, num_experts=12).endswith(f"and {many}. Ask for 16, 24, 32, ..., 248.")
    assert refused(uniform_budget, num_experts=136, multiple=16) == (
        f"num_experts=136 leaves layer 3 with 136 experts, and {many}, and count_multiple_of is 16. "
        "Ask for 128 or 144."
    )
    assert refused(uniform_budget, num_experts=64, protect={4: range(32, 42), 5: range(64, 77)}) == (
        "protect names 10 experts of layer 4, so that each of its router's 8 groups keeps 10, and the budget keeps "
        "64; protect fewer or keep 104 or more."
    )
    assert refused(global_budget, total_experts=7003) == (
        f"total_experts=7003 keeps 7003 of the 14848 experts in 58 layers, and {many}: what layers keep adds up to "
        "7000 or 7008. Ask for 7000 or 7008."
    )
    assert "together 936. Ask for 936, 944, 952, ..., 14840." in refused(
        global_budget, total_experts=900, protect={4: (0, 1, 2)}
    )
    assert refused(global_budget, total_experts=100) == (
        "total_experts=100 keeps 100 of the 14848 experts in 58 layers, and each layer keeps at least 2 in each of "
        "the router's 8 groups, or as many as are protected in the fullest, together 928. "
        "Ask for 928, 936, 944, ..., 14840."
    )


def test_sparsities_of_large_models_are_named_to_the_expert() -> None:
    rule, layers = GroupedTopK(8, groups=8, top_groups=4), dict.fromkeys(range(58), 256)
    for sparsity in np.linspace(0.05, 0.9, 60):
        try:
            global_budget(layers, rule, sparsity=float(sparsity))
        except RequestError as refused:
            _, values = offered(str(refused))
            totals = [global_budget(layers, rule, sparsity=float(value)).total for value in values]
            assert totals[0] - totals[1] == 8


def test_a_number_that_no_layer_can_keep() -> None:
    with pytest.raises(RequestError, match="count_multiple_of=9 leaves all 8 experts of layer 0: none can be removed"):
        uniform_budget({0: 8}, RULES["defaults"], num_experts=4, multiple=9)
    with pytest.raises(RequestError, match="the router needs all 8 experts of layer 0: none can be removed"):
        uniform_budget({0: 8}, GroupedTopK(4, groups=4, top_groups=2), num_experts=4)
    with pytest.raises(RequestError, match="no smaller number is allowed by count_multiple_of=9: none can be removed"):
        global_budget({0: 8}, RULES["defaults"], num_experts=4, multiple=9)
    with pytest.raises(RequestError, match=r"and those protected, in multiples of 4, together 8\. Ask for 8, 12\."):
        global_budget({0: 8, 1: 8}, softmax_rule(2), total_experts=6, multiple=4)


def test_where_all_experts_are_no_multiple_a_layer_is_pruned_at_least_to_the_next() -> None:
    budget = global_budget({0: 10, 1: 10, 2: 10}, softmax_rule(2), total_experts=22, multiple=4, protect={2: range(9)})
    assert [budget.allowed(layer) for layer in budget.original] == [[4, 8], [4, 8], [10]]
    with pytest.raises(
        RequestError, match=r"count_multiple_of is 4: what layers keep adds up to .*Ask for 18, 22, 26"
    ):
        global_budget({0: 10, 1: 10, 2: 10}, softmax_rule(2), total_experts=28, multiple=4, protect={2: range(9)})


def test_skipped_layers_keep_their_number() -> None:
    budget = uniform_budget({0: 8, 1: 9}, softmax_rule(2), num_experts=4, multiple=4, skip_layers=[1])
    assert budget.num_experts == {0: 4}
    # A smaller layer that stays whole, so that all become equal.
    assert uniform_budget({0: 8, 1: 4}, softmax_rule(2), num_experts=4, multiple=4).num_experts == {0: 4, 1: 4}


# ------------------------------------------------------------------------------------------- the best of each group


@pytest.mark.parametrize("protect", [{}, {0: (2, 3), 1: (7,)}], ids=str)
@pytest.mark.parametrize("multiple", [1, 2, 3])
@pytest.mark.parametrize("name", RULES)
def test_scores_choose_the_highest_sum_of_all_choices(name: str, multiple: int, protect: dict[int, Set]) -> None:
    rule, layers = RULES[name], {0: 8, 1: 8, 2: 4}
    if rule.fewest > 4:
        layers[2] = 8
    rng = np.random.default_rng(0)
    sets = {
        layer: [
            kept
            for kept in subsets(total)
            if is_layer(rule, kept, total) and set(protect.get(layer, ())) <= set(kept)
            if len(kept) in Budget(layers, 0, rule, {layer: protect.get(layer, ())}, 0, multiple).allowed(layer)
        ]
        for layer, total in layers.items()
    }
    for _ in range(3):
        scores = {layer: rng.gamma(1.0, size=total) * 10.0**layer for layer, total in layers.items()}
        best: dict[int, dict[int, tuple[float, Set]]] = {}
        for layer, kept_sets in sets.items():
            relative = scores[layer] / scores[layer].mean()
            for kept in kept_sets:
                entry = (float(relative[list(kept)].sum()), kept)
                best.setdefault(layer, {})[len(kept)] = max(best.get(layer, {}).get(len(kept), entry), entry)
        for count in best[0]:
            if all(count in best[layer] for layer in layers) and count < 8:
                budget = uniform_budget(layers, rule, num_experts=count, protect=protect, multiple=multiple)
                assert choose(scores, budget) == {layer: best[layer][count][1] for layer in layers}
        combinations = list(itertools.product(*(best[layer].values() for layer in layers)))
        for total in {sum(len(kept) for _, kept in choice) for choice in combinations} - {sum(layers.values())}:
            budget = global_budget(layers, rule, total_experts=total, protect=protect, multiple=multiple)
            fitting = [choice for choice in combinations if sum(len(kept) for _, kept in choice) == total]
            expected = max(fitting, key=lambda choice: sum(score for score, _ in choice))
            assert choose(scores, budget) == {layer: kept for layer, (_, kept) in zip(layers, expected, strict=True)}


def test_ties_favour_no_layer_and_the_lower_experts_of_each_group() -> None:
    rule = GroupedTopK(2, groups=2, top_groups=1)
    equal = {layer: np.zeros(8) for layer in (0, 1)}
    assert choose(equal, global_budget({0: 8, 1: 8}, rule, total_experts=12)) == {
        0: (0, 1, 2, 4, 5, 6),
        1: (0, 1, 2, 4, 5, 6),
    }
    assert choose(equal, global_budget({0: 8, 1: 8}, rule, total_experts=10))[0] == (0, 1, 2, 4, 5, 6)


def test_a_step_is_judged_by_all_it_adds() -> None:
    rule = GroupedTopK(1, groups=2, top_groups=2, best=1)
    scores = {0: np.array([9.0, 5.0, 0.0, 9.0, 0.0, 0.0]), 1: np.array([9.0, 4.0, 0.0, 9.0, 4.0, 0.0])}
    scores = {layer: values / values.mean() for layer, values in scores.items()}
    kept = choose_ranked(
        {n: (-v).tolist() for n, v in scores.items()}, global_budget({0: 6, 1: 6}, rule, num_experts=3)
    )
    assert kept == {0: (0, 3), 1: (0, 1, 3, 4)}, "the best expert alone is in the step that adds less"


def test_steps_stay_in_their_order_where_their_sums_are_rounded() -> None:
    rule = GroupedTopK(1, groups=2, top_groups=2, best=1)
    keys = {0: [(0.0, 0.0), (1e16, 0.0), (1e16, 0.0), (0.0, 0.0), (0.0, 5.0), (1.0, 0.0)]}
    assert choose_ranked(keys, global_budget({0: 6}, rule, total_experts=4)) == {0: (0, 1, 3, 4)}


def test_the_order_of_a_layer_takes_groups_in_turns() -> None:
    budget = Budget({5: 6}, 6, GroupedTopK(1, groups=3, top_groups=1, best=1), {5: (3,)})
    assert budget.order(5, [2.0, 1.0, 0.0, 9.0, 5.0, 5.0]) == [1, 3, 4, 0, 2, 5]
    assert budget.order(5, [2.0, 1.0, 0.0, 9.0, 5.0, 5.0], ()) == [1, 2, 4, 0, 3, 5]
    assert budget.order(5, np.zeros(6), (1, 5)) == [1, 2, 5, 0, 3, 4]


def test_a_number_for_some_layers_changes_nothing_else() -> None:
    rule = GroupedTopK(2, groups=2, top_groups=1)
    budget = global_budget({0: 8, 1: 8, 2: 8}, rule, total_experts=16, protect={2: (7,)}, seed=5, multiple=4)
    exact = budget.exactly({2: 4, 0: 8})
    assert (exact.original, exact.num_experts, exact.total) == ({0: 8, 2: 8}, {0: 8, 2: 4}, 12)
    assert (exact.rule, exact.protected, exact.seed, exact.multiple) == (rule, {0: (), 2: (7,)}, 5, 4)


# ------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("multiple", [1, 3, 4])
def test_paths_grow_while_the_groups_they_need_fit(multiple: int) -> None:
    rule = GroupedTopK(1, groups=2, top_groups=1, best=1)
    rank = {0: np.array([0, 1, 1, np.inf, 3, 4]), 1: np.array([2, 0, np.inf, 0, 0, 1])}
    for total, protect in itertools.product(range(4, 12), ({}, {0: (3,)}, {1: (1, 2), 0: (0, 5)})):
        try:
            budget = global_budget({0: 6, 1: 6}, rule, total_experts=total, protect=protect, multiple=multiple)
        except RequestError:
            continue
        fitting = 0
        for m in range(1, 6):
            size = 0
            for layer in rank:
                on = set(np.flatnonzero(rank[layer] < m).tolist()) | set(protect.get(layer, ()))
                sizes = [
                    len(kept)
                    for kept in subsets(6)
                    if on <= set(kept) and is_layer(rule, kept, 6) and kept and len(kept) % multiple == 0
                ]
                size += min(sizes, default=13)  # 5 or 6 of 6 experts are no multiple of 4
            fitting = m if size <= total else fitting
        assert most_paths(rank, budget, 5) == fitting


def test_experts_on_the_paths_that_fit_are_all_retained() -> None:
    rule = GroupedTopK(2, groups=2, top_groups=1)
    stats = random_statistics(rule, 3, 8)
    rng = np.random.default_rng(0)
    grown = 0
    for trial, total in itertools.product(range(20), (12, 16, 20, 22)):
        importance = [2 * rng.normal(size=(3, 8)) for _ in range(3)]
        transitions = [list(rng.normal(size=(2, 8, 8))) for _ in range(3)].__getitem__
        budget = global_budget(stats.num_experts, rule, total_experts=total, protect={1: (trial % 8,)})
        selection = on_best_paths(stats, budget, importance, transitions, 40)
        assert all(is_layer(rule, kept, 8) for kept in selection.retained.values())
        assert sum(map(len, selection.retained.values())) == total and trial % 8 in selection.retained[1]
        if fitting := selection.findings["paths_per_sample"]:
            grown += 1
            paths = list(best_paths(stats, importance, transitions, fitting))
            for column, kept in selection.retained.items():
                on_paths = np.flatnonzero(np.isfinite(first_path(paths, column, 8)))
                assert set(on_paths.tolist()) <= set(kept)
    assert grown > 20


# ------------------------------------------------------------------------------------------- the last look at a plan


@pytest.mark.parametrize("name", RULES)
def test_every_set_is_refused_that_is_no_layer(name: str) -> None:
    rule = RULES[name]
    for kept in subsets(8):
        if len(kept) < rule.top_k:
            continue
        if is_layer(rule, kept, 8):
            check_retained(rule, {0: tuple(range(8)), 4: kept}, {0: 8, 4: 8}, "the plan")
            continue
        counts = ", ".join(str(len(set(kept) & set(group))) for group in members(rule, 8))
        with pytest.raises(RequestError) as refused:
            check_retained(rule, {0: tuple(range(8)), 4: kept}, {0: 8, 4: 8}, "the plan")
        assert str(refused.value) == (
            f"layer 4: the plan retains {counts} experts of the router's {rule.groups} groups, and each must keep the "
            f"same number, at least {fewest(rule) // rule.groups}."
        )


@pytest.mark.parametrize("group_score", ["top2", "max"])
@pytest.mark.parametrize("groups", [1, 3])
def test_only_tokens_that_an_expert_can_move_are_asked(groups: int, group_score: Literal["top2", "max"]) -> None:
    """Errors of all sets with one expert less, by the definition of each."""
    generator = torch.Generator().manual_seed(groups)
    logits = torch.randn(60, 12, generator=generator)
    outputs = torch.randn(60, 12, 5, generator=generator)
    rows, columns = torch.triu_indices(12, 12)
    gram = (outputs @ outputs.transpose(1, 2))[:, rows, columns]
    bias = tuple((0.2 * torch.randn(12, generator=generator)).tolist())
    rule = TopK(3, "sigmoid", bias=bias, groups=groups, top_groups=max(1, groups - 1), group_score=group_score)
    left = [0, 1, 3, 4, 5, 6, 7, 9, 10, 11]
    found = errors_without(logits, gram, rule, left, [0, 3, 7, 11])
    moved = rule.moved_by(logits, left)
    assert moved is not None and 0.05 < moved.double().mean() < 0.8
    for column, expert in enumerate([0, 3, 7, 11]):
        expected = squared_errors(logits, gram, rule, [other for other in left if other != expert])
        torch.testing.assert_close(found[:, column], expected, atol=1e-12, rtol=0)
