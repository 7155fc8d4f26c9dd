# SPDX-License-Identifier: Apache-2.0
"""Where only the numbers of experts decided between them, every method says so; and nowhere else."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import softmax_rule
from synthetic import GroupedTopK, Tokens, random_statistics, statistics_of

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig, list_methods
from optimum_moe_prune.methods import registry
from optimum_moe_prune.methods.budget import global_budget, uniform_budget
from optimum_moe_prune.methods.sets import differing
from optimum_moe_prune.methods.ties import alike, tied_by_keys
from optimum_moe_prune.planning.build import quiet_plan

TWINS = (2, 5)
READING = sorted(set(list_methods()) - {"auto", "random"})


def with_twins() -> CalibrationStats:
    """Statistics that stay the same if experts 2 and 5 change places: each token is there in both ways."""
    generator = torch.Generator().manual_seed(1)
    swapped = [TWINS[1] if e == TWINS[0] else TWINS[0] if e == TWINS[1] else e for e in range(8)]

    def sample() -> Tokens:
        logits = 2 * torch.randn(3, 30, 8, generator=generator)
        outputs = torch.randn(3, 30, 8, 5, generator=generator)
        outputs *= 1 + torch.rand(8, 1, generator=generator)
        inputs = torch.randn(3, 30, 5, generator=generator)
        return Tokens(
            torch.cat([logits, logits[..., swapped]], dim=1),
            torch.cat([outputs, outputs[:, :, swapped]], dim=1),
            torch.cat([inputs, inputs], dim=1),
        )

    return statistics_of([("a", sample()), ("b", sample()), ("a", sample())], softmax_rule(2))


@pytest.fixture(scope="module")
def twins() -> CalibrationStats:
    return with_twins()


def options_of(method: str) -> list[dict[str, Any]]:
    return {
        "mosaic": [{}, {"num_domains": 12}, {"num_domains": 2}, {"ward": "distances", "num_generalists": 0}],
        "enumeration": [{}, {"search": "greedy"}],
        "variability": [{}, {"num_generalists": 2}, {"num_generalists": 2, "search": "greedy"}],
        "pathfinder": [{}, {"transitions": "conditional"}],
    }.get(method, [{}])


@pytest.mark.parametrize("method", READING)
def test_twins_of_which_one_stays_are_said_to_be_tied(twins: CalibrationStats, method: str) -> None:
    parted = 0
    counts = (3, 5) if method == "mosaic" else range(2, 8)
    for options, count in itertools.product(options_of(method), counts):
        for allocation in registry.get_method(method).allocations:
            recipe = MoEPrunerConfig(
                method=method, num_experts=count, method_options=options, allocation=allocation, seed=1
            )
            plan = quiet_plan(twins, recipe)
            ties = plan.provenance["findings"].get("ties", {})
            for layer, experts in plan.retained.items():
                if len(set(TWINS) & set(experts)) == 1:
                    parted += 1
                    assert set(TWINS) <= set(ties.get(str(layer), ())), (options, count, allocation, layer)
            said = [note for note in plan.provenance["notes"] if "among equals" in note]
            assert len(said) == bool(ties)
            if ties:
                assert f"in {len(ties)} of 3 layers" in said[0] and str(sum(map(len, ties.values()))) in said[0]
    assert parted, "the test shows nothing"


@pytest.mark.parametrize("method", sorted({*READING} - {"frequency"}))  # numbers of tokens may well be equal
def test_experts_that_differ_are_never_tied(method: str) -> None:
    stats = random_statistics(softmax_rule(2), 3, 8)
    for options, count in itertools.product(options_of(method), (3, 5)):
        if options.get("num_domains") is None and method == "mosaic":
            continue  # few ranks do tie
        plan = quiet_plan(stats, MoEPrunerConfig(method=method, num_experts=count, method_options=options))
        assert "ties" not in plan.provenance["findings"], (options, count)


def test_a_random_choice_has_no_ties(twins: CalibrationStats) -> None:
    assert quiet_plan(twins, MoEPrunerConfig(method="random", num_experts=4)).provenance["findings"] == {}


def scored(monkeypatch: pytest.MonkeyPatch, *rows: list[float]) -> None:
    """A method ``given`` with these scores, by layer."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    registry.register_method(
        "given", kind="scores", summary="", source="", needs=frozenset(), tie_advice="look closer"
    )(lambda stats, options: {layer: np.array(row) for layer, row in enumerate(rows)})


