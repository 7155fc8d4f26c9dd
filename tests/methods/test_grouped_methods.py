# SPDX-License-Identifier: Apache-2.0
"""Every method on a router with groups, or with counts of a multiple: equal groups, totals, and the best sets."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from synthetic import GroupedTopK, random_statistics

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig, PruningPlan, RequestError, RunError, Sensitivity
from optimum_moe_prune.evaluation.sensitivity_sets import check_grid, layer_sets
from optimum_moe_prune.methods import get_method, list_methods, registry
from optimum_moe_prune.methods.generalists import losses_alone
from optimum_moe_prune.methods.mosaic import Options, cluster_layer, cut, performance_vectors, token_domains, ward_tree
from optimum_moe_prune.methods.replay import reconstruction_loss, squared_errors
from optimum_moe_prune.methods.variability import variability_scores
from optimum_moe_prune.planning.build import build_plan, quiet_plan
from optimum_moe_prune.planning.sensitivity import LayerSensitivity, MethodSensitivity, decisive

RULE = GroupedTopK(3, groups=2, top_groups=1)
"""Of 12 experts a layer keeps 6, 8, 10 or 12: three a token, all of one group."""

GROUPS = range(6), range(6, 12)
WAYS = [(method, way) for method in list_methods() if method != "auto" for way in get_method(method).takes]


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return random_statistics(RULE, 3, 12, tokens=12)


def of_groups(kept: tuple[int, ...]) -> list[int]:
    return [len(set(kept) & set(group)) for group in GROUPS]


def measured(stats: CalibrationStats, recipe: MoEPrunerConfig) -> Sensitivity | None:
    """What a measurement would give, where it is asked for: the method's own sets, and made-up divergences."""
    if recipe.allocates != "sensitivity":
        return None
    layers = {
        layer: LayerSensitivity(
            stats.num_experts[layer], sets, {count: {"all": (12 - count) ** 2 / (layer + 1)} for count in sets}
        )
        for layer, sets in layer_sets(stats, recipe, None).items()
    }
    methods = {recipe.method: MethodSensitivity(decisive(recipe), layers)}
    return Sensitivity(stats.model, {"all": 1}, methods, provenance={"calibration": stats.fingerprint})


def planned(stats: CalibrationStats, **settings: Any) -> PruningPlan:
    recipe = MoEPrunerConfig(**settings)
    return quiet_plan(stats, recipe, sensitivity=measured(stats, recipe))


SETTINGS: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = [
    ({}, (6, 8, 10), (18, 20, 30, 34)),
    ({"protect": {0: (7, 8, 9, 10), 2: (1, 11)}, "skip_layers": (1,)}, (8, 10), (14, 18)),
]
"""What a recipe says besides, the numbers a layer can keep, and those all layers together can."""


@pytest.mark.parametrize(("settings", "counts", "totals"), SETTINGS, ids=["plain", "protected"])
@pytest.mark.parametrize(("method", "allocation"), WAYS)
def test_groups_are_equal_and_the_budget_is_met(
    stats: CalibrationStats,
    method: str,
    allocation: str,
    settings: dict[str, Any],
    counts: tuple[int, ...],
    totals: tuple[int, ...],
) -> None:
    pruned = [layer for layer in range(3) if layer not in settings.get("skip_layers", ())]
    uniform = allocation == "uniform"
    options: list[dict[str, Any]] = [{}]
    if method in ("mosaic", "variability"):
        options = [{"num_generalists": m, "search": search} for m in (0, 5) for search in ("auto", "greedy")]
    elif method == "enumeration":
        options = [{"search": "exhaustive"}, {"search": "greedy"}]
    for chosen in options:
        recipe = MoEPrunerConfig(method=method, allocation=allocation, method_options=chosen, **settings)
        sensitivity = measured(stats, recipe)
        for number in counts if uniform else totals:
            request = {"num_experts": number} if uniform else {"total_experts": number}
            plan = quiet_plan(stats, replace(recipe, **request), sensitivity=sensitivity)
            for layer, kept in plan.retained.items():
                first, second = of_groups(kept)
                assert first == second >= 3
                assert set(settings.get("protect", {}).get(layer, ())) <= set(kept)
            assert all(plan.num_experts[layer] == 12 for layer in settings.get("skip_layers", ()))
            found = [plan.num_experts[layer] for layer in pruned]
            assert set(found) == {number} if uniform else sum(found) == number


