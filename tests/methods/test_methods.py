# SPDX-License-Identifier: Apache-2.0
"""Every method against its formula, and what happens at the edges."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from oracles import softmax_rule, straight_loop
from scipy.stats import rankdata, spearmanr

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPrunerConfig,
    Need,
    RequestError,
    RunError,
    list_methods,
)
from optimum_moe_prune import methods as methods_package
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.methods import get_method, make_options, registry
from optimum_moe_prune.methods.budget import UniformBudget, uniform_budget
from optimum_moe_prune.methods.enumeration import SearchOptions, best_set
from optimum_moe_prune.methods.mosaic import _standardised, cut, performance_vectors, token_domains, ward_tree
from optimum_moe_prune.methods.replay import reconstruction_loss, squared_errors
from optimum_moe_prune.methods.selection import Selection
from optimum_moe_prune.methods.super_experts import super_experts
from optimum_moe_prune.methods.variability import variability_scores
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.statistics.stats import LayerStats

ALL = [
    "aimer",
    "ean",
    "enumeration",
    "fisher",
    "frequency",
    "importance",
    "man",
    "mosaic",
    "msan",
    "pathfinder",
    "random",
    "reap",
    "soft_frequency",
    "transition",
    "variability",
]


@pytest.fixture
def stats(kind: str, samples: CalibrationSet) -> CalibrationStats:
    return collect(make_model(kind), samples, set(Need))


@pytest.fixture(scope="module")
def looped(samples: CalibrationSet) -> Callable[[str], dict[int, dict[str, torch.Tensor]]]:
    """What a straight loop gathers of the model of a kind; of each once."""
    return functools.cache(lambda kind: straight_loop(make_model(kind), samples))


def family(tables: dict[str, torch.Tensor], name: str, mean: bool) -> np.ndarray:
    total, tokens = tables[name].sum(0).numpy(), tables["routed_tokens"].sum(0).numpy()
    return np.where(tokens > 0, total / np.maximum(tokens, 1), 0) if mean else total


@pytest.mark.parametrize(
    ("method", "options", "name", "mean"),
    [
        ("frequency", {}, "routed_tokens", False),
        ("soft_frequency", {}, "routed_probability", False),
        ("ean", {}, "norm", False),
        ("man", {}, "norm", True),
        ("msan", {}, "squared_norm", True),
        ("reap", {}, "norm_applied", True),
        ("reap", {"gate": "probability"}, "norm_probability", True),
        ("reap", {"gate": "renormalised"}, "norm_renormalised", True),
    ],
)
@torch.no_grad()
def test_scores_equal_a_straight_loop(
    kind: str,
    samples: CalibrationSet,
    looped: Callable[[str], dict[int, dict[str, torch.Tensor]]],
    method: str,
    options: dict[str, str],
    name: str,
    mean: bool,
) -> None:
    model = make_model(kind)
    config = MoEPrunerConfig(method=method, method_options=options, num_experts=4)
    stats = collect(model, samples, get_method(method).needs(config.options()))
    plan = build_plan(stats, config)
    for layer, tables in looped(kind).items():
        expected = family(tables, name, mean)
        np.testing.assert_allclose(plan.scores[layer], expected, rtol=1e-5)
        assert set(plan.retained[layer]) == set(np.argsort(-expected, kind="stable")[:4].tolist())


def test_variability_is_the_divergence_from_an_even_distribution(stats: CalibrationStats) -> None:
    for layer in stats.layers.values():
        p = torch.softmax(layer.tensors["logits"].double(), -1)
        q = p / p.sum(0)
        expected = (q * torch.log2(q * len(q))).sum(0)
        np.testing.assert_allclose(variability_scores(layer), expected, rtol=1e-6)
        silent = replace(layer, tensors={**layer.tensors, "probability": 0 * layer.tensors["probability"]})
        assert (variability_scores(silent) == 0).all()


@pytest.mark.parametrize("size", [3, 5])
def test_enumeration_is_the_brute_force_minimum(stats: CalibrationStats, size: int) -> None:
    plan = build_plan(stats, MoEPrunerConfig(method="enumeration", num_experts=size))
    for index, layer in stats.layers.items():
        losses = {}
        for retained in itertools.combinations(range(layer.num_experts), size):
            errors = squared_errors(layer.tensors["logits"], layer.tensors["gram"], layer.routing, retained)
            losses[retained] = reconstruction_loss(errors, layer.token_sample, layer.sample_weights).item()
        assert plan.retained[index] == min(losses, key=losses.__getitem__)


def test_enumeration_goes_greedy_beyond_max_sets(stats: CalibrationStats) -> None:
    def planned(**options: object) -> dict[int, tuple[int, ...]]:
        return build_plan(stats, MoEPrunerConfig(method="enumeration", num_experts=4, method_options=options)).retained

    greedy = planned(search="greedy")
    assert planned(max_sets=5) == greedy
    assert planned(max_sets=math.comb(8, 4)) == planned(search="exhaustive") == planned()
    for index, retained in greedy.items():
        assert len(retained) == 4, index


def test_a_search_is_said_to_be_greedy_where_it_is(stats: CalibrationStats) -> None:
    sets = {count: math.comb(count, 4) for count in stats.num_experts.values()}
    for method in ("enumeration", "mosaic", "variability"):
        options = {} if method == "enumeration" else {"num_generalists": 4}
        for max_sets, search in ((max(sets.values()), "auto"), (max(sets.values()) - 1, "auto"), (1, "greedy")):
            options |= {"max_sets": max_sets, "search": search}
            plan = build_plan(stats, MoEPrunerConfig(method=method, num_experts=4, method_options=options))
            said = [note for note in plan.provenance["notes"] if "eliminated greedily" in note]
            assert said == [
                f"{number} sets of 4 experts are more than max_sets={max_sets}; eliminated greedily"
                for number in sorted(set(sets.values()))
                if number > max_sets and search == "auto"
            ]


def test_mosaic_follows_the_paper_step_by_step(stats: CalibrationStats) -> None:
    """The same six steps, written once more with loops and scipy's own Spearman; the clustering by explicit merges."""
    options = {"num_generalists": 1, "num_domains": 5}
    plan = build_plan(stats, MoEPrunerConfig(method="mosaic", num_experts=4, method_options=options, seed=3))
    for index, layer in stats.layers.items():
        losses = []
        for expert in range(layer.num_experts):
            errors = squared_errors(layer.tensors["logits"], layer.tensors["gram"], layer.routing, (expert,))
            losses.append(reconstruction_loss(errors, layer.token_sample, layer.sample_weights).item())
        generalist = int(np.argmin(losses))
        domain = token_domains(layer, 5, 3)
        assert set(domain) == set(range(5))
        others = [e for e in range(layer.num_experts) if e != generalist]
        single = layer.tensors["token_single_error"].double().numpy()
        vectors = np.array([[single[domain == j, e].mean() for j in range(5)] for e in others])
        clusters = [[row] for row in range(len(others))]
        rho = np.array(
            [
                [1.0 if a == b else spearmanr(vectors[a], vectors[b])[0] for b in range(len(others))]
                for a in range(len(others))
            ]
        )

        def increase(a: list[int], b: list[int], rho: np.ndarray = rho) -> float:
            """Ward's increase of the within-cluster sum of squares, from squared distances 2 K (1 - rho)."""
            squared = 2 * 5 * (1 - rho)

            def within(rows: list[int]) -> float:
                return squared[np.ix_(rows, rows)].sum() / (2 * len(rows))

            return within(a + b) - within(a) - within(b)

        while len(clusters) > 3:
            a, b = min(
                itertools.combinations(range(len(clusters)), 2),
                key=lambda ab: increase(clusters[ab[0]], clusters[ab[1]]),
            )
            clusters[a] = clusters[a] + clusters.pop(b)
        score = variability_scores(layer)
        representatives = [max((others[row] for row in c), key=lambda e: (score[e], -e)) for c in clusters]
        assert plan.retained[index] == tuple(sorted([generalist, *representatives]))


