# SPDX-License-Identifier: Apache-2.0
"""Domain weights mean one thing in every method: each domain's share of the objective.

Two domains that mirror each other: what expert e is to one, expert E - 1 - e is to the other. However their tokens are
cut into samples, at equal weights the choice must be the same and its own mirror image; and with the weights exchanged
the mirror image of the choice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import softmax_rule
from synthetic import Tokens, statistics_of

from optimum_moe_prune import CalibrationStats, MoEPrunerConfig, list_methods
from optimum_moe_prune.methods import get_method
from optimum_moe_prune.methods.path_selection import sample_weights
from optimum_moe_prune.methods.replay import reconstruction_loss, squared_errors
from optimum_moe_prune.plan import PruningPlan
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.statistics import weights as domain_weights
from optimum_moe_prune.statistics.samples import Sample

LAYERS, EXPERTS, HIDDEN, BLOCK = 3, 8, 6, 8
SPLITS = {"short": (100, 40), "long": (10, 400), "few": (4, 40)}
"""Samples and tokens in each."""

OPTIONS: dict[str, dict[str, object]] = {
    "mosaic": {"num_domains": 4, "num_generalists": 2},
    "variability": {"num_generalists": 2},
    **{name: {"num_paths": 20} for name in ("pathfinder", "transition", "importance")},
}


@functools.cache
def domains(seed: int, alike: bool) -> dict[str, Tokens]:
    """A few tokens of each domain; experts 0 to 3 have most to say in domain a, 4 to 7 in domain b.

    Domains that are exactly alike have experts that are too, and then rounding decides about ties.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (LAYERS, BLOCK, EXPERTS)
    prefers = torch.linspace(1.2, -1.2, EXPERTS)
    logits = torch.randn(shape, generator=random) + prefers
    size = (1 + 0.5 * prefers)[:, None] * (1 + torch.rand(*shape, 1, generator=random))
    outputs = torch.randn(*shape, HIDDEN, generator=random) * size.clamp(min=0.2)
    centres = torch.randn(LAYERS, 2, HIDDEN, generator=random)  # two topics in each domain, far from the other's
    inputs = 3 + centres.repeat_interleave(BLOCK // 2, 1) + 0.01 * torch.randn(LAYERS, BLOCK, HIDDEN, generator=random)
    a = Tokens(logits, outputs, inputs)
    uneven = 1 + (0 if alike else 0.1) * torch.randn(shape, generator=random)
    return {"a": a, "b": Tokens((logits * uneven).flip(2), (outputs * uneven[..., None]).flip(2), -inputs)}


@functools.cache
def stats(seed: int, a: str, b: str, alike: bool) -> CalibrationStats:
    samples = []
    for domain, split in (("a", a), ("b", b)):
        count, length = SPLITS[split]
        samples += [(domain, domains(seed, alike)[domain].repeated(length // BLOCK))] * count
    return statistics_of(samples, softmax_rule(2))


def mirrored(retained: Mapping[int, tuple[int, ...]]) -> dict[int, tuple[int, ...]]:
    return {layer: tuple(sorted(EXPERTS - 1 - e for e in experts)) for layer, experts in retained.items()}


def planned(statistics: CalibrationStats, method: str, weights: dict[str, float], num_experts: int = 4) -> PruningPlan:
    config = MoEPrunerConfig(
        method=method, num_experts=num_experts, allocation="uniform", method_options=OPTIONS.get(method, {})
    )
    return build_plan(statistics, config, weights)


METHODS = [name for name in list_methods() if name not in ("aimer", "auto", "random")]
SCORES = [name for name in METHODS if get_method(name).scores is not None]
SETS = [name for name in METHODS if name not in SCORES]
CUTS = list(itertools.product(SPLITS, repeat=2))
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_how_a_domain_is_cut_into_samples_does_not_matter(method: str, seed: int) -> None:
    for weights in ({"a": 1.0, "b": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 1.7}):
        expected = planned(stats(seed, "long", "long", False), method, weights)
        for a, b in CUTS:
            plan = planned(stats(seed, a, b, False), method, weights)
            if method in SETS:
                assert plan.retained == expected.retained, (a, b, weights)
            for layer, scores in (plan.scores or {}).items():  # up to a factor: the number of all tokens
                np.testing.assert_allclose(
                    np.array(scores) / sum(scores), np.array(expected.scores[layer]) / sum(expected.scores[layer])
                )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_domains_that_change_places_mirror_the_choice(method: str, seed: int) -> None:
    for (a, b), share in itertools.product(CUTS, (1.3, 3.0)):
        exchanged = {"a": share, "b": 1.0}, {"a": 1.0, "b": share}
        for num_experts in (3, 4):
            first, second = (planned(stats(seed, a, b, True), method, w, num_experts) for w in exchanged)
            if method in SETS:
                assert first.retained == mirrored(second.retained), (a, b, share)
        for layer, scores in (first.scores or {}).items():
            np.testing.assert_allclose(scores, second.scores[layer][::-1])


@pytest.mark.parametrize("method", METHODS)
def test_domains_of_equal_weight_count_the_same(method: str) -> None:
    """Of 100 samples of 40 tokens and 10 of 400: scores mirror themselves, and of experts on paths one gets half."""
    plan = planned(stats(0, "short", "long", True), method, {"a": 1.0, "b": 1.0})
    for scores in (plan.scores or {}).values():
        np.testing.assert_allclose(scores, scores[::-1])
    if method in ("pathfinder", "transition", "importance"):
        assert all(sum(expert < EXPERTS // 2 for expert in kept) == 2 for kept in plan.retained.values())


def test_the_share_is_that_of_the_objective() -> None:
    """Domains alike in all tokens: each one's part of every sum and of the loss of every set is its share."""
    statistics = stats(1, "short", "few", True).with_domain_weights({"a": 3.0, "b": 1.0})
    in_a = torch.tensor([sample.domain == "a" for sample in statistics.samples])
    for layer in statistics.layers.values():
        for retained in itertools.combinations(range(EXPERTS), 3):
            mirror = mirrored({0: retained})[0]
            part = []
            for kept, mask in ((retained, in_a), (mirror, ~in_a)):
                errors = squared_errors(layer.tensors["logits"], layer.tensors["gram"], layer.routing, kept)
                part.append(float(reconstruction_loss(errors, layer.token_sample, layer.loss_weights * mask)))
            assert part[0] / part[1] == pytest.approx(3.0)
        for name in ("routed_tokens", "norm", "probability"):
            by_sample = layer.sample_weights[:, None] * layer.tensors[name]
            np.testing.assert_allclose(by_sample[in_a].sum(0), 3 * by_sample[~in_a].sum(0).flip(0))
        tokens_a = in_a[layer.token_sample]
        assert layer.token_weights[tokens_a].sum() / layer.token_weights[~tokens_a].sum() == pytest.approx(3.0)
        assert layer.token_weights.mean() == pytest.approx(1.0)
    votes = sample_weights(statistics)
    assert votes[in_a].sum() / votes[~in_a].sum() == pytest.approx(3.0) and votes.mean() == pytest.approx(1.0)


def test_tokens_that_are_not_kept_change_no_share() -> None:
    """Of one domain a tenth of the tokens is kept, of the other all: the kept ones still have the domain's share."""
    whole = stats(1, "long", "long", True)
    in_a = torch.tensor([sample.domain == "a" for sample in whole.samples])
    rows = torch.arange(len(whole.token_sample))
    rows = rows[~in_a[whole.token_sample] | (rows % 50 < 5)]
    sample = whole.token_sample[rows]
    layers = {i: replace(layer, token_sample=sample) for i, layer in whole.layers.items()}
    part = replace(whole, token_sample=sample, token_position=whole.token_position[rows], layers=layers)
    layer = part.with_domain_weights({"a": 1.0, "b": 1.0}).layers[0]
    kept_a = in_a[sample]
    assert layer.token_weights[kept_a].sum() == pytest.approx(float(layer.token_weights[~kept_a].sum()))
    root = torch.bincount(sample).sqrt() * layer.loss_weights
    assert root[in_a].sum() == pytest.approx(float(root[~in_a].sum()))
    assert (layer.sample_weights == 1).all()
    none = part.with_domain_weights({"a": 1.0, "b": 1.0}).with_domain_weights(None).layers[0]
    assert (none.token_weights == 1).all() and (none.loss_weights == 1).all() and (none.sample_weights == 1).all()


def test_a_domain_of_which_no_token_is_kept_has_no_part_in_sums_of_kept_tokens() -> None:
    samples = [Sample("0", "a", 4), Sample("1", "b", 4)]
    weights = domain_weights.sample_weights(samples, {"a": 1.0, "b": 1.0}, torch.tensor([3, 0]))
    assert weights.tolist() == [1.0, 0.0]
