# SPDX-License-Identifier: Apache-2.0
"""A budget spread by measured divergences: the best of all ways to spread it, and exactly the budget."""

from __future__ import annotations

import dataclasses
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from oracles import softmax_rule

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig, RequestError, Sensitivity
from optimum_moe_prune.architectures.routers import SoftmaxTopK
from optimum_moe_prune.methods import get_method, registry
from optimum_moe_prune.methods.budget import UniformBudget, global_budget
from optimum_moe_prune.planning.allocation import allocate
from optimum_moe_prune.planning.build import quiet_plan
from optimum_moe_prune.planning.sensitivity import LayerSensitivity, MethodSensitivity, decisive

DATA = Path(__file__).resolve().parent.parent / "data"


def random_costs(rng: np.random.Generator, sizes: list[int], counts: list[list[int]]) -> MethodSensitivity:
    layers = {}
    for layer, (size, measured) in enumerate(zip(sizes, counts, strict=True)):
        kl = {c: {"all": float(rng.integers(0, 20)), "a": float(rng.random()), "b": 1.0} for c in measured}
        layers[layer] = LayerSensitivity(size, {c: tuple(range(c)) for c in measured}, kl)
    return MethodSensitivity({}, layers)


@pytest.mark.parametrize("seed", range(40))
def test_the_allocation_is_the_best_one_and_meets_the_budget(seed: int) -> None:
    """Over every way to spread the budget; a number between two measured ones costs what lies between."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(4, 9, size=4).tolist()
    counts = [sorted(set(rng.integers(2, size, size=1 + seed % 3).tolist())) for size in sizes]
    if seed % 5 == 0:
        counts = [list(range(2, size)) for size in sizes]
    measured = random_costs(rng, sizes, counts)
    weights = None if seed % 4 else {"a": 3.0, "b": 1.0}
    protected = {0: (0, 1, 2), 1: (), 2: (3,), 3: ()}
    least = sum(max(min(c), len(protected[i])) for i, c in enumerate(counts))
    budget = dataclasses.replace(
        global_budget(dict(enumerate(sizes)), softmax_rule(2), total_experts=int(rng.integers(least, sum(sizes)))),
        protected=protected,
    )

    def cost(layer: int, count: int) -> float:
        if count == sizes[layer]:
            return 0.0
        kl = measured.layers[layer].kl
        if count in kl:
            return kl[count]["all"] if weights is None else (3 * kl[count]["a"] + kl[count]["b"]) / 4
        below = max(c for c in kl if c < count)
        above = min(c for c in [*kl, sizes[layer]] if c > count)
        share = (count - below) / (above - below)
        return (1 - share) * cost(layer, below) + share * cost(layer, above)

    choices = [
        range(max(min(measured_counts), len(protected[layer])), size + 1)
        for layer, (measured_counts, size) in enumerate(zip(counts, sizes, strict=True))
    ]
    every = [c for c in itertools.product(*choices) if sum(c) == budget.total]
    best = min(sum(cost(layer, count) for layer, count in enumerate(c)) for c in every)
    found = allocate(measured, budget, weights)
    numbers = tuple(found.num_experts[layer] for layer in range(4))
    assert numbers in every
    assert sum(cost(layer, count) for layer, count in enumerate(numbers)) == pytest.approx(best, abs=1e-9)
    assert found.divergence == pytest.approx(best, abs=1e-9)
    between = [i for i, n in enumerate(numbers) if n != sizes[i] and n not in counts[i]]
    assert list(found.interpolated) == between
    assert allocate(measured, budget, weights) == found


def test_budgets_that_what_was_measured_cannot_keep() -> None:
    measured = random_costs(np.random.default_rng(0), [6, 6], [[4, 5], [4, 5]])
    with pytest.raises(RequestError, match=r"keeps 7 experts, fewer than the smallest numbers measured .*\(8\)"):
        allocate(measured, global_budget({0: 6, 1: 6}, softmax_rule(2), total_experts=7))
    with pytest.raises(RequestError, match="says nothing of layer 2 with its 6 experts"):
        allocate(measured, global_budget({0: 6, 2: 6}, softmax_rule(2), total_experts=9))
    with pytest.raises(RequestError, match="not measured on domain 'c'"):
        allocate(measured, global_budget({0: 6, 1: 6}, softmax_rule(2), total_experts=9), {"c": 1})
    protected = global_budget({0: 6, 1: 6}, softmax_rule(2), total_experts=9, protect={0: (0, 1, 2, 3, 4)})
    assert allocate(measured, protected).num_experts == {0: 5, 1: 4}


@dataclass(frozen=True)
class OnlyEven(SoftmaxTopK):
    """A router that wants an even number of experts."""

    def allows(self, num_experts: int) -> bool:
        return super().allows(num_experts) and num_experts % 2 == 0


def test_a_layer_keeps_only_what_its_rule_allows() -> None:
    measured = random_costs(np.random.default_rng(1), [8, 8, 8], [[2, 5], [3, 6], [4, 7]])
    budget = dataclasses.replace(
        global_budget({0: 8, 1: 8, 2: 8}, softmax_rule(2), total_experts=16), rule=OnlyEven(2, True, False)
    )
    counts = allocate(measured, budget).num_experts
    assert sum(counts.values()) == 16 and all(count % 2 == 0 for count in counts.values())
    with pytest.raises(RequestError, match="do not add up to it; ask for a total of 16 or 18"):
        allocate(measured, dataclasses.replace(budget, total=17))


def test_large_models_take_seconds() -> None:
    counts = [8, *range(15, 256, 20)]
    measured = random_costs(np.random.default_rng(2), [256] * 60, [counts] * 60)
    budget = global_budget(dict.fromkeys(range(60), 256), softmax_rule(8), sparsity=0.1)
    started = time.perf_counter()
    found = allocate(measured, budget)
    assert time.perf_counter() - started < 10
    assert sum(found.num_experts.values()) == budget.total == 13_824


def uniform(stats: CalibrationStats, recipe: MoEPrunerConfig, counts: dict[int, int]) -> UniformBudget:
    """The budget of a number for each layer that the recipe prunes."""
    return UniformBudget(
        {layer: stats.num_experts[layer] for layer in counts},
        sum(counts.values()),
        stats.routing,
        {layer: tuple(recipe.protect.get(layer, ())) for layer in counts},
        num_experts=counts,
    )


def sparse_sensitivity(stats: CalibrationStats, recipe: MoEPrunerConfig, counts: tuple[int, ...]) -> Sensitivity:
    """What a measurement of few numbers of experts would give: the method's own sets, and made-up divergences."""
    pruned = [layer for layer in stats.num_experts if layer not in recipe.skip_layers]
    layers = {layer: LayerSensitivity(stats.num_experts[layer]) for layer in pruned}
    for count in counts:
        budget = uniform(stats, recipe, dict.fromkeys(pruned, count))
        selection = get_method(recipe.method).select(stats, budget, recipe.options())
        for layer, entry in layers.items():
            entry.retained[count] = selection.retained[layer]
            entry.kl[count] = {"all": (16 - count) ** 2 / (layer + 1)}
    methods = {recipe.method: MethodSensitivity(decisive(recipe), layers)}
    return Sensitivity(stats.model, {"all": 1}, methods, provenance={"calibration": stats.fingerprint})


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    return CalibrationStats.load(DATA / "statistics_qwen2_moe")


