# SPDX-License-Identifier: Apache-2.0
"""The estimated divergence of sets against a straight loop, brute force, and real divergences of small changes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import make_model, make_texts, make_tokenizer
from heads import LAYERS, checkpoint, heads_of_tiny_models  # noqa: F401  # a fixture
from oracles import calibrated, layout_of

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPrunerConfig, Need, RequestError
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.evaluation.divergence import divergences
from optimum_moe_prune.methods.fisher_replay import FisherLoss, fisher_replay
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.planning.build import build_plan

NEEDS = {Need.ROUTING, Need.FISHER}


@pytest.fixture(scope="module")
def stats() -> CalibrationStats:
    samples = CalibrationSet.build(make_texts(10), make_tokenizer())
    return collect(make_model("qwen2_moe"), samples, NEEDS, max_tokens=70).with_domain_weights(
        {"low": 3.0, "high": 1.0}
    )


def by_loop(stats: CalibrationStats, index: int, retained: tuple[int, ...], damping: float) -> float:
    """``D(S)``, token by token and draw by draw."""
    layer = stats.layers[index]
    tensors, rule = layer.tensors, layer.routing
    energy = tensors["gradient_energy"].double()
    weights = [float(w) for w in layer.token_weights]
    mean = sum(w * float(e.mean()) for w, e in zip(weights, energy, strict=True)) / sum(weights)
    total = predicted = 0.0
    for token, weight in enumerate(weights):
        logits = tensors["logits"][token : token + 1]
        change = (rule.weights(logits, list(retained)) - rule.weights(logits))[0]
        sample, position = int(stats.token_sample[token]), int(stats.token_position[token])
        if position + 1 < stats.samples[sample].num_tokens:
            predicted += weight
        for draw in range(2):
            product = float(change @ tensors["fisher"][token, draw].double())
            if damping and float(energy[token, draw]) > 0:
                product *= ((float(energy[token, draw]) + damping * mean) / float(energy[token, draw])) ** 0.5
            total += weight * product**2 / 2
    return total / (2 * predicted)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_estimate_is_a_straight_loops(stats: CalibrationStats, damping: float) -> None:
    for index, retained in ((0, (0, 2, 5)), (2, (1, 2, 3, 6))):
        loss = FisherLoss(stats, index, damping)
        assert loss(retained) == pytest.approx(by_loop(stats, index, retained, damping), rel=1e-9)
        assert loss(tuple(range(7))) == 0


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_the_set_with_the_least_estimate_is_retained(stats: CalibrationStats, damping: float) -> None:
    """Of all sets, or dropping one expert after the other."""
    for search in ("auto", "greedy"):
        options = {"damping": damping, "search": search}
        config = MoEPrunerConfig("fisher", num_experts=4, method_options=options, protect={0: (1,)})
        plan = build_plan(stats, config, {"low": 3.0, "high": 1.0})
        for index, retained in plan.retained.items():
            loss = FisherLoss(stats, index, damping)
            required = {1} if index == 0 else set[int]()
            if search == "auto":
                sets = [s for s in itertools.combinations(range(7), 4) if required <= set(s)]
                assert retained == min(sets, key=loss)
                continue
            left = tuple(range(7))
            while len(left) > 4:
                rests = [tuple(e for e in left if e != victim) for victim in left if victim not in required]
                left = min(rests, key=loss)
            assert retained == left


def test_losses_of_the_replay_are_roots_of_multiples(stats: CalibrationStats) -> None:
    sets = list(itertools.combinations(range(7), 4))
    loss = FisherLoss(stats, 2)
    found = fisher_replay(stats.layers[2]).losses(sets).square()
    expected = torch.tensor([loss(retained) for retained in sets], dtype=torch.float64)
    torch.testing.assert_close(found / found.mean(), expected / expected.mean(), rtol=1e-5, atol=1e-7)


def test_routers_of_groups_keep_to_them() -> None:
    samples = CalibrationSet.build(make_texts(4), make_tokenizer())
    stats = collect(tiny_model("deepseek_v3"), samples, NEEDS)
    plan = build_plan(stats, MoEPrunerConfig("fisher", num_experts=8, method_options={"search": "greedy"}))
    groups = stats.routing.groups
    assert groups > 1
    for retained in plan.retained.values():
        assert {len(group) for group in stats.routing.grouped(retained, 12)} == {8 // groups}


def test_small_changes_cost_what_is_estimated() -> None:
    """Experts that are nearly alike: the divergence of a layer pruned alone, to a few percent."""
    model = make_model("mixtral", num_hidden_layers=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in moe_blocks(model):
            for tensor in (block.experts.gate_up_proj, block.experts.down_proj):
                tensor.copy_(tensor[:1] * (1 + 0.02 * torch.randn(tensor.shape, generator=generator)))
    samples = CalibrationSet.build(make_texts(40, length=(12, 20)), make_tokenizer())
    plans = [{layer: (0, 3, 5, 6)} for layer in (0, 1)]
    measured = divergences(LayerByLayer(model), samples, plans).sum(1) / sum(s.num_tokens - 1 for s in samples.samples)
    estimated = torch.zeros(2, dtype=torch.float64)
    for seed in range(12):  # labels are drawn
        stats = collect(model, samples, NEEDS, batch_size=40, seed=seed)
        estimated += torch.tensor([FisherLoss(stats, n)(plan[n]) for n, plan in enumerate(plans)]) / 12
    assert 1e-7 < float(measured.min()) < 1e-2
    torch.testing.assert_close(estimated[1], measured[1], rtol=0.05, atol=0)  # after it nothing mixes tokens
    torch.testing.assert_close(estimated[0], measured[0], rtol=0.25, atol=0)


@pytest.mark.usefixtures("heads_of_tiny_models")
def test_heads_keep_the_most_routed(tmp_path: Path, samples: CalibrationSet) -> None:
    folder = checkpoint("deepseek_v3", tmp_path / "model", loads=False)
    stats = calibrated(layout_of(folder), samples, NEEDS, stream=True)
    plan = build_plan(stats, MoEPrunerConfig("fisher", num_experts=4))
    other = build_plan(stats, MoEPrunerConfig("soft_frequency", num_experts=4))
    assert plan.retained[LAYERS] == other.retained[LAYERS] and plan.retained != other.retained
    assert any("heads have no part" in note for note in plan.provenance["notes"])


def test_what_is_wrong_is_said(stats: CalibrationStats) -> None:
    with pytest.raises(RequestError, match="damping is -1"):
        MoEPrunerConfig("fisher", num_experts=4, method_options={"damping": -1})
    lean = replace(stats, needs=frozenset({Need.ROUTING}))
    with pytest.raises(RequestError, match=r"'fisher' needs the statistics fisher, .* with --fisher gradients"):
        build_plan(lean, MoEPrunerConfig("fisher", num_experts=4))
