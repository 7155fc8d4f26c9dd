# SPDX-License-Identifier: Apache-2.0
"""One generalist by single-expert errors: the losses of the replay of one retained expert, and no Gram matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import softmax_rule
from synthetic import random_statistics

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig, Need, RequestError, RunError
from optimum_moe_prune.architectures.routers import RoutingRule, SoftmaxTopK
from optimum_moe_prune.architectures.rules import SparseMixer, TopK
from optimum_moe_prune.methods.generalists import best_alone, losses_alone
from optimum_moe_prune.methods.replay import reconstruction_loss, squared_errors
from optimum_moe_prune.methods.replay_search import Replay
from optimum_moe_prune.planning.build import quiet_plan
from optimum_moe_prune.statistics.stats import LayerStats

RULES: list[RoutingRule] = [
    SoftmaxTopK(2, True, False),
    SoftmaxTopK(2, False, False),
    SparseMixer(2, 0.1),
    TopK(3, score="sigmoid", epsilon=1e-3, scale=2.5, bias=(0.3, -0.2, 0.0, 0.5, 0.1, 0.0)),
    TopK(2, score="sigmoid", renormalise=False, scale=(1.0, 2.0, 0.5, 1.5, 1.0, 3.0)),
    TopK(2, score="sqrtsoftplus"),
    TopK(2, score="softmax", renormalise=False, multiplier=0.5),
    TopK(2, score="sigmoid", on_input=True),
    TopK(2, score="sigmoid", groups=2, top_groups=1, group_score="max"),
]


def layer_of(rule: RoutingRule, experts: int = 6, tokens: int = 40) -> LayerStats:
    """A layer of random outputs: what is kept of its tokens, by the definitions."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(tokens, experts, generator=generator)
    outputs = torch.randn(tokens, experts, 5, generator=generator).double() * torch.linspace(1, 2, experts)[:, None]
    whole = torch.einsum("te,teh->th", rule.weights(logits), outputs)
    alone = rule.lone_weights(logits).double()[:, :, None] * outputs
    rows, columns = torch.triu_indices(experts, experts)
    tensors = {
        "logits": logits,
        "gram": (outputs @ outputs.transpose(1, 2))[:, rows, columns],
        "token_single_error": (alone - whole[:, None]).square().sum(-1),
    }
    weights = 0.5 + torch.rand(4, generator=generator).double()
    sample = torch.randint(0, 4, (tokens,), generator=generator)
    return LayerStats(experts, rule, tensors, torch.ones(4).double(), sample, root_weights=weights)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_loss_of_an_expert_alone_is_that_of_its_replay(rule: RoutingRule) -> None:
    layer = layer_of(rule)
    gram, logits = layer.tensors["gram"], layer.tensors["logits"]
    expected = torch.stack(
        [
            reconstruction_loss(squared_errors(logits, gram, rule, (e,)), layer.token_sample, layer.loss_weights)
            for e in range(6)
        ]
    )
    torch.testing.assert_close(losses_alone(layer), expected, rtol=1e-6, atol=1e-9)
    if rule.groups == 1:
        replay = Replay(logits, gram, rule, layer.token_sample, layer.loss_weights)
        assert best_alone(layer).retained == replay.best_set(1) == (int(expected.argmin()),)


def without_gram(stats: CalibrationStats) -> CalibrationStats:
    """The statistics as a calibration for the default Mosaic leaves them, as far as tokens go."""
    layers = {
        index: replace(layer, tensors={name: t for name, t in layer.tensors.items() if name != "gram"})
        for index, layer in stats.layers.items()
    }
    return replace(stats, layers=layers, needs=stats.needs - {Need.GRAM})


@pytest.mark.parametrize("method", ["mosaic", "variability"])
@pytest.mark.parametrize("weights", [None, {"a": 1.0, "b": 9.0}])
def test_one_generalist_needs_no_gram_matrices(method: str, weights: dict[str, float] | None) -> None:
    stats = random_statistics(softmax_rule(2), 2, 8)
    for protect in ({}, {0: (1, 6)}):
        recipe = MoEPrunerConfig(method=method, num_experts=5, method_options={"num_generalists": 1}, protect=protect)
        plan = quiet_plan(without_gram(stats), recipe, weights)
        assert plan.retained == quiet_plan(stats, recipe, weights).retained
        for index, layer in stats.with_domain_weights(weights).layers.items():
            replay = Replay(*(layer.tensors[name] for name in ("logits", "gram")), layer.routing,
                            layer.token_sample, layer.loss_weights)  # fmt: skip
            assert set(protect.get(index) or replay.best_set(1)) <= set(plan.retained[index])


@pytest.mark.parametrize("options", [{"num_generalists": 2}, {"num_generalists": 1, "search": "greedy"}], ids=str)
def test_sets_of_several_experts_do(options: dict[str, Any]) -> None:
    stats = random_statistics(softmax_rule(2), 1, 8)
    recipe = MoEPrunerConfig(method="mosaic", num_experts=5, method_options=options)
    quiet_plan(stats, recipe)
    with pytest.raises(RequestError, match="needs the statistics gram"):
        quiet_plan(without_gram(stats), recipe)


def test_equal_experts_are_tied() -> None:
    layer = layer_of(softmax_rule(2))
    error = torch.tensor([4.0, 2.0, 3.0, 2.0, 5.0, 2.0]).expand(40, 6)
    found = best_alone(replace(layer, tensors={**layer.tensors, "token_single_error": error}))
    assert (found.retained, found.tied) == ((1,), (1, 3, 5))
    assert best_alone(layer).tied == ()


def test_what_cannot_be_told_is_refused() -> None:
    layer = layer_of(softmax_rule(2))
    shared = replace(layer, routing=TopK(2, score="sigmoid", fixed=1, shared=True))
    with pytest.raises(RequestError, match="shared experts take part in the choice"):
        best_alone(shared)
    broken = layer.tensors["token_single_error"].clone()
    broken[3, 2] = torch.nan
    with pytest.raises(RunError, match="NaN"):
        best_alone(replace(layer, tensors={**layer.tensors, "token_single_error": broken}))


def test_nothing_is_said_of_a_search_where_every_expert_was_looked_at() -> None:
    stats = random_statistics(softmax_rule(2), 1, 8)
    options = {"num_generalists": 1, "max_sets": 3}
    plan = quiet_plan(stats, MoEPrunerConfig(method="variability", num_experts=5, method_options=options))
    assert not any("eliminated" in note for note in plan.provenance["notes"])