@pytest.mark.parametrize(("method", "allocation"), WAYS)
def test_counts_are_of_the_multiple(stats: CalibrationStats, method: str, allocation: str) -> None:
    free = random_statistics(replace(RULE, groups=1), 3, 12, tokens=12)
    for statistics, multiple, total in ((free, 4, 24), (free, 4, 12), (free, 1, 12), (stats, 3, 18), (stats, 10, 30)):
        request = {"num_experts": total // 3} if allocation == "uniform" else {"total_experts": total}
        plan = planned(statistics, method=method, allocation=allocation, count_multiple_of=multiple, **request)
        assert sum(plan.num_experts.values()) == total
        assert all(count % multiple == 0 for count in plan.num_experts.values())
        assert statistics is free or all(len(set(of_groups(kept))) == 1 for kept in plan.retained.values())


# ------------------------------------------------------------------------------------------- the best sets


def loss(stats: CalibrationStats, index: int, kept: tuple[int, ...]) -> float:
    layer = stats.layers[index]
    errors = squared_errors(layer.tensors["logits"], layer.tensors["gram"], layer.routing, kept)
    return float(reconstruction_loss(errors, layer.token_sample, layer.loss_weights))


def equal_sets(size: int, required: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    sets = itertools.combinations(range(12), size)
    return [kept for kept in sets if len(set(of_groups(kept))) == 1 and set(required) <= set(kept)]


def test_enumeration_finds_the_least_loss_of_all_equal_sets(stats: CalibrationStats) -> None:
    for count, protect in ((6, {}), (8, {1: (0, 1, 2)}), (10, {2: (6, 7)})):
        plan = planned(stats, method="enumeration", num_experts=count, protect=protect)
        for layer, kept in plan.retained.items():
            sets = equal_sets(count, protect.get(layer, ()))
            assert kept == min(sets, key=lambda s, layer=layer: loss(stats, layer, s))


def test_what_is_said_of_searches_counts_equal_sets_alone(stats: CalibrationStats) -> None:
    options = {"max_sets": 399}
    notes = planned(stats, method="enumeration", num_experts=6, method_options=options).provenance["notes"]
    assert "400 sets of 6 experts are more than max_sets=399; eliminated greedily" in notes
    notes = planned(stats, method="enumeration", num_experts=6, method_options={"max_sets": 400}).provenance["notes"]
    assert not any("eliminated" in note for note in notes)
    protect = {0: (0, 1), 1: (0, 11), 2: (6,)}
    notes = planned(
        stats, method="enumeration", num_experts=6, method_options={"max_sets": 1}, protect=protect
    ).provenance["notes"]
    assert [int(note.split()[0]) for note in notes if "eliminated" in note] == [4 * 20, 10 * 10, 20 * 10]


@pytest.mark.parametrize(("asked", "made"), [(2, 6), (6, 6), (7, 8)])
def test_generalists_are_the_best_set_that_can_be_a_layer(stats: CalibrationStats, asked: int, made: int) -> None:
    for method in ("mosaic", "variability"):
        plan = planned(stats, method=method, num_experts=10, method_options={"num_generalists": asked})
        for layer, kept in plan.retained.items():
            assert set(min(equal_sets(made), key=lambda s, layer=layer: loss(stats, layer, s))) <= set(kept)
        said = f"num_generalists={asked} is raised to {made}, the next number that the router's 2 groups can share"
        assert plan.provenance["notes"].count(said) == (asked != made)
    with pytest.raises(RequestError, match="num_generalists is 9, and the budget keeps 8"):
        planned(stats, method="mosaic", num_experts=8, method_options={"num_generalists": 9})


def test_one_generalist_stays_one(stats: CalibrationStats) -> None:
    """One expert alone is no layer, but its error is known; the groups' places are filled all the same."""
    for method in ("mosaic", "variability"):
        plan = planned(stats, method=method, num_experts=10, method_options={"num_generalists": 1})
        assert not any("raised" in note for note in plan.provenance["notes"])
        for layer, kept in plan.retained.items():
            assert int(losses_alone(stats.layers[layer]).argmin()) in kept and of_groups(kept) == [5, 5]


def test_variability_keeps_the_best_of_each_group(stats: CalibrationStats) -> None:
    protect = {0: (7, 8)}
    plan = planned(stats, method="variability", num_experts=8, protect=protect)
    for layer, kept in plan.retained.items():
        scores = variability_scores(stats.layers[layer])
        expected: list[int] = []
        for group in GROUPS:
            fixed = [e for e in group if e in protect.get(layer, ())]
            others = sorted((e for e in group if e not in fixed), key=lambda e, scores=scores: -scores[e])
            expected += [*fixed, *others[: 4 - len(fixed)]]
        assert kept == tuple(sorted(expected))


@pytest.mark.parametrize("options", [{}, {"num_domains": 2}, {"num_domains": 5, "ward": "distances"}], ids=str)
def test_mosaic_clusters_each_group(stats: CalibrationStats, options: dict[str, Any]) -> None:
    """Into as many clusters as the group has places beside its protected experts; one group may be full."""
    protect = {0: (6, 7, 8, 9), 1: (2,)}
    for count in (8, 10):
        settings = {"num_generalists": 0, **options}
        plan = planned(stats, method="mosaic", num_experts=count, method_options=settings, protect=protect)
        for layer, kept in plan.retained.items():
            first = protect.get(layer, ())
            domain = token_domains(stats.layers[layer], options.get("num_domains", count - len(first)), 0)
            vectors, scores = performance_vectors(stats.layers[layer], domain), variability_scores(stats.layers[layer])
            expected = list(first)
            for group in GROUPS:
                others = [e for e in group if e not in first]
                places = count // 2 - (6 - len(others))
                label = cut(ward_tree(vectors[others], options.get("ward", "ranks")), places) if places else []
                for cluster in range(places):
                    expected.append(
                        max(
                            (e for e, at in zip(others, label, strict=True) if at == cluster),
                            key=lambda e, scores=scores: scores[e],
                        )
                    )
            assert kept == tuple(sorted(expected))
            found = cluster_layer(stats.layers[layer], first, count - len(first), 0, Options(**settings))
            assert sorted([*first, *found.representatives]) == list(kept)
            assert len(found.experts) == len(found.label) == len(found.vectors) == len(found.scores)
            assert sum(len(tree) + 1 for tree in found.trees) == len(found.experts)
            assert set(found.label.tolist()) == set(range(count - len(first)))


def test_random_sets_of_a_group_are_equally_likely(stats: CalibrationStats) -> None:
    drawn = Counter()
    for seed in range(400):
        few, more = (planned(stats, method="random", num_experts=n, seed=seed) for n in (6, 8))
        for layer, kept in few.retained.items():
            assert set(kept) <= set(more.retained[layer])
            drawn.update([tuple(e for e in kept if e < 6), tuple(e - 6 for e in kept if e >= 6)])
    assert len(drawn) == 20 and all(abs(n - 120) < 45 for n in drawn.values())


# ------------------------------------------------------------------------------------------- what is measured


def test_only_numbers_that_groups_can_share_are_measured(stats: CalibrationStats) -> None:
    recipe = MoEPrunerConfig(method="reap", protect={1: (0, 1, 2, 3)})
    grid = check_grid(recipe, stats.num_experts, RULE)
    assert grid == {0: [6, 8, 10], 1: [8, 10], 2: [6, 8, 10]}
    assert check_grid(replace(recipe, count_multiple_of=3), stats.num_experts, RULE) == {0: [6], 1: [], 2: [6]}
    assert check_grid(replace(recipe, count_multiple_of=5), stats.num_experts, RULE) == {0: [10], 1: [10], 2: [10]}
    said = (
        r"at least 3 in each of the router's 2 groups, or as many as are protected in the fullest, in multiples of 7"
    )
    with pytest.raises(RequestError, match=said):
        check_grid(replace(recipe, count_multiple_of=7), stats.num_experts, RULE)


# ------------------------------------------------------------------------------------------- what is refused


def test_a_method_that_knows_no_groups_is_refused(stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register_method("first_ones", kind="set", summary="", source="", needs=frozenset())(
        lambda stats, budget, options: {layer: tuple(range(n)) for layer, n in budget.num_experts.items()}
    )
    said = (
        r"retains \[0, 1, .*\] in layer 0, where the budget keeps 8 experts, as many in each of the router's 2 groups,"
    )
    with pytest.raises(RunError, match=said):
        planned(stats, method="first_ones", num_experts=8)
    registry.register_method("beyond", kind="set", summary="", source="", needs=frozenset())(
        lambda stats, budget, options: {layer: (0, 1, 2, 6, 7, 12) for layer in budget.num_experts}
    )
    with pytest.raises(RunError, match=r"retains \[0, 1, 2, 6, 7, 12\] in layer 0"):
        planned(stats, method="beyond", num_experts=6)


def test_measured_sets_that_are_no_layers_are_refused(stats: CalibrationStats) -> None:
    """A file of a version that knew no groups."""
    recipe = MoEPrunerConfig(method="reap", allocation="sensitivity", total_experts=24)
    sensitivity = measured(stats, recipe)
    for layer in sensitivity.methods["reap"].layers.values():
        layer.retained[8] = tuple(range(8))
        layer.kl[8] = {"all": 0.0}
    with pytest.raises(
        RequestError,
        match=r"layer 0: method 'reap' retains 6, 2 experts of the router's 2 groups, and each must keep the same "
        r"number, at least 3\.",
    ):
        quiet_plan(stats, recipe, sensitivity=sensitivity)


# ------------------------------------------------------------------------------------------- what is said


def test_an_odd_number_is_noted_where_an_even_one_was(caplog: pytest.LogCaptureFixture) -> None:
    rule = replace(RULE, groups=1)

    def notes(experts: int, **settings: Any) -> list[str]:
        caplog.clear()
        plan = build_plan(
            random_statistics(rule, 2, experts, tokens=6), MoEPrunerConfig(method="frequency", **settings)
        )
        said = [note for note in plan.provenance["notes"] if "evenly" in note]
        assert sum("evenly" in record.getMessage() for record in caplog.records) == len(said) <= 1
        return said

    keeps = "count_multiple_of (2, 4, 8 ...) keeps numbers that can"
    assert notes(16, num_experts=5) == [f"5 experts cannot be spread evenly over 8, 4 or 2 devices; {keeps}"]
    assert notes(12, num_experts=5) == [f"5 experts cannot be spread evenly over 4 or 2 devices; {keeps}"]
    assert notes(6, num_experts=5, skip_layers=(1,)) == [f"5 experts cannot be spread evenly over 2 devices; {keeps}"]
    assert notes(7, num_experts=5) == notes(16, num_experts=6) == []
    protect = {0: (0, 1, 2, 3, 4, 5, 6), 1: (0,)}
    assert notes(8, total_experts=10, allocation="global", protect=protect) == [
        f"the odd numbers of experts in 2 layers cannot be spread evenly over 8, 4 or 2 devices; {keeps}"
    ]


def test_a_request_that_is_no_multiple_names_the_nearest(stats: CalibrationStats) -> None:
    with pytest.raises(RequestError, match=r"10 experts, and each .*, and count_multiple_of is 4\. Ask for 8\."):
        planned(stats, method="reap", num_experts=10, count_multiple_of=4)
