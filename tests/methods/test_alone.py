# SPDX-License-Identifier: Apache-2.0
"""The importance of experts, and what else may weigh on Pathfinder's paths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model
from scipy.special import log_softmax
from synthetic import random_statistics

from optimum_moe_prune import CalibrationSet, MoEPrunerConfig, Need, RequestError
from optimum_moe_prune.architectures.routers import RoutingRule, SoftmaxTopK
from optimum_moe_prune.architectures.rules import TopK
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.methods.alone import explained, log_importance
from optimum_moe_prune.methods.path_selection import find_outliers
from optimum_moe_prune.methods.pathfinder import log_probabilities, log_strengths
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.statistics.stats import LayerStats

NEEDS = {Need.ROUTING, Need.DENSE_NORMS, Need.SINGLE_ERROR}


def layer_of(rule: RoutingRule, size: float = 1.0) -> tuple[LayerStats, np.ndarray]:
    """Statistics of random outputs of two samples, and the share of the energy that each expert explains."""
    generator = torch.Generator().manual_seed(1)
    y = size * torch.randn(30, 6, 5, generator=generator, dtype=torch.float64)
    logits = 2 * torch.randn(30, 6, generator=generator)
    sample = torch.arange(30) % 2
    whole = (rule.weights(logits)[..., None] * y).sum(1)
    alone = rule.lone_weights(logits).double()[..., None] * y
    tensors = {
        "token_dense_norm": y.norm(dim=-1).float(),
        "token_single_error": (alone - whole[:, None]).square().sum(-1).float(),
        "token_output_energy": whole.square().sum(-1, keepdim=True).float(),
        "logits": logits,
    }
    shares = np.zeros((2, 6))
    for s in range(2):
        energy = 0.0
        for t in (sample == s).nonzero().flatten().tolist():
            energy += float(whole[t] @ whole[t])
            for e in range(6):
                best = max(0.0, float(y[t, e] @ whole[t]) / float(y[t, e] @ y[t, e]))
                shares[s, e] += float(whole[t] @ whole[t] - (whole[t] - best * y[t, e]).square().sum())
        shares[s] /= energy
    return LayerStats(6, rule, tensors, torch.ones(2, dtype=torch.float64), sample), shares


@pytest.mark.parametrize(
    "rule",
    [
        SoftmaxTopK(2, True, False),
        SoftmaxTopK(2, False, False),  # one alone has the weight 1, and together they have less
        TopK(2, score="sigmoid", scale=2.5),
        TopK(2, score="sigmoid", renormalise=False),  # one alone has its own score
    ],
)
def test_the_share_explained_is_that_of_the_best_multiple(rule: RoutingRule) -> None:
    layer, expected = layer_of(rule)
    np.testing.assert_allclose(explained(layer, 2), expected, rtol=1e-4, atol=1e-6)
    for size in (1e-3, 1e3):  # of outputs: none of the share's business
        np.testing.assert_allclose(explained(layer_of(rule, size)[0], 2), expected, rtol=1e-3, atol=1e-5)


def test_importance_is_by_the_share_or_by_a_temperature(samples: CalibrationSet) -> None:
    stats = collect(make_model("qwen2_moe"), samples, NEEDS)
    for index, (_, layer) in enumerate(sorted(stats.layers.items())):
        share = explained(layer, len(samples))
        error = layer.tensors["single_error"].sqrt().numpy()
        output = layer.tensors["output_energy"].sqrt().numpy()
        for found, expected in (
            (log_importance(stats), np.log(share / share.sum(1, keepdims=True))),
            (log_importance(stats, error="explained"), np.log(share / share.sum(1, keepdims=True))),
            (log_importance(stats, error="relative"), log_softmax(-error / output / 0.2, axis=1)),
            (log_importance(stats, 0.7), log_softmax(-error / output / 0.7, axis=1)),  # as it meant before
            (log_importance(stats, error="published"), log_softmax(-error, axis=1)),
            (log_importance(stats, 3.0, "published"), log_softmax(-error / 3, axis=1)),
        ):
            np.testing.assert_allclose(found[index], expected, rtol=1e-6, atol=1e-9)


def test_a_layer_without_output_says_nothing(samples: CalibrationSet) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.zero_()
    np.testing.assert_allclose(np.exp(log_importance(collect(model, samples, NEEDS))[1]), 1 / 8)


def test_statistics_of_an_earlier_version_say_what_stands_in() -> None:
    stats = random_statistics(SoftmaxTopK(2, True, False), layers=3, experts=8)  # hold no norms of tokens
    plan = build_plan(stats, MoEPrunerConfig(method="pathfinder", sparsity=0.5))
    assert any("of an earlier version" in note for note in plan.provenance["notes"])
    by_error = MoEPrunerConfig(method="pathfinder", sparsity=0.5, method_options={"error": "relative"})
    assert build_plan(stats, by_error).retained == plan.retained
    assert not any("earlier version" in note for note in build_plan(stats, by_error).provenance["notes"])


def test_what_is_read_follows_the_reading() -> None:
    def needs(**options: object) -> frozenset[Need]:
        return MoEPrunerConfig(method="importance", method_options=options).needs

    assert needs() == NEEDS
    assert needs(tau=1.0) == needs(error="published") == {Need.SINGLE_ERROR}
    with pytest.raises(RequestError, match=r"tau is 0.5; what an expert explains has no temperature"):
        needs(error="explained", tau=0.5)
    with pytest.raises(RequestError, match="'error' of method 'importance' is 'least'; it takes 'explained' or 'rel"):
        needs(error="least")


@pytest.mark.parametrize("method", ["pathfinder", "transition"])
def test_all_ends_weigh(samples: CalibrationSet, method: str) -> None:
    """With mean transitions a path is a product of one factor a layer: so that of each layer is listed."""
    stats = collect(make_model(), samples, NEEDS)
    factors = [a + p for a, p in zip(log_strengths(stats), log_probabilities(stats), strict=True)]
    if method == "pathfinder":
        factors = [f + e for f, e in zip(factors, log_importance(stats), strict=True)]
    best = [set(factor.argmax(axis=1).tolist()) for factor in factors]
    total = sum(map(len, best))
    options = {"ends": "all", "num_paths": 1}
    config = MoEPrunerConfig(method=method, total_experts=total, method_options=options)
    plan = build_plan(stats, config)
    assert plan.provenance["findings"]["paths_per_sample"] == 1
    assert min(map(len, best)) >= stats.model["top_k"]
    assert [set(experts) for experts in plan.retained.values()] == best
    inner = build_plan(stats, replace(config, method_options={**options, "ends": "inner"}))
    by_default = build_plan(stats, replace(config, method_options={"num_paths": 1}))
    assert by_default.retained == (plan if method == "pathfinder" else inner).retained
    middle = list(plan.retained)[1]
    assert inner.retained[middle] and inner.retained != plan.retained


def test_outliers_are_far_from_the_quartiles() -> None:
    scores = {0: np.array([0.0, 1, 2, 3, 4, 20, -20, 2]), 4: np.array([0.0, 1, 2, 3])}
    found = find_outliers(scores, 3.0)
    assert (found.first, found.last) == ({0: (5,), 4: ()}, {0: (6,), 4: ()})
    assert find_outliers(scores, 100.0).first == {0: (), 4: ()}


@pytest.mark.parametrize("method", ["pathfinder", "transition", "importance"])
@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_outliers_stay_or_go_whatever_the_paths(samples: CalibrationSet, method: str, allocation: str) -> None:
    stats = collect(make_model(), samples, NEEDS)
    config = MoEPrunerConfig(method=method, sparsity=0.5, allocation=allocation, method_options={"outliers": 0.2})
    plan = build_plan(stats, config)
    findings = plan.provenance["findings"]
    kept, left_out = findings["outliers_kept"], findings["outliers_left_out"]
    assert kept and left_out
    assert sum(plan.num_experts.values()) == 12
    for layer, experts in plan.retained.items():
        first, last = set(kept.get(str(layer), ())), set(left_out.get(str(layer), ()))
        assert first <= set(experts) or set(experts) < first
        assert not last & set(experts) or not set(range(8)) - last - set(experts)
    without = build_plan(stats, replace(config, method_options={"outliers": 1e6}))
    plain = build_plan(stats, replace(config, method_options={}))
    assert without.retained == plain.retained and "outliers_kept" not in plain.provenance["findings"]


@pytest.mark.parametrize("outliers", [-1.0, float("nan")])
def test_outliers_that_cannot_be_meant_are_refused(outliers: float) -> None:
    with pytest.raises(RequestError, match=r"outliers is .*; it must be none, or between 0 and 1e6"):
        MoEPrunerConfig(method="pathfinder", sparsity=0.5, method_options={"outliers": outliers})


def test_the_report_draws_the_same_paths() -> None:
    from optimum_moe_prune.publishing.report import explain

    stats = random_statistics(SoftmaxTopK(2, True, False), layers=3, experts=8)
    options = {"ends": "all", "outliers": 1.0, "error": "relative"}
    plan = build_plan(stats, MoEPrunerConfig(method="pathfinder", sparsity=0.5, method_options=options))
    graph = explain.path_graph(plan, explain.recipe_of(plan, stats))
    for layer, nodes in zip(sorted(plan.retained), graph.nodes, strict=True):
        assert not nodes[plan.provenance["findings"]["outliers_left_out"].get(str(layer), [])].any()