def test_rank_standardised_distances_are_two_k_times_one_minus_rho() -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 7))
    standard = _standardised(rankdata(vectors, axis=1), axis=1)
    squared = ((standard[:, None] - standard[None]) ** 2).sum(-1)
    np.testing.assert_allclose(squared, 2 * 7 * (1 - spearmanr(vectors, axis=1)[0]), atol=1e-9)


def test_performance_vectors_are_means_by_domain(stats: CalibrationStats) -> None:
    layer = stats.layers[0]
    domain = np.arange(len(layer.token_sample)) % 3
    single = layer.tensors["token_single_error"].double().numpy()
    expected = np.stack([single[domain == j].mean(0) for j in range(3)], axis=1)
    np.testing.assert_allclose(performance_vectors(layer, domain), expected)


@pytest.mark.parametrize("ward", ["ranks", "distances"])
@pytest.mark.parametrize(
    "vectors",
    [
        np.ones((6, 5)),  # all alike
        np.tile(np.arange(5.0), (6, 1)),  # the same ranks
        np.random.default_rng(0).integers(0, 2, (6, 5)).astype(float),  # many ties
        np.zeros((6, 2)),  # fewer than 3 domains, nothing to tell apart
        np.random.default_rng(1).random((6, 1)),
        np.random.default_rng(2).random((6, 2)),
    ],
)
def test_clusters_are_always_as_many_as_asked(vectors: np.ndarray, ward: str) -> None:
    for count in range(1, 7):
        label = cut(ward_tree(vectors, ward), count)
        assert sorted(set(label)) == list(range(count))