@pytest.mark.parametrize("method", ["enumeration", "soft_frequency", "mosaic"])
@pytest.mark.parametrize("settings", [{}, {"protect": {3: (1, 2, 5, 7, 11, 13)}, "skip_layers": (1,)}])
def test_every_budget_is_met_and_the_method_chooses_at_the_exact_numbers(
    stats: CalibrationStats, method: str, settings: dict[str, Any]
) -> None:
    recipe = MoEPrunerConfig(method=method, allocation="sensitivity", **settings)
    sensitivity = sparse_sensitivity(stats, recipe, (6, 9, 14) if settings else (4, 9, 14))
    pruned = sensitivity.methods[method].layers
    least = sum(min(entry.kl) for entry in pruned.values())
    step = 1 if method == "soft_frequency" else 9
    for total in range(least, 16 * len(pruned), step):
        plan = quiet_plan(stats, dataclasses.replace(recipe, total_experts=total), sensitivity=sensitivity)
        counts = {layer: plan.num_experts[layer] for layer in pruned}
        assert sum(counts.values()) == total
        assert all(plan.num_experts[layer] == 16 for layer in recipe.skip_layers)
        chosen = get_method(method).select(stats, uniform(stats, recipe, counts), recipe.options()).retained
        assert {layer: plan.retained[layer] for layer in pruned} == chosen
        between = [layer for layer, count in counts.items() if count not in (*pruned[layer].kl, 16)]
        assert any(f"estimate: in {len(between)} of" in n for n in plan.provenance["notes"]) == bool(between)
        assert plan.provenance["findings"].get("layers with interpolated divergences", 0) == len(between)
    with pytest.raises(RequestError, match=rf"keeps {least - 1} (of the 80 experts|experts, fewer than)"):
        budget = dataclasses.replace(recipe, total_experts=least - 1)
        quiet_plan(stats, budget, sensitivity=sensitivity)


