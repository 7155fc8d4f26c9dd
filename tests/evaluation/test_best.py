# SPDX-License-Identifier: Apache-2.0
"""Method auto: the sets against brute force, what was measured against the plans, and every door to it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import aligned, load, make_model, make_texts, make_tokenizer, save_checkpoint
from oracles import call
from transformers import PreTrainedModel

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    PruningPlan,
    RequestError,
    Sensitivity,
    compare_methods,
    measure_sensitivity,
)
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.evaluation.best import choose_by_measuring
from optimum_moe_prune.evaluation.divergence import divergences
from optimum_moe_prune.evaluation.halves import halves
from optimum_moe_prune.methods import get_method
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.planning.choice import in_words, losses
from optimum_moe_prune.surgery import settled as settling
from optimum_moe_prune.surgery.settled import settled

CANDIDATES = ("enumeration", "soft_frequency", "reap", "mosaic")
AUTO = MoEPrunerConfig(num_experts=4, sensitivity_samples=6)
TWO = dataclasses.replace(AUTO, method_options={"candidates": "soft_frequency,reap"})

Chosen = tuple[PruningPlan, Sensitivity]


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return make_model("mixtral")


@pytest.fixture(scope="module")
def stats(small: PreTrainedModel, samples: CalibrationSet) -> CalibrationStats:
    return collect(small, samples, set(Need))


@pytest.fixture(scope="module")
def chosen(small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet) -> Chosen:
    plans, sensitivity = choose_by_measuring(small, [AUTO], stats, samples)
    return plans[0], sensitivity


def mean_kl(model: PreTrainedModel, samples: CalibrationSet, plans: list[Any], hashes: Any) -> list[float]:
    """Nats per predicted token of some samples, measured here."""
    sums = divergences(LayerByLayer(model), samples, plans)
    rows = [row for row, sample in enumerate(samples.samples) if sample.hash in hashes]
    tokens = sum(samples.samples[row].num_tokens - 1 for row in rows)
    return [float(values[rows].sum() / tokens) for values in sums]


# ------------------------------------------------------------------------------------------- halves


@pytest.mark.parametrize(("texts", "number"), [(12, 6), (40, 8), (41, 32), (6, 1), (7, 2)])
def test_halves_share_nothing_and_hold_every_domain(texts: int, number: int) -> None:
    samples = CalibrationSet.build(make_texts(texts, length=(8, 24)), make_tokenizer())
    half = halves(samples, number)
    choosing = {sample.hash for sample in half.choosing.samples}
    assert choosing.isdisjoint(half.judging)
    assert {s.hash for s in half.measured.samples} == choosing | half.judging
    assert len(half.measured) == min(2 * max(number, 2), len(samples))
    assert abs(len(choosing) - len(half.judging)) <= 1
    judged = {s.domain for s in half.measured.samples if s.hash in half.judging}
    assert {s.domain for s in half.choosing.samples} == judged == {"low", "high"} and not half.alone
    turned = CalibrationSet.build(make_texts(texts, length=(8, 24))[::-1], make_tokenizer())
    assert halves(turned, number).judging == half.judging


def test_a_single_sample_of_a_domain_decides(small: PreTrainedModel, stats: CalibrationStats) -> None:
    texts = [*make_texts(6)[::2], make_texts(6)[1]]
    few = CalibrationSet.build(texts, make_tokenizer())
    half = halves(few, 32)
    assert half.alone == ("high",) and {s.domain for s in half.choosing.samples} == {"low", "high"}
    (plan,), _ = choose_by_measuring(small, [TWO], stats, few)
    choice = plan.provenance["choice"]
    assert choice["judged_without"] == ["high"] and "high" not in choice["measured"][choice["kept"]]["judging"]
    assert any("high: one sample each, which decided" in note for note in plan.provenance["notes"])
    (plan,), _ = choose_by_measuring(small, [TWO], stats, CalibrationSet.build(texts[:1], make_tokenizer()))
    assert plan.provenance["choice"]["measured"]["auto, sensitivity"]["judging"] is None
    assert "chosen on, so it loses more elsewhere" in "\n".join(in_words(plan))


# ------------------------------------------------------------------------------------------- the choice


def test_the_sets_are_those_of_brute_force(
    small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet, chosen: Chosen
) -> None:
    """Every set of every candidate measured here, every way to spread the budget tried."""
    _, sensitivity = chosen
    half = halves(samples, AUTO.sensitivity_samples)
    sets = {
        (layer, count, name): build_plan(stats, MoEPrunerConfig(method=name, num_experts=count)).retained[layer]
        for name in CANDIDATES
        for count in range(2, 8)
        for layer in range(3)
    }
    plans = [{layer: experts} for (layer, _, _), experts in sets.items()]
    hashes = {sample.hash for sample in half.choosing.samples}
    costs = dict(zip(sets, mean_kl(small, half.choosing, plans, hashes), strict=True))
    for (layer, count, name), cost in costs.items():
        measured = sensitivity.methods[name].layers[layer]
        assert measured.retained[count] == sets[layer, count, name]
        assert measured.kl[count]["all"] == pytest.approx(cost, rel=1e-6, abs=1e-12)
    best = {
        (layer, count): min(costs[layer, count, name] for name in CANDIDATES)
        for layer in range(3)
        for count in range(2, 8)
    }
    best |= {(layer, 8): 0.0 for layer in range(3)}
    ways = [way for way in itertools.product(range(2, 9), repeat=3) if sum(way) == 12]
    least = min(sum(best[layer, count] for layer, count in enumerate(way)) for way in ways)
    plan = build_plan(stats, AUTO, sensitivity=sensitivity)
    choice = plan.provenance["choice"]
    assert choice["sum_of_divergences"] == pytest.approx(least, rel=1e-6)
    for layer, name in choice["by_layer"].items():
        count = plan.num_experts[int(layer)]
        assert plan.retained[int(layer)] == sets[int(layer), count, name]
        assert costs[int(layer), count, name] == pytest.approx(best[int(layer), count], rel=1e-6)
    # No candidate alone does better by the same sums.
    for name in CANDIDATES:
        alone = MoEPrunerConfig(method=name, num_experts=4, allocation="sensitivity", sensitivity_samples=6)
        found = build_plan(stats, alone, sensitivity=sensitivity).provenance["findings"]["sum of divergences"]
        assert choice["sum_of_divergences"] <= found + 1e-6
    uniform = build_plan(stats, dataclasses.replace(AUTO, allocation="uniform"), sensitivity=sensitivity)
    total = uniform.provenance["choice"]["sum_of_divergences"]
    assert total == pytest.approx(sum(best[layer, 4] for layer in range(3)), rel=1e-6)
    assert uniform.uniform_num_experts == 4


def test_the_best_plan_is_kept_and_judged_on_others(
    small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet, chosen: Chosen
) -> None:
    plan, sensitivity = chosen
    half, choice = halves(samples, AUTO.sensitivity_samples), plan.provenance["choice"]
    assert plan.method == "auto" and plan.config == AUTO.to_dict() and sum(plan.num_experts.values()) == 12
    measured = choice["measured"]
    asked = {f"{name}, {way}" for name in CANDIDATES for way in ("sensitivity", "uniform")}
    asked |= {"auto, sensitivity", "auto, uniform", "soft_frequency, global", "reap, global"}
    assert set(measured) == asked and choice["samples"] == {"choosing": 6, "judging": 6}
    assert choice["kept"] == min(measured, key=lambda name: measured[name]["choosing"]["all"])
    for name, entry in measured.items():
        method, _, way = name.partition(", ")
        recipe = dataclasses.replace(AUTO, method=method, allocation=way)
        retained = build_plan(stats, recipe, sensitivity=sensitivity).retained
        if name == choice["kept"]:
            assert plan.retained == retained
        for part, hashes in (("choosing", {s.hash for s in half.choosing.samples}), ("judging", half.judging)):
            (expected,) = mean_kl(small, samples, [retained], hashes)
            assert entry[part]["all"] == pytest.approx(expected, rel=1e-6)
    assert losses(plan)[0] == (choice["kept"], measured[choice["kept"]]["judging"])
    assert not [note for note in plan.provenance["notes"] if "not measured" in note]


def test_an_alternative_that_loses_less_is_kept(
    small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet, chosen: Chosen
) -> None:
    """Layers say little of the whole here: what was measured of them is turned around."""
    _, sensitivity = chosen
    methods = {}
    for name, method in sensitivity.methods.items():
        layers = {
            layer: dataclasses.replace(e, kl={count: {"all": 1 / (1e-3 + kl["all"])} for count, kl in e.kl.items()})
            for layer, e in method.layers.items()
        }
        methods[name] = dataclasses.replace(method, layers=layers)
    wrong = dataclasses.replace(sensitivity, methods=methods)
    (plan,), _ = choose_by_measuring(small, [AUTO], stats, samples, wrong)
    choice = plan.provenance["choice"]
    name, _, way = choice["kept"].partition(", ")
    assert way != "sensitivity" and plan.method == "auto"
    recipe = dataclasses.replace(AUTO, method=name, allocation=way)
    assert plan.retained == build_plan(stats, recipe, sensitivity=wrong).retained
    assert name == "auto" or set(choice["by_layer"].values()) == {name}


def test_every_layer_as_many(small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet) -> None:
    recipe = dataclasses.replace(AUTO, allocation="uniform", protect={1: (7,)}, skip_layers=(2,))
    (plan,), sensitivity = choose_by_measuring(small, [recipe], stats, samples)
    assert plan.num_experts == {0: 4, 1: 4, 2: 8} and 7 in plan.retained[1]
    assert all(set(layer.kl) == {4} for m in sensitivity.methods.values() for layer in m.layers.values())
    names = set(plan.provenance["choice"]["measured"])
    assert names == {"auto, uniform", *(f"{name}, uniform" for name in CANDIDATES)}


def test_numbers_between_measured_ones_are_measured(samples: CalibrationSet) -> None:
    model = make_model("mixtral", num_local_experts=24)
    stats = collect(model, samples, {Need.ROUTING, Need.ROUTED_NORMS})
    recipe = MoEPrunerConfig(
        total_experts=41, sensitivity_samples=4, method_options={"candidates": "reap,soft_frequency"}
    )
    (plan,), sensitivity = choose_by_measuring(model, [recipe], stats, samples)
    assert sum(plan.num_experts.values()) == 41 and any(n % 2 for n in plan.num_experts.values())
    counts = {count for layer in sensitivity.methods["reap"].layers.values() for count in layer.kl}
    assert any(count % 2 for count in counts)  # the grid has even ones
    planned = build_plan(stats, recipe, sensitivity=sensitivity)
    assert planned.provenance["choice"]["layers_not_measured"] == []


def test_shares_of_domains_decide(small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet) -> None:
    weights = {"low": 9.0, "high": 1.0}
    recipe = dataclasses.replace(AUTO, method_options={"candidates": "soft_frequency,reap"})
    (plan,), sensitivity = choose_by_measuring(small, [recipe], stats, samples, domain_weights=weights)
    measured = plan.provenance["choice"]["measured"]
    cost = {n: 0.9 * entry["choosing"]["low"] + 0.1 * entry["choosing"]["high"] for n, entry in measured.items()}
    assert plan.provenance["choice"]["kept"] == min(cost, key=lambda name: cost[name])
    assert sensitivity.domain_weights == weights
    with pytest.raises(RequestError, match="measured with domain_weights"):
        build_plan(stats, recipe, None, sensitivity)


# ------------------------------------------------------------------------------------------- candidates


def test_candidates_that_a_model_cannot_serve(
    small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet
) -> None:
    few = dataclasses.replace(stats, needs=frozenset({Need.ROUTING, Need.ROUTED_NORMS}))
    (plan,), _ = choose_by_measuring(small, [AUTO], few, samples)
    choice = plan.provenance["choice"]
    assert choice["candidates"] == ["soft_frequency", "reap"] and set(choice["left_out"]) == {"enumeration", "mosaic"}
    assert any(note.startswith("mosaic is no candidate: ") for note in plan.provenance["notes"])
    named = dataclasses.replace(AUTO, method_options={"candidates": "reap, mosaic"})
    with pytest.raises(RequestError, match="'mosaic' needs the statistics"):
        choose_by_measuring(small, [named], few, samples)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "candidates is empty"),
        ("reap,reap", "names 'reap' twice"),
        ("reap,nothing", "'nothing' is not known"),
        ("auto", "chooses no set for a given number"),
    ],
)
def test_candidates_that_are_none(names: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        MoEPrunerConfig(method_options={"candidates": names})


def test_a_recipe(samples: CalibrationSet) -> None:
    recipe = MoEPrunerConfig(sparsity=0.5)
    assert recipe.method == "auto" and recipe.allocates == "sensitivity" and recipe.measures
    assert recipe.needs == {need for name in CANDIDATES for need in MoEPrunerConfig(method=name).needs}
    assert get_method("auto").takes == ("sensitivity", "uniform")
    with pytest.raises(RequestError, match=r"'global' is not for method 'auto', which takes 'sensitivity' or"):
        MoEPrunerConfig(sparsity=0.5, allocation="global")
    assert MoEPrunerConfig.from_dict(recipe.to_dict()) == recipe


def test_layers_that_have_to_be_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", make_tokenizer(), torch.float32)

    def refuse(*_: Any) -> None:
        raise RequestError("the layers have to keep the same number of experts: so it is. Use a uniform allocation.")

    pruner = MoEPruner.from_pretrained(folder, TWO)
    assert settled(TWO, pruner.layout()).recipe == settled(TWO, load(folder)).recipe == TWO
    monkeypatch.setattr(settling, "check_unequal", refuse)
    monkeypatch.setattr(settling, "check_request", refuse)
    pruner.prune(load(folder), make_texts(6))
    plan = pruner.pruning_plan
    assert plan.uniform_num_experts == 4 and plan.config["allocation"] == "uniform"
    assert "every layer keeps the same number of experts: the layers have to" in plan.provenance["notes"][-1]
    total = dataclasses.replace(AUTO, num_experts=None, total_experts=12)
    assert settled(total, pruner.layout()).recipe == total  # whoever asks for that is told
    asked = dataclasses.replace(AUTO, allocation="sensitivity")
    assert settled(asked, pruner.layout()).recipe == asked


# ------------------------------------------------------------------------------------------- the doors


def test_in_memory_from_files_and_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", make_tokenizer(), torch.float32)
    recipe = dataclasses.replace(TWO, batch_size=6)
    pruner = MoEPruner.from_pretrained(folder, recipe)
    pruned = pruner.prune(aligned(load(folder)), make_texts(12))
    expected = pruner.pruning_plan
    assert {layer: len(experts) for layer, experts in expected.retained.items()} == expected.num_experts
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in load(folder).parameters())
    forward, calls, limit = LayerByLayer.forward, 0, 0

    def failing(self: LayerByLayer, *rest: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise RuntimeError("cut")
        return forward(self, *rest)

    monkeypatch.setattr(LayerByLayer, "forward", failing)
    for stream in (False, True):
        out, made = tmp_path / f"out-{stream}", []
        for limit in (90, 10, 0):  # of more than a hundred: when layers alone are measured
            calls = 0
            again = MoEPruner.from_pretrained(folder, recipe)
            with pytest.raises(RuntimeError, match="cut") if limit else contextlib.nullcontext():
                again.prune_checkpoint(out, calibration=make_texts(12), stream=stream)
            made.append(calls)
        assert made[-1] < 60 and not (tmp_path / f".out-{stream}.partial").exists()
        plan = PruningPlan.load(out)
        assert plan.retained == expected.retained
        mine, theirs = plan.provenance["choice"], expected.provenance["choice"]
        assert mine["kept"] == theirs["kept"] and mine["by_layer"] == theirs["by_layer"]
        for name, entry in theirs["measured"].items():
            assert mine["measured"][name]["judging"] == pytest.approx(entry["judging"], rel=1e-4, abs=1e-7)
        card = (out / "README.md").read_text()
        assert "| nats lost per token |" in card and "6 samples that had no part in the choice" in card
        assert "Layers retain sets of: " in card and "--method auto" in card


def test_with_and_without_what_was_measured(
    small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet, chosen: Chosen
) -> None:
    pruner = MoEPruner(AUTO)
    with pytest.raises(RequestError, match=r"'auto' chooses by measuring the model, and here are statistics alone; "):
        pruner.plan(stats)
    with pytest.raises(RequestError, match=r"method='mosaic'"):
        pruner.prune(make_model("mixtral"), stats)
    with pytest.raises(RequestError, match="'auto' needs a calibration; pass calibration=texts"):
        MoEPruner(AUTO).prune(make_model("mixtral"))
    recipes = [MoEPrunerConfig(method=name, sensitivity_samples=6) for name in ("frequency", "reap")]
    measured = measure_sensitivity(small, samples, recipes, stats, sparsities=())
    plan = build_plan(stats, AUTO, sensitivity=measured)
    choice = plan.provenance["choice"]
    assert set(choice["by_layer"].values()) <= {"frequency", "reap"} and "measured" not in choice
    assert choice["left_out"] == dict.fromkeys(("enumeration", "soft_frequency", "mosaic"), "it was not measured")
    assert any("the plan as a whole was not measured" in note for note in plan.provenance["notes"])
    named = dataclasses.replace(AUTO, method_options={"candidates": "reap,mosaic"})
    with pytest.raises(RequestError, match="measured for frequency, reap and not for 'mosaic'"):
        build_plan(stats, named, sensitivity=measured)
    pruner.sensitivity = chosen[1]
    pruner.prune(make_model("mixtral"), samples)
    assert pruner.pruning_plan.retained == chosen[0].retained


def test_a_sensitivity_of_it(small: PreTrainedModel, stats: CalibrationStats, samples: CalibrationSet) -> None:
    recipe = dataclasses.replace(TWO, num_experts=None)
    found = measure_sensitivity(small, samples, [recipe], stats, sparsities=(0.5,))
    assert set(found.methods) == {"auto", "soft_frequency", "reap"}
    half = halves(samples, 6)
    assert found.provenance["samples"] == half.choosing.fingerprint
    own = found.methods["auto"]
    assert {(e.allocation, e.sparsity) for e in own.model} == {("sensitivity", 0.5), ("uniform", 0.5)}
    for layer, entry in own.layers.items():
        for count, kl in entry.kl.items():
            alone = [found.methods[name].layers[layer].kl[count]["all"] for name in ("soft_frequency", "reap")]
            assert kl["all"] == min(alone)
    plan = build_plan(stats, AUTO, sensitivity=Sensitivity.from_dict(found.to_dict()))
    whole = next(entry for entry in own.model if entry.allocation == "sensitivity")
    assert plan.retained == whole.retained


def test_compared(small: PreTrainedModel, samples: CalibrationSet, stats: CalibrationStats) -> None:
    recipes = [MoEPrunerConfig(method="reap", sensitivity_samples=6), dataclasses.replace(TWO, num_experts=None)]
    heldout = CalibrationSet.build(make_texts(6, seed=9), make_tokenizer())
    found = compare_methods(small, samples, heldout, methods=recipes, stats=stats, sparsities=0.5)
    plan = found.plans["auto (sensitivity) 50%"]
    (expected,), _ = choose_by_measuring(small, [TWO], stats, samples)
    assert plan.retained == expected.retained and "reap 50%" in found.plans
    alone = compare_methods(small, None, heldout, methods=recipes, stats=stats, sparsities=0.5)
    assert set(alone.plans) == {"reap 50%"} and "statistics alone" in alone.left_out["auto (sensitivity) 50%"]


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", make_tokenizer(), torch.float32)
    texts = tmp_path / "t.jsonl"
    texts.write_text("".join(json.dumps(text) + "\n" for text in make_texts(12)), encoding="utf-8")
    given = ("--model", folder, "--calibration", texts)
    few = ("--sensitivity-samples", 4, "--option", "candidates=soft_frequency,reap")
    code, out, _ = call(capsys, "run", *given, "--num-experts", 4, *few, "--dry-run", tmp_path / "out")
    assert code == 0 and "measures up to 12 sets of experts in each of 3 layers (soft_frequency, reap) on 4" in out
    code, out, err = call(capsys, "run", *given, "--num-experts", 4, *few, tmp_path / "out")
    assert code == 0, err
    assert "auto: 12 of 24 experts" in out and "on 4 samples that had no part in the choice; kept: " in out
    code, out, err = call(
        capsys, "run", *given, "--num-experts", 4, *few, "--allocation", "uniform", tmp_path / "same"
    )
    assert code == 0 and PruningPlan.load(tmp_path / "same").uniform_num_experts == 4, err
    stats = MoEPruner.from_pretrained(folder, TWO).calibrate(calibration=make_texts(12)).save(tmp_path / "stats")
    code, _, err = call(capsys, "plan", "--stats", stats, "--sparsity", "0.5", tmp_path / "p.json")
    assert code == 2 and "--method mosaic" in err and "--sensitivity" in err
    measure = ("sensitivity", *given, "--stats", stats, *few, "--sparsities", "0.5")
    code, _, err = call(capsys, *measure, tmp_path / "s.json")
    assert code == 0, err
    plan = ("plan", "--stats", stats, "--sensitivity", tmp_path / "s.json", "--sparsity", "0.5")
    code, out, err = call(capsys, *plan, tmp_path / "p.json")
    assert code == 0 and "sets of: " in out and "was not measured" in out, err
    code, out, _ = call(capsys, "list", "methods")
    assert code == 0 and out.startswith("Begin with auto, the default: ")
    assert next(iter(json.loads(call(capsys, "list", "methods", "--json")[1])["methods"])) == "auto"


def test_files_of_unknown_rules(stats: CalibrationStats, samples: CalibrationSet) -> None:
    """A calibration for it gathers what the routers serve; one for a candidate that was named is refused."""
    from optimum_moe_prune.calibration.calibrate import _required

    assert _required([AUTO]) == _required("auto") == _required("all") == frozenset()
    assert _required([dataclasses.replace(AUTO, method_options={"candidates": "mosaic"})]) >= {Need.SINGLE_ERROR}
    assert _required([AUTO, MoEPrunerConfig(method="reap")]) == {Need.ROUTING, Need.ROUTED_NORMS}


def test_heads_are_planned_by_the_method_that_gave_most(tmp_path: Path, samples: CalibrationSet) -> None:
    from heads import LAYERS, checkpoint

    folder = checkpoint("qwen3_5", tmp_path / "mtp")
    recipe = MoEPrunerConfig(
        num_experts=8, sensitivity_samples=2, method_options={"candidates": "soft_frequency,reap"}
    )
    layout = open_layout(folder)
    pruner = MoEPruner(recipe, source=folder, tokenizer=make_tokenizer())
    pruner.prune_checkpoint(tmp_path / "out", calibration=make_texts(8), mtp="prune")
    plan = PruningPlan.load(tmp_path / "out")
    assert plan.heads == (LAYERS,) and plan.uniform_num_experts == 8
    assert settled(recipe, layout).recipe.allocates == "sensitivity"
    assert settled(dataclasses.replace(recipe, mtp="prune"), layout).recipe.allocates == "uniform"


def test_what_a_damaged_plan_says_of_its_choice() -> None:
    plan = PruningPlan("mixtral", 2, "auto", {0: (0, 1)}, {0: 4})
    good = {
        "kept": "a", "by_layer": {"0": "reap"}, "samples": {"choosing": 1, "judging": 1},
        "measured": {"a": {"judging": {"all": 1, "x": 0.5}}},
    }  # fmt: skip
    lines = in_words(dataclasses.replace(plan, provenance={"choice": good}))
    assert "lost: 1.000 nats per token, on 1 sample that had no part in the choice; kept: a" in lines
    wrong = (None, 3, "<b>", [], {}, [[]], {"judging": "<b>"}, {"judging": {"all": 10**400}}, {"a": {"judging": 3}})
    for value in wrong:
        for name in good:
            found = "\n".join(in_words(dataclasses.replace(plan, provenance={"choice": {**good, name: value}})))
            assert "<b> samples" not in found
    huge = {**good, "measured": {"a": {"judging": {"all": 10**400}}}}
    assert losses(dataclasses.replace(plan, provenance={"choice": huge})) == []