@pytest.mark.parametrize(
    "options",
    [
        {"num_generalists": 0},
        {"num_generalists": 3},
        {"num_generalists": 4},  # nothing left to cluster
        {"num_domains": 1},
        {"num_domains": 2},
        {"num_domains": 40},
        {"num_domains": "auto"},
        {"ward": "distances"},
        {"search": "greedy"},
    ],
)
def test_mosaic_always_retains_the_budget(stats: CalibrationStats, options: dict[str, object]) -> None:
    config = MoEPrunerConfig(method="mosaic", num_experts=4, method_options=options, protect={0: (6,)})
    plans = [build_plan(stats, config) for _ in range(2)]
    assert plans[0].retained == plans[1].retained
    assert all(len(experts) == 4 for experts in plans[0].retained.values())
    assert 6 in plans[0].retained[0]


def test_mosaic_with_as_many_generalists_as_experts_is_enumeration(stats: CalibrationStats) -> None:
    mosaic = MoEPrunerConfig(method="mosaic", num_experts=4, method_options={"num_generalists": 4})
    enumeration = MoEPrunerConfig(method="enumeration", num_experts=4)
    assert build_plan(stats, mosaic).retained == build_plan(stats, enumeration).retained


def test_identical_tokens_make_one_domain(samples: CalibrationSet) -> None:
    stats = collect(make_model(), samples, set(Need))
    layer = stats.layers[0]
    same = replace(layer, tensors={**layer.tensors, "inputs": torch.ones_like(layer.tensors["inputs"])})
    assert set(token_domains(same, 4, 0)) == {0}
    assert set(token_domains(same, "auto", 0)) == {0}
    alike = replace(stats, layers={0: same})
    assert len(build_plan(alike, MoEPrunerConfig(method="mosaic", num_experts=4)).retained[0]) == 4


def test_random_is_seeded_nested_and_needs_nothing(samples: CalibrationSet) -> None:
    stats = collect(make_model(), samples, {Need.ROUTING})
    plans = {
        (n, s): build_plan(stats, MoEPrunerConfig(method="random", num_experts=n, seed=s)).retained
        for n, s in itertools.product((3, 5), (0, 1))
    }
    assert plans[3, 0] == build_plan(stats, MoEPrunerConfig(method="random", num_experts=3)).retained
    assert plans[5, 0] != plans[5, 1]
    assert len(set(plans[5, 0].values())) > 1, "layers are drawn separately"
    assert all(set(plans[3, 0][layer]) < set(plans[5, 0][layer]) for layer in plans[3, 0])
    assert get_method("random").needs(None) == frozenset()