def test_sets_that_were_measured_stay(stats: CalibrationStats) -> None:
    """Paths see all layers, so what a layer keeps depends on the others; the divergence is of the measured set."""
    recipe = MoEPrunerConfig(method="pathfinder", allocation="sensitivity")
    sensitivity = sparse_sensitivity(stats, recipe, (4, 9, 14))
    layers = sensitivity.methods["pathfinder"].layers
    for total in range(4 * len(layers), 16 * len(layers), 3):
        plan = quiet_plan(stats, dataclasses.replace(recipe, total_experts=total), sensitivity=sensitivity)
        assert sum(plan.num_experts.values()) == total
        for layer, experts in plan.retained.items():
            assert layers[layer].retained.get(len(experts), experts) == experts


def test_what_is_to_be_said_of_a_search_is_said_of_measured_sets_too(stats: CalibrationStats) -> None:
    options = {"max_sets": 3, "search": "auto"}
    recipe = MoEPrunerConfig(method="enumeration", allocation="sensitivity", method_options=options)
    sensitivity = sparse_sensitivity(stats, recipe, (8, 16))
    plan = quiet_plan(stats, dataclasses.replace(recipe, total_experts=8 * len(stats.layers)), sensitivity=sensitivity)
    assert "layers with interpolated divergences" not in plan.provenance["findings"]
    assert any("eliminated greedily" in note for note in plan.provenance["notes"])


def test_a_method_is_not_given_numbers_that_it_refuses(
    stats: CalibrationStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(budget: UniformBudget, options: Any) -> None:
        if refused := {5, 7, 8, 11, 13} & set(budget.num_experts.values()):
            raise RequestError(f"not {refused}")

    particular = dataclasses.replace(get_method("soft_frequency"), check=check)
    monkeypatch.setitem(registry._METHODS, "soft_frequency", particular)
    recipe = MoEPrunerConfig(method="soft_frequency", allocation="sensitivity")
    sensitivity = sparse_sensitivity(stats, recipe, (4, 9, 14))
    numbers = {4, 6, 9, 10, 12, 14, 15, 16}
    totals = {sum(counts) for counts in itertools.combinations_with_replacement(numbers, len(stats.layers))}
    kept = set()
    for total in range(4 * len(stats.layers), 16 * len(stats.layers)):
        config = dataclasses.replace(recipe, total_experts=total)
        if total not in totals:
            with pytest.raises(RequestError, match=rf"keeps {total} experts.* do not add up to it"):
                quiet_plan(stats, config, sensitivity=sensitivity)
            continue
        plan = quiet_plan(stats, config, sensitivity=sensitivity)
        assert sum(plan.num_experts.values()) == total
        kept |= set(plan.num_experts.values())
    assert kept == numbers
