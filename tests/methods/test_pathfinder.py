# SPDX-License-Identifier: Apache-2.0
"""Pathfinder and its ablations against formulas written out anew and all paths of a small model."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from oracles import straight_loop

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPrunerConfig, Need, RequestError
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.methods.budget import global_budget
from optimum_moe_prune.methods.path_selection import entropy_shares, on_best_paths, sample_weights
from optimum_moe_prune.methods.pathfinder import log_importance, log_transitions
from optimum_moe_prune.planning.build import build_plan

NEEDS = {Need.ROUTING, Need.DENSE_NORMS, Need.SINGLE_ERROR, Need.COACTIVATION}


@pytest.fixture
def stats(kind: str, samples: CalibrationSet) -> CalibrationStats:
    return collect(make_model(kind), samples, NEEDS)


def factors(kind: str, samples: CalibrationSet, sample: int, tau: float, conditional: bool) -> tuple[list, list]:
    """Importances and transitions of one sample from statistics of single tokens, by the paper's formulas."""
    tables = straight_loop(make_model(kind), samples)
    layers, tokens = sorted(tables), samples.samples[sample].num_tokens

    def of(layer: int, name: str) -> list[float]:
        return tables[layer][name][sample].tolist()

    importance = []
    for layer in layers:
        output = math.sqrt(of(layer, "output_energy")[0])
        weight = [math.exp(-math.sqrt(error) / output / tau) for error in of(layer, "single_error")]
        importance.append([w / sum(weight) for w in weight])
    transitions = []
    for here, following in itertools.pairwise(layers):
        strength = [norm / tokens for norm in of(here, "dense_norm")]
        mean = [p / tokens for p in of(following, "probability")]
        table = []
        for i, a in enumerate(strength):
            routed = of(here, "routed_tokens")[i]
            row = of(following, "coactivation")[i]
            table.append([a * (c / routed if conditional and routed else p) for p, c in zip(mean, row, strict=True)])
        transitions.append(table)
    return importance, transitions


@pytest.mark.parametrize("conditional", [False, True])
@torch.no_grad()
def test_factors_are_those_of_the_formulas(
    kind: str, stats: CalibrationStats, samples: CalibrationSet, conditional: bool
) -> None:
    nodes = log_importance(stats, tau=0.4)
    edges = log_transitions(stats, "conditional" if conditional else "mean")
    for sample in (0, 5):
        importance, transitions = factors(kind, samples, sample, 0.4, conditional)
        for found, expected in zip([layer[sample] for layer in nodes], importance, strict=True):
            np.testing.assert_allclose(np.exp(found), expected, rtol=1e-4)
        for found, expected in zip(edges(sample), transitions, strict=True):
            np.testing.assert_allclose(np.exp(found), expected, rtol=1e-4)
    for layer, values in zip(sorted(stats.layers), nodes, strict=True):
        p = np.exp(values)
        entropy = -(p * np.log(p)).sum(1).mean() / math.log(p.shape[1])
        assert entropy_shares([layer], [values]) == {str(layer): pytest.approx(entropy, abs=1e-4)}
    config = MoEPrunerConfig(method="importance", sparsity=0.3, method_options={"tau": 0.4})
    found = build_plan(stats, config).provenance["findings"]["importance_entropy"]
    assert found == entropy_shares(sorted(stats.layers), nodes)
    without = build_plan(stats, replace(config, method="transition", method_options={}))
    assert "importance_entropy" not in without.provenance["findings"]


def brute_force(
    stats: CalibrationStats, weights: list[list[np.ndarray]], total: int, floor: int, most: int
) -> dict[int, tuple[int, ...]]:
    """The choice by listing all paths of each sample, with sets and counters."""
    layers = sorted(stats.layers)
    counts = [stats.num_experts[layer] for layer in layers]
    ranked = []
    best: dict[tuple[int, int], float] = {}
    total_weight: Counter = Counter()
    for nodes, edges in weights:
        paths = []
        for path in itertools.product(*map(range, counts)):
            weight = sum(n[e] for n, e in zip(nodes, path, strict=True))
            weight += sum(t[pair] for t, pair in zip(edges, itertools.pairwise(path), strict=True))
            paths.append((-weight, path))
        paths.sort()
        ranked.append([path for _, path in paths[:most]])
        through: dict[tuple[int, int], float] = {}
        for weight, path in paths:
            for expert in enumerate(path):
                through[expert] = max(through.get(expert, -math.inf), paths[0][0] - weight)
        for expert, value in through.items():
            best[expert] = max(best.get(expert, -math.inf), value)
            total_weight[expert] += math.exp(value)

    def union(m: int) -> set[tuple[int, int]]:
        return {expert for paths in ranked for path in paths[:m] for expert in enumerate(path)}

    def size(m: int) -> int:
        held = Counter(column for column, _ in union(m))
        return sum(max(floor, held[column]) for column in range(len(counts)))

    grown = max((m for m in range(1, most + 1) if size(m) <= total), default=0)
    inside = union(grown) if grown else set()
    participation = Counter(
        expert for paths in ranked for path in paths[: min(grown + 1, most)] for expert in enumerate(path)
    )

    def key(expert: tuple[int, int]) -> tuple:
        column, number = expert
        ties = -round(best[expert], 9), -round(total_weight[expert], 9), number, column
        return expert not in inside, -participation[expert], *ties

    order = sorted(((c, e) for c, count in enumerate(counts) for e in range(count)), key=key)
    kept = [x for column in range(len(counts)) for x in [o for o in order if o[0] == column][:floor]]
    kept += [expert for expert in order if expert not in kept][: total - len(kept)]
    return {layer: tuple(sorted(e for c, e in kept if c == column)) for column, layer in enumerate(layers)}