@pytest.mark.parametrize("method", ALL)
def test_every_method_keeps_to_budget_protection_and_seed(stats: CalibrationStats, method: str) -> None:
    settings = {"num_experts": 4, "protect": {0: (1, 5)}, "skip_layers": (2,), "seed": 5}
    config = MoEPrunerConfig(method=method, allocation="uniform", **settings)
    first, second = build_plan(stats, config), build_plan(stats, config)
    assert len(first.retained[0]) == 4 and {1, 5} <= set(first.retained[0])
    assert first.num_experts[2] == first.original_num_experts[2]
    values = [json.dumps({k: v for k, v in p.to_dict().items() if k != "provenance"}) for p in (first, second)]
    assert values[0] == values[1]


@pytest.mark.parametrize("method", ALL)
def test_a_method_reads_no_more_than_it_declares(kind: str, samples: CalibrationSet, method: str) -> None:
    config = MoEPrunerConfig(method=method, num_experts=4)
    needs = get_method(method).needs(config.options())
    full, lean = (collect(make_model(kind), samples, n) for n in (set(Need), needs))
    assert build_plan(lean, config).retained == build_plan(full, config).retained


@pytest.mark.parametrize("method", [name for name in ALL if "global" in get_method(name).allocations])
def test_a_global_allocation_keeps_to_its_budget(stats: CalibrationStats, method: str) -> None:
    top_k = stats.model["top_k"]
    config = MoEPrunerConfig(method=method, sparsity=0.4, allocation="global", protect={0: (1, 5)}, seed=5)
    plan = build_plan(stats, config)
    everything = sum(stats.num_experts.values())
    assert sum(plan.num_experts.values()) == everything - math.floor(0.4 * everything + 0.5)
    assert min(plan.num_experts.values()) >= top_k and {1, 5} <= set(plan.retained[0])
    assert build_plan(stats, config).retained == plan.retained
    counted = replace(config, sparsity=None, total_experts=sum(plan.num_experts.values()))
    assert build_plan(stats, counted).retained == plan.retained


@pytest.mark.parametrize("method", ["mosaic", "enumeration", "variability"])
def test_methods_that_choose_sets_for_a_count_refuse_a_global_allocation(method: str) -> None:
    with pytest.raises(RequestError, match=f"allocation 'global' is not for method '{method}', which takes 'uniform'"):
        MoEPrunerConfig(method=method, sparsity=0.5, allocation="global")


def test_one_file_each() -> None:
    assert list_methods() == sorted(["auto", *ALL])
    for name in ("auto", *ALL):
        module = getattr(methods_package, name)
        assert module.__name__ == f"optimum_moe_prune.methods.{name}" and module.__doc__


def test_unknown_names_list_the_known_ones_nearest_first() -> None:
    with pytest.raises(RequestError, match=r"method 'mosiac' is not known. Known: mosaic, "):
        get_method("mosiac")
    with pytest.raises(RequestError, match=r"'mosaic' has no option 'num_domain'. Its options: num_domains, "):
        make_options(get_method("mosaic"), {"num_domain": 3})
    with pytest.raises(RequestError, match=r"'ean' has no option 'x'. It has none"):
        make_options(get_method("ean"), {"x": 3})


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        ("mosaic", "num_generalists", "many", "takes an integer"),
        ("mosaic", "num_generalists", 1.5, "takes an integer"),
        ("mosaic", "num_generalists", True, "takes an integer"),
        ("mosaic", "num_generalists", -1, "cannot be negative"),
        ("mosaic", "num_domains", 0, "at least 1"),
        ("mosaic", "ward", "words", "takes 'ranks' or 'distances'"),
        ("reap", "gate", None, "takes 'applied' or 'probability' or 'renormalised'"),
        ("enumeration", "max_sets", 0, "at least 1"),
        ("mosaic", "max_sets", -5, "at least 1"),
        ("variability", "num_generalists", -2, "cannot be negative"),
    ],
)
def test_wrong_options_are_refused(method: str, option: str, value: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        make_options(get_method(method), {option: value})


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("auto", "auto"), ("none", None), (None, None), (7, 7)])
def test_options_are_read_from_text(value: object, expected: object) -> None:
    assert make_options(get_method("mosaic"), {"num_domains": value}).num_domains == expected