def test_scores_tie_across_the_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = random_statistics(softmax_rule(1), 3, 6)
    third = 1 / 3
    scored(
        monkeypatch,
        [3.0, 1.0, 2.0, 2.0, 1.0, 2.0],  # the line goes through the twos
        [5.0, 5.0, 5.0, 1.0, 1.0, 1.0],  # and here between fives and ones
        [0.1 + 0.2, 9.0, 0.3, 8.0, 0.3 * (1 - 1e-8), third],  # 0.30000000000000004 is 0.3 but for rounding
    )
    plan = quiet_plan(stats, MoEPrunerConfig(method="given", num_experts=3))
    assert plan.retained == {0: (0, 2, 3), 1: (0, 1, 2), 2: (1, 3, 5)}
    assert plan.provenance["findings"] == {"ties": {"0": [2, 3, 5]}}
    assert plan.provenance["notes"][-1] == (
        "the choice was among equals in 1 of 3 layers (0): 3 experts are equally good there by this method, and only "
        "the order of their numbers decided which of them stay; look closer"
    )
    plan = quiet_plan(stats, MoEPrunerConfig(method="given", num_experts=4))
    assert plan.provenance["findings"] == {"ties": {"1": [3, 4, 5], "2": [0, 2]}}
    # What is protected, or in a layer that is skipped, was not chosen.
    recipe = MoEPrunerConfig(method="given", num_experts=4, protect={1: (3,)}, skip_layers=(2,))
    assert "ties" not in quiet_plan(stats, recipe).provenance["findings"]


def test_a_budget_for_the_whole_model_ties_between_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = random_statistics(softmax_rule(1), 2, 4)
    scored(monkeypatch, [4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0])
    recipe = MoEPrunerConfig(method="given", total_experts=5, allocation="global")
    plan = quiet_plan(stats, recipe)
    assert plan.num_experts == {0: 3, 1: 2}
    assert plan.provenance["findings"] == {"ties": {"0": [2], "1": [2]}}
    plan = quiet_plan(stats, replace(recipe, total_experts=6))
    assert plan.provenance["findings"] == {}
    # An expert that its layer keeps in any case is not exchanged for one of another layer.
    keys = {0: [-1.0, 0.0, 0.0, 0.0], 1: [-1.0, -1.0, -1.0, -1.0]}
    budget = global_budget({0: 4, 1: 4}, softmax_rule(1), total_experts=2)
    assert tied_by_keys(keys, budget, {0: (0,), 1: (0,)}) == {1: (0, 1, 2, 3)}


def test_groups_are_chosen_from_by_themselves() -> None:
    rule = GroupedTopK(top_k=2, groups=2, top_groups=1, best=1)
    budget = uniform_budget({0: 6}, rule, num_experts=4)
    key = [0.0, 0.0, 1.0, 1.0, 0.0, 2.0]  # (0, 0, 1) and (1, 0, 2): each keeps two, and nothing ties
    assert tied_by_keys({0: key}, budget, {0: (0, 1, 3, 4)}) == {}
    key = [0.0, 1.0, 1.0, 1.0, 0.0, 2.0]
    assert tied_by_keys({0: key}, budget, {0: (0, 1, 3, 4)}) == {0: (1, 2)}


def test_keys_that_are_equal_but_for_rounding() -> None:
    assert alike(0.1 + 0.2, 0.3) and not alike(0.3, 0.3 + 1e-8) and alike(0.0, 0.0) and not alike(0.0, 1e-300)
    assert alike((False, -1.0, float("-inf")), (False, -1.0 - 1e-12, float("-inf")))
    assert not alike((False, 1.0), (True, 1.0))
    assert differing([(0, 1, 2), (0, 2, 3)]) == (1, 3) and differing([(4, 5)]) == ()