@pytest.mark.parametrize("sparsity", [0.2, 0.4, 0.55])
@pytest.mark.parametrize("most", [1, 8, 60])
@pytest.mark.parametrize("method", ["pathfinder", "transition", "importance", "conditional"])
def test_the_choice_is_that_of_listing_all_paths(
    kind: str, stats: CalibrationStats, method: str, most: int, sparsity: float
) -> None:
    options: dict[str, object] = {"num_paths": most} | ({} if method == "importance" else {"ends": "inner"})
    if method == "conditional":
        method, options["transitions"] = "pathfinder", "conditional"
    plan = build_plan(stats, MoEPrunerConfig(method=method, sparsity=sparsity, method_options=options))
    budget = global_budget(stats.num_experts, stats.routing, sparsity=sparsity)
    nodes = log_importance(stats)
    edges = log_transitions(stats, options.get("transitions", "mean"))
    weights = []
    for sample in range(len(stats.samples)):
        v, t = [layer[sample] for layer in nodes], edges(sample)
        if method == "transition":
            v = [np.zeros_like(layer) for layer in v]
        if method == "importance":
            t = [np.zeros_like(table) for table in t]
        weights.append((v, t))
    assert plan.retained == brute_force(stats, weights, budget.total, budget.floor, most)
    found = plan.provenance["findings"]
    assert found["samples"] == len(stats.samples) and f"paths_per_sample {found['paths_per_sample']}" in plan.summary()
    trimmed = any("the single best paths of" in note for note in plan.provenance["notes"])
    assert trimmed == (found["paths_per_sample"] == 0)


def test_uniform_allocation_keeps_the_same_everywhere_in_the_same_order(stats: CalibrationStats) -> None:
    config = MoEPrunerConfig(method="pathfinder", sparsity=0.4, allocation="uniform")
    plan = build_plan(stats, config)
    assert plan.uniform_num_experts is not None
    unequal = build_plan(stats, replace(config, allocation=None))
    for layer, kept in plan.retained.items():  # one order within a layer: the smaller set is in the larger one
        small, large = sorted((kept, unequal.retained[layer]), key=len)
        assert set(small) <= set(large)


def test_protected_experts_and_skipped_layers_come_first(stats: CalibrationStats) -> None:
    top_k, layers = stats.model["top_k"], sorted(stats.layers)
    config = MoEPrunerConfig(method="pathfinder", sparsity=0.4, skip_layers=(layers[1],))
    plan = build_plan(stats, config)
    assert plan.num_experts[layers[1]] == stats.num_experts[layers[1]]
    last = max(set(range(stats.num_experts[layers[0]])) - set(plan.retained[layers[0]]), default=0)
    protected = build_plan(stats, replace(config, protect={layers[0]: (last,)}))
    assert last in protected.retained[layers[0]]
    assert sum(protected.num_experts.values()) == sum(plan.num_experts.values())
    least = build_plan(stats, MoEPrunerConfig(method="pathfinder", num_experts=top_k))
    assert set(least.num_experts.values()) == {top_k}