def test_options_of_every_type_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @dataclass(frozen=True)
    class Options:
        share: float = 0.5
        both: bool = False
        count: int | None = None

    registry.register_method("typed", kind="scores", summary="", source="", needs=set(), options=Options)(
        lambda s, o: {}
    )
    typed = get_method("typed")
    assert make_options(typed, {}) == Options()
    for value in (2, 2.0, "2", "2e0"):
        options = make_options(typed, {"share": value})
        assert options.share == 2.0 and type(options.share) is float
    for value, expected in ((True, True), ("true", True), ("False", False), (False, False)):
        assert make_options(typed, {"both": value}).both is expected
    for name, value in (
        ("both", 1),
        ("both", "1"),
        ("share", True),
        ("share", "much"),
        ("count", "true"),
        ("count", 1.0),
    ):
        with pytest.raises(RequestError, match=f"option '{name}' of method 'typed' is {value!r}; it takes"):
            make_options(typed, {name: value})
    assert make_options(typed, {"count": "None"}).count is None and make_options(typed, {"count": "7"}).count == 7
    with pytest.raises(RequestError, match=r"method_options is \[1\]; it must be a mapping"):
        make_options(typed, [1])  # type: ignore[arg-type]


def test_methods_ask_for_what_they_read_and_no_more() -> None:
    routed, dense = {Need.ROUTING, Need.ROUTED_NORMS}, {Need.ROUTING, Need.DENSE_NORMS}
    paths, domains = {*dense, Need.SINGLE_ERROR}, {Need.ROUTING, Need.SINGLE_ERROR, Need.INPUTS}
    expected: list[tuple[str, dict[str, object], set[Need]]] = [
        *((name, {}, {Need.ROUTING}) for name in ("frequency", "soft_frequency", "variability")),
        *((name, {}, routed) for name in ("ean", "man", "msan", "reap")),
        ("random", {}, set()),
        ("aimer", {}, {Need.WEIGHTS}),
        ("enumeration", {}, {Need.ROUTING, Need.GRAM}),
        ("fisher", {}, {Need.ROUTING, Need.FISHER}),
        ("variability", {"num_generalists": 1}, {Need.ROUTING, Need.SINGLE_ERROR}),
        ("variability", {"num_generalists": 2}, {Need.ROUTING, Need.GRAM}),
        ("mosaic", {}, domains),
        ("mosaic", {"num_generalists": 0, "search": "greedy"}, domains),
        ("mosaic", {"num_generalists": 1, "max_sets": 1, "search": "exhaustive"}, domains),
        ("mosaic", {"num_generalists": 1, "search": "greedy"}, {*domains, Need.GRAM}),
        ("mosaic", {"num_generalists": 2}, {*domains, Need.GRAM}),
        ("pathfinder", {}, paths),
        ("pathfinder", {"transitions": "conditional"}, {*paths, Need.COACTIVATION}),
        ("transition", {}, dense),
        ("transition", {"transitions": "conditional"}, {*dense, Need.COACTIVATION}),
        ("importance", {}, paths),
        ("importance", {"tau": 1.0}, {Need.SINGLE_ERROR}),
    ]
    assert {name for name, _, _ in expected} == set(ALL)
    for name, options, needs in expected:
        method = get_method(name)
        assert method.needs(make_options(method, options)) == needs, (name, options)


def test_means_are_over_the_tokens_an_expert_had() -> None:
    tensors = {"norm": torch.tensor([[0.0, 3.0, 8.0]]), "routed_tokens": torch.tensor([[0.0, 1.0, 4.0]])}
    layer = LayerStats(3, softmax_rule(1), tensors, torch.ones(1, dtype=torch.float64), torch.zeros(0))
    assert registry.per_routed_token(layer, "norm").tolist() == [0.0, 3.0, 2.0]


def test_how_methods_can_spread_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"aimer", "random", "ean", "frequency", "man", "msan", "reap", "soft_frequency"}
    for name in ALL:
        method = get_method(name)
        if name in ("pathfinder", "transition", "importance"):
            assert method.allocations == ("global", "uniform")
        else:
            assert method.allocations == (("uniform", "global") if name in both else ("uniform",))
        assert method.takes == (*method.allocations, "sensitivity", "estimated")
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register_method("whole", kind="set", summary="", source="", needs=set(), allocations=("global",))(len)
    assert get_method("whole").takes == ("global",)
    for wrong in ((), ("sensitivity",), ("global", "local")):
        with pytest.raises(RequestError, match=r"allocations are .*; known: uniform, global"):
            registry.register_method("other", kind="set", summary="", source="", needs=set(), allocations=wrong)
    with pytest.raises(RequestError, match="kind is 'list'; a method gives 'scores' or a 'set'"):
        registry.register_method("other", kind="list", summary="", source="", needs=set())