def test_a_layer_that_gives_nothing_leaves_experts_equal() -> None:
    """Outputs of 0 make a uniform importance and no transition; the method still chooses."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.zero_()
    samples = CalibrationSet.build(make_texts(), make_tokenizer())
    stats = collect(model, samples, NEEDS)
    np.testing.assert_allclose(np.exp(log_importance(stats, tau=0.1)[1]), 1 / 8)
    # A factor that is the same for all says nothing: the others decide as if it were not there.
    plan = build_plan(stats, MoEPrunerConfig(method="transition", sparsity=0.5))
    assert not any("no path" in note for note in plan.provenance["notes"])
    stats.layers[1].tensors["dense_norm"].fill_(3.0)
    assert build_plan(stats, MoEPrunerConfig(method="transition", sparsity=0.5)).retained == plan.retained


def test_an_expert_that_is_never_active_is_on_no_path(stats: CalibrationStats) -> None:
    first = min(stats.layers)
    stats.layers[first].tensors["dense_norm"][:, 2] = 0
    plan = build_plan(stats, MoEPrunerConfig(method="transition", sparsity=0.3))
    assert 2 not in plan.retained[first]


def test_numbering_does_not_matter(stats: CalibrationStats) -> None:
    """Experts numbered the other way round: the same ones are kept, where they differ at all."""
    layers = {}
    for index, layer in stats.layers.items():
        tensors = {name: tensor.flip(-1) for name, tensor in layer.tensors.items()}
        tensors["coactivation"] = tensors["coactivation"].flip(-2)
        layers[index] = replace(layer, tensors=tensors)
    mirrored = replace(stats, layers=layers)
    for method in ("pathfinder", "transition", "importance"):
        for sparsity in (0.2, 0.4, 0.55):
            for options in ({"num_paths": 1}, {"num_paths": 60}):
                config = MoEPrunerConfig(method=method, sparsity=sparsity, method_options=options)
                expected = build_plan(stats, config).retained
                found = build_plan(mirrored, config).retained
                last = {layer: stats.num_experts[layer] - 1 for layer in found}
                assert expected == {i: tuple(sorted(last[i] - e for e in found[i])) for i in found}


def test_domains_of_equal_weight_count_the_same_whatever_their_lengths() -> None:
    long, short = make_texts(8, length=(40, 40)), make_texts(24, seed=5, length=(4, 4))
    records = [r for r in long if r["domain"] == "low"] + [r for r in short if r["domain"] == "high"]
    stats = collect(make_model(), CalibrationSet.build(records, make_tokenizer()), NEEDS)
    for weights in ({"low": 1.0, "high": 1.0}, {"low": 3.0, "high": 1.0}):
        found = sample_weights(stats.with_domain_weights(weights))
        mass = {d: found[[s.domain == d for s in stats.samples]].sum() for d in weights}
        assert mass["low"] / mass["high"] == pytest.approx(weights["low"] / weights["high"])
        assert found.mean() == pytest.approx(1.0)
    assert (sample_weights(stats) == 1).all()


def test_domains_count_with_their_weights() -> None:
    samples = CalibrationSet.build(make_texts(12), make_tokenizer())
    stats = collect(make_model(), samples, NEEDS)
    config = MoEPrunerConfig(method="pathfinder", sparsity=0.5, method_options={"num_paths": 1, "ends": "inner"})
    for domain in ("low", "high"):
        weights = {"low": 1e-6, "high": 1e-6} | {domain: 1.0}
        nodes = log_importance(stats)
        edges = log_transitions(stats, "mean")
        budget = global_budget(stats.num_experts, stats.routing, sparsity=0.5)
        weighted = on_best_paths(stats.with_domain_weights(weights), budget, nodes, edges, 1).retained
        assert weighted == build_plan(stats, config, weights).retained
        used = Counter(
            (column, int(node))
            for sample, entry in enumerate(stats.samples)
            if entry.domain == domain
            for column, node in enumerate(best_path([n[sample] for n in nodes], edges(sample)))
        )
        for column, layer in enumerate(sorted(stats.layers)):
            counts = [used[column, expert] for expert in range(8)]
            kept = min(counts[e] for e in weighted[layer])
            assert all(counts[e] <= kept or e in weighted[layer] for e in range(8))


def best_path(nodes: list[np.ndarray], edges: list[np.ndarray]) -> tuple[int, ...]:
    def weight(path: tuple[int, ...]) -> float:
        on_edges = sum(t[pair] for t, pair in zip(edges, itertools.pairwise(path), strict=True))
        return sum(n[e] for n, e in zip(nodes, path, strict=True)) + on_edges

    return max(itertools.product(*(range(len(n)) for n in nodes)), key=weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_paths": 0}, "num_paths is 0; there must be at least 1"),
        ({"num_paths": 10_001}, "num_paths is 10001; there must be at least 1 and at most 10000"),
        ({"tau": 0.0}, r"tau is 0.0; it must be between 1e-6 and 1e6"),
        ({"tau": -1.0}, r"tau is -1.0; it must be between"),
        ({"tau": math.inf}, "tau is inf; it must be between"),
        ({"tau": math.nan}, "tau is nan; it must be between"),
        ({"tau": 1e-310}, "it must be between"),
        ({"transitions": "median"}, "'transitions' of method 'pathfinder' is 'median'; it takes 'mean' or 'condition"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        MoEPrunerConfig(method="pathfinder", sparsity=0.5, method_options=options)


def test_conditional_transitions_need_their_statistics(samples: CalibrationSet) -> None:
    stats = collect(make_model(), samples, NEEDS - {Need.COACTIVATION})
    config = MoEPrunerConfig(method="pathfinder", sparsity=0.5, method_options={"transitions": "conditional"})
    with pytest.raises(RequestError, match="method 'pathfinder' needs the statistics coactivation"):
        build_plan(stats, config)