def test_what_a_set_must_hold(stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    answers = {"now": {}}
    registry.register_method(
        "guest", kind="set", summary="", source="", needs=set(), allocations=("uniform", "global")
    )(lambda stats, budget, options: answers["now"])
    layers = sorted(stats.layers)
    config = MoEPrunerConfig(method="guest", num_experts=5, protect={layers[0]: (0, 1, 2, 3, 4)})
    answers["now"] = dict.fromkeys(layers, (0, 1, 2, 3, 4))
    assert build_plan(stats, config).retained == answers["now"]
    answers["now"] = {**answers["now"], layers[0]: (0, 1, 2, 3, 5)}
    with pytest.raises(RunError, match=r"retains \[0, 1, 2, 3, 5\] in layer 0, .* protects \[0, 1, 2, 3, 4\]"):
        build_plan(stats, config)
    everywhere = MoEPrunerConfig(method="guest", num_experts=5, allocation="global")
    answers["now"] = {**dict.fromkeys(layers, (0, 1, 2, 3, 4)), layers[0]: (0, 1, 2, 3, 4, 5)}
    with pytest.raises(
        RunError, match=f"retains {5 * len(layers) + 1} experts, and the budget keeps {5 * len(layers)}"
    ):
        build_plan(stats, everywhere)
    answers["now"] = {**answers["now"], layers[1]: (0, 1, 2, 3)}
    assert build_plan(stats, everywhere).retained == answers["now"]
    answers["now"] = {**answers["now"], layers[1]: (0,)}
    with pytest.raises(RunError, match=rf"retains \[0\] in layer {layers[1]}, where the budget keeps \d or more"):
        build_plan(stats, everywhere)


def test_more_generalists_than_experts_are_refused(stats: CalibrationStats) -> None:
    config = MoEPrunerConfig(method="mosaic", num_experts=4, method_options={"num_generalists": 5})
    with pytest.raises(RequestError, match="num_generalists is 5, and the budget keeps 4 experts in layer 0"):
        build_plan(stats, config)


def test_a_method_of_ones_own(stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @dataclass(frozen=True)
    class Options:
        power: float = 1.0

    @registry.register_method(
        "own", kind="scores", summary="last experts first", source="here", needs={Need.ROUTING}, options=Options
    )
    def own(stats: CalibrationStats, options: Options) -> dict[int, np.ndarray]:
        return {i: np.arange(layer.num_experts) ** options.power for i, layer in stats.layers.items()}

    plan = build_plan(stats, MoEPrunerConfig(method="own", num_experts=3, method_options={"power": "2"}))
    experts = plan.original_num_experts[0]
    assert plan.retained[0] == (experts - 3, experts - 2, experts - 1)
    assert plan.scores[0] == tuple(float(i) ** 2 for i in range(experts))
    with pytest.raises(RequestError, match="'own' is registered already"):
        registry.register_method("own", kind="set", summary="", source="", needs=frozenset())


def test_a_set_of_ones_own_may_come_with_what_is_to_be_said(
    stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    before = build_plan(stats, MoEPrunerConfig(method="random", num_experts=4)).provenance["notes"]
    register = registry.register_method("guest", kind="set", summary="", source="", needs=frozenset())
    register(lambda stats, budget, options: {layer: (0, 1, 2, 3) for layer in budget.num_experts})
    config = MoEPrunerConfig(method="guest", num_experts=4)
    plan = build_plan(stats, config)
    assert set(plan.retained.values()) == {(0, 1, 2, 3)} and plan.scores is None
    assert plan.provenance["notes"] == before and plan.provenance["findings"] == {}

    def answer(stats: CalibrationStats, budget: UniformBudget, options: object) -> Selection:
        scores = {layer: np.arange(count, 0.0, -1.0) for layer, count in stats.num_experts.items()}
        retained = {layer: (0, 1, 2, 3) for layer in budget.num_experts}
        return Selection(retained, scores, ("first", "second", "first"), {"rounds": 3})

    register(answer)
    plan = build_plan(stats, config)
    assert set(plan.retained.values()) == {(0, 1, 2, 3)} and plan.scores[0][0] == stats.num_experts[0]
    assert plan.provenance["notes"] == [*before, "first", "second"]
    assert plan.provenance["findings"] == {"rounds": 3}


def test_a_set_that_does_not_keep_to_the_budget_is_refused(
    stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register_method("greedy_guest", kind="set", summary="", source="", needs=frozenset())(
        lambda stats, budget, options: {layer: (0, 1, 2, 3, 4) for layer in budget.num_experts}
    )
    with pytest.raises(RunError, match=r"'greedy_guest' retains .* in layer 0, where the budget keeps 4 experts"):
        build_plan(stats, MoEPrunerConfig(method="greedy_guest", num_experts=4))


def test_a_search_without_end_is_refused(stats: CalibrationStats) -> None:
    budget = uniform_budget({0: 40}, softmax_rule(2), num_experts=20)
    layer = replace(stats.layers[0], num_experts=40)
    with pytest.raises(RequestError, match="would try 137846528820 sets of 20 experts in layer 0"):
        best_set(layer, 0, 20, budget, SearchOptions(search="exhaustive"))


def test_what_was_done_otherwise_is_said_once_and_kept(
    stats: CalibrationStats, caplog: pytest.LogCaptureFixture
) -> None:
    config = MoEPrunerConfig(method="enumeration", sparsity=0.4, method_options={"max_sets": 5})
    notes = build_plan(stats, config).provenance["notes"]
    assert [note.split()[0] for note in notes if "rounds to" in note] == ["sparsity"]
    assert sum("more than max_sets=5; eliminated greedily" in note for note in notes) == 1
    assert [record.getMessage() for record in caplog.records] == [f"enumeration: {note}" for note in notes]


def test_layers_without_experts_are_named(stats: CalibrationStats) -> None:
    plan = build_plan(stats, MoEPrunerConfig(method="frequency", num_experts=4))
    notes = [note for note in plan.provenance["notes"] if "among equals" not in note]
    expected = [] if stats.model["model_type"] == "mixtral" else ["layers without experts stay as they are: 1"]
    assert notes == expected


def test_methods_of_installed_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class EntryPoint:
        value = "somewhere:method"

        def load(self) -> None:
            loaded.append(True)
            raise ImportError("broken")  # and does no harm

    monkeypatch.setattr(registry, "_entry_points_read", False)
    monkeypatch.setattr(
        registry.importlib.metadata,
        "entry_points",
        lambda group: [EntryPoint()] if group == "optimum_moe_prune.methods" else [],
    )
    list_methods()
    list_methods()
    assert loaded == [True]


def test_super_experts_are_found_and_kept(samples: CalibrationSet) -> None:
    model = make_model()
    blocks = moe_blocks(model)
    frequency = collect(model, samples, {Need.ROUTING}).layers[1].total("routed_tokens")
    rare = int(frequency.argmin())
    assert frequency[rare] > 0
    with torch.no_grad():
        blocks[1].expert_tensors["down_proj"][rare, 5] *= 300  # one channel
    plain = MoEPrunerConfig(method="frequency", num_experts=3)
    protected = MoEPrunerConfig(method="frequency", num_experts=3, protect_super_experts=True)
    stats = collect(model, samples, {Need.ROUTING, Need.ROUTED_NORMS})
    assert rare not in build_plan(stats, plain).retained[1]
    plan = build_plan(stats, protected)
    assert rare in plan.retained[1]
    said, odd = plan.provenance["notes"]
    assert said == f"super experts protected: layer 1: {rare}" and odd.startswith("3 experts cannot be spread evenly")


def with_largest(*layers: np.ndarray) -> CalibrationStats:
    """Statistics in which the largest elements of the experts' outputs are these, each in one of two samples."""
    halves = [np.stack([values * (np.arange(len(values)) % 2 == sample) for sample in (0, 1)]) for values in layers]
    nothing = torch.zeros(0, dtype=torch.int64)
    weights = torch.ones(2, dtype=torch.float64)
    made = {
        index: LayerStats(
            values.shape[1], softmax_rule(1), {"max_element": torch.from_numpy(values)}, weights, nothing
        )
        for index, values in enumerate(halves)
    }
    return CalibrationStats({}, (), made, frozenset(), nothing, nothing, 0, 0)


def test_super_experts_meet_all_three_conditions() -> None:
    ordinary = 1 + np.random.default_rng(0).random(400)

    def layer(values: dict[int, float], scale: float = 1.0) -> np.ndarray:
        found = ordinary * scale
        found[list(values)] = list(values.values())
        return found

    # Of 800 experts the four largest are above the 99.5th percentile, which is the fifth largest here.
    found = super_experts(with_largest(layer({7: 900.0, 8: 800.0, 9: 700.0}), layer({1: 1000.0, 2: 650.0, 3: 600.0})))
    assert found == {0: (7, 8, 9), 1: (1,)}
    # 90 and 100 are among the four largest and far above their layer's median, but not above a tenth of the largest.
    assert super_experts(with_largest(layer({7: 1000.0, 8: 101.0}), layer({1: 100.0, 2: 90.0}))) == {0: (7, 8), 1: ()}
    # Exactly ten times its layer's median is not above it.
    even = np.full(400, 2.0)
    even[0] = 20.0
    assert super_experts(with_largest(even)) == {0: ()}
    # In the second layer most experts are large: 900 is not ten times their median.
    found = super_experts(with_largest(layer({7: 1000.0}), layer({1: 900.0, 2: 901.0}, scale=100)))
    assert found == {0: (7,), 1: ()}


def test_super_experts_are_not_recognised_by_format_1(stats: CalibrationStats, tmp_path: Path) -> None:
    config = MoEPrunerConfig(method="reap", num_experts=4, protect_super_experts=True)
    layers = {
        i: replace(layer, tensors={"max_norm" if n == "max_element" else n: t for n, t in layer.tensors.items()})
        for i, layer in stats.layers.items()
    }
    old = replace(stats, layers=layers)
    for statistics in (old, CalibrationStats.load(old.save(tmp_path / "old"))):
        with pytest.raises(RequestError, match="which statistics of format 1 do not hold"):
            build_plan(statistics, config)
        found = build_plan(statistics, replace(config, protect_super_experts=False))
        assert found.retained == build_plan(stats, replace(config, protect_super_experts=False)).retained


def test_budget_is_what_methods_see() -> None:
    budget = uniform_budget({0: 8, 2: 8}, softmax_rule(2), sparsity=0.25, seed=4)
    assert budget.num_experts == {0: 6, 2: 6} and budget.protected == {0: (), 2: ()} and budget.seed == 4
