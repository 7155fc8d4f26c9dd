# SPDX-License-Identifier: Apache-2.0
"""Layers are pruned while they are calibrated: the oracle prunes them really, one by one, and calibrates each time."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import load, make_model, make_texts
from heads import LAYERS, checkpoint
from oracles import assert_identical, assert_same, call
from transformers import PreTrainedModel

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    PruningPlan,
    RequestError,
    Workspace,
    calibrate,
    compare_methods,
    measure_sensitivity,
)
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.evaluation.progressive import calibrate_progressively
from optimum_moe_prune.methods import get_method, list_methods, registry
from optimum_moe_prune.methods.budget import UniformBudget
from optimum_moe_prune.methods.registry import NoOptions
from optimum_moe_prune.models.blocks import MoEBlock, moe_blocks
from optimum_moe_prune.planning.build import budget_for, build_plan, quiet_plan
from optimum_moe_prune.planning.work import plan_work
from optimum_moe_prune.statistics.progressive import PROGRESSIVE
from optimum_moe_prune.storage.growing import Store

SETTINGS: dict[str, Any] = {"batch_size": 5, "max_tokens": 70, "seed": 3}
WEIGHTS = {"low": 3.0, "high": 1.0}


def recipe_for(method: str, **settings: Any) -> MoEPrunerConfig:
    budget = {} if "num_experts" in settings else {"sparsity": 0.4}
    return MoEPrunerConfig(**{"method": method, "progressive": True, **SETTINGS, **budget, **settings})


def plain(recipe: MoEPrunerConfig) -> MoEPrunerConfig:
    return replace(recipe, progressive=False)


def plan_of(model: PreTrainedModel, recipe: MoEPrunerConfig, samples: CalibrationSet) -> PruningPlan:
    pruner = MoEPruner(recipe)
    pruner.prune(copy.deepcopy(model), samples)
    assert pruner.pruning_plan is not None
    return pruner.pruning_plan


def straight_loop(
    model: PreTrainedModel,
    samples: CalibrationSet,
    recipe: MoEPrunerConfig,
    num_experts: Mapping[int, int],
    domain_weights: Mapping[str, float] | None,
) -> tuple[CalibrationStats, dict[int, tuple[int, ...]]]:
    """Calibrate the whole model, prune its first layer really, calibrate what is left, and so on."""
    whole, model = collect(model, samples, recipe.needs, **SETTINGS), copy.deepcopy(model)
    layers, retained = dict(whole.layers), {}
    budget = budget_for(plain(recipe), whole.num_experts, whole.routing).exactly(dict(num_experts))
    for block in moe_blocks(model):
        layers[block.layer] = collect(model, samples, recipe.needs, **SETTINGS).layers[block.layer]
        retained[block.layer] = tuple(range(block.num_experts))
        if block.layer in num_experts:
            stats = replace(whole, layers=layers).with_domain_weights(domain_weights)
            chosen = get_method(recipe.method).select(stats, budget, recipe.options())
            retained[block.layer] = chosen.retained[block.layer]
            block.retain(retained[block.layer])
    return replace(whole, layers=layers), retained


def assert_pruned_in_turn(
    model: PreTrainedModel,
    recipe: MoEPrunerConfig,
    samples: CalibrationSet,
    domain_weights: Mapping[str, float] | None = None,
) -> bool:
    """Statistics and plan are the oracle's; whether the plan is another one than that of the unpruned model."""
    found, _ = calibrate_progressively(recipe, model, samples, None, domain_weights)
    plan = build_plan(found, recipe, domain_weights)
    unpruned = collect(model, samples, recipe.needs, **SETTINGS)
    before = quiet_plan(unpruned, plain(recipe), domain_weights)
    counts = {layer: n for layer, n in before.num_experts.items() if layer not in recipe.skip_layers}
    expected, retained = straight_loop(model, samples, recipe, counts, domain_weights)
    assert plan.retained == retained
    assert plan.num_experts == before.num_experts
    assert_same(found, expected, 2e-4)
    last, name = max(found.layers), sorted(found.layers[0].tensors)[0]
    assert not torch.allclose(*(stats.layers[last].tensors[name].double() for stats in (found, unpruned)), rtol=1e-2)
    return plan.retained != before.retained


@pytest.mark.parametrize(
    ("kind", "method", "settings"),
    [
        ("qwen2_moe", "reap", {}),
        ("mixtral", "enumeration", {"num_experts": 4}),
        ("mixtral", "mosaic", {}),
        ("mixtral", "frequency", {"allocation": "global"}),
        ("qwen2_moe", "pathfinder", {}),
    ],
)
def test_each_layer_sees_what_the_ones_before_it_became(
    kind: str, method: str, settings: dict[str, Any], samples: CalibrationSet
) -> None:
    assert_pruned_in_turn(make_model(kind), recipe_for(method, **settings), samples)


def test_skipped_protected_and_weighted(samples: CalibrationSet) -> None:
    recipe = recipe_for("reap", skip_layers=(1,), protect={2: (0, 7)}, count_multiple_of=2, num_experts=4)
    assert_pruned_in_turn(make_model(), recipe, samples, WEIGHTS)


def test_other_experts_are_chosen(samples: CalibrationSet) -> None:
    assert assert_pruned_in_turn(make_model(), recipe_for("reap", num_experts=3), samples)


def test_the_choice_of_a_layer_is_made_from_that_layer_alone(samples: CalibrationSet) -> None:
    """Of all methods that say so; the others look at several layers, or at no statistics."""
    model = make_model()
    for name in list_methods():
        method, recipe = get_method(name), recipe_for(name, allocation="uniform", progressive=False)
        if method.measures:
            continue
        if not method.by_layer:
            assert name in ("pathfinder", "transition", "importance", "fisher") or not recipe.needs_text, name
            continue
        stats = collect(model, samples, recipe.needs, **SETTINGS)
        budget = budget_for(recipe, stats.num_experts, stats.routing)
        together = method.select(stats, budget, recipe.options()).retained
        for layer, found in stats.layers.items():
            alone, exactly = replace(stats, layers={layer: found}), budget.exactly({layer: budget.num_experts[layer]})
            assert method.select(alone, exactly, recipe.options()).retained == {layer: together[layer]}, name


def test_who_looks_at_all_layers_sees_those_before_as_they_became(
    samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[int, torch.Tensor]] = []

    def first_ones(stats: CalibrationStats, budget: UniformBudget, options: NoOptions) -> dict[int, tuple[int, ...]]:
        seen.append({index: layer.total("probability") for index, layer in stats.layers.items()})
        return {layer: tuple(range(count)) for layer, count in budget.num_experts.items()}

    method = replace(get_method("frequency"), name="first", by_layer=False, scores=None, retained=first_ones)
    monkeypatch.setitem(registry._METHODS, "first", method)
    recipe = recipe_for("first", allocation="uniform")
    found, _ = calibrate_progressively(recipe, make_model(), samples)
    unpruned = collect(make_model(), samples, recipe.needs, **SETTINGS)
    assert len(seen) == 3
    for now, layers in enumerate(seen):
        for layer, total in layers.items():
            as_left, as_it_was = (stats.layers[layer].total("probability") for stats in (found, unpruned))
            assert torch.allclose(total, as_left) == (layer <= now)
            assert torch.allclose(total, as_it_was) == (layer > now or layer == 0)


# ------------------------------------------------------------------------------------------- memory and files


@pytest.mark.parametrize("kind", ["qwen2_moe"])
def test_memory_and_stream_to_the_bit(folder: Path, samples: CalibrationSet) -> None:
    """In memory, from files, and of a model that was loaded; also what the method reads of the layer before."""
    recipe = recipe_for("pathfinder", method_options={"transitions": "conditional"}, protect_super_experts=True)
    layout = open_layout(folder)
    expected, _ = calibrate_progressively(recipe, load(folder), samples)
    assert PROGRESSIVE in expected.provenance
    for stream in (False, True):
        found, _ = calibrate_progressively(recipe, layout, samples, compute=Compute(stream=stream))
        assert_identical(found, expected)
        assert found.provenance["streamed"] is stream
        assert found.fingerprint == expected.fingerprint != collect(load(folder), samples, recipe.needs).fingerprint
        assert build_plan(found, recipe).retained == build_plan(expected, recipe).retained
    one_by_one, _ = calibrate_progressively(replace(recipe, batch_size=1), layout, samples)
    assert_same(one_by_one, expected, 2e-2)  # of bfloat16


def test_heads_see_the_pruned_model(tmp_path: Path, samples: CalibrationSet) -> None:
    folder = checkpoint("deepseek_v3", tmp_path / "model", loads=False)
    recipe = recipe_for("reap", num_experts=6)
    in_memory, streamed = (
        calibrate_progressively(recipe, open_layout(folder), samples, compute=Compute(stream=stream))[0]
        for stream in (False, True)
    )
    assert_same(streamed, in_memory, 1e-5)
    plan = build_plan(streamed, recipe)
    assert plan.heads == (LAYERS,) and plan.num_experts[LAYERS] == 6
    # The same head on a model that is really pruned, all its own experts there.
    own = {layer: experts for layer, experts in plan.retained.items() if layer != LAYERS}
    without = replace(plan, retained=own, original_num_experts=dict.fromkeys(own, 12), scores=None, heads=())
    without.apply_to_checkpoint(folder, tmp_path / "pruned", mtp="keep")
    after = calibrate(tmp_path / "pruned", samples, recipe.needs, **SETTINGS, compute=Compute(stream=True))
    assert_same(
        replace(streamed, layers={LAYERS: streamed.layers[LAYERS]}),
        replace(after, layers={LAYERS: after.layers[LAYERS]}),
        1e-4,
    )


class Interrupted(Exception):
    """In place of a signal."""


@pytest.mark.parametrize("kind", ["qwen2_moe"])
@pytest.mark.parametrize("stream", [False, True], ids=["memory", "stream"])
def test_an_interrupted_one_goes_on(
    stream: bool, folder: Path, samples: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, layout = recipe_for("transition"), open_layout(folder)
    kept = Workspace(tmp_path / "kept")

    def work(workspace: Workspace) -> CalibrationStats:
        given: Any = (recipe, layout, samples)
        return calibrate_progressively(*given, compute=Compute(stream=stream), workspace=workspace)[0]

    expected = work(Workspace(tmp_path / "whole"))
    restricted, commit = MoEBlock.restricted, Store.commit

    def after(store: Store, finished: int, *args: Any) -> None:
        commit(store, finished, *args)
        if "progressive" in str(store.folder) and finished == 2:
            raise Interrupted

    def within(block: MoEBlock, retained: tuple[int, ...]) -> Any:
        if block.layer == 2:
            raise Interrupted
        return restricted(block, retained)

    for owner, name, interrupted in ((Store, "commit", after), (MoEBlock, "restricted", within)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(owner, name, interrupted)
            work(kept)
        progress = json.loads((tmp_path / "kept" / "progressive" / "progress.json").read_text())
        assert progress["finished"] == 2
    with pytest.raises(RequestError, match=r"calibration of something else: sparsity is 0\.4 there and 0\.2 now"):
        calibrate_progressively(replace(recipe, sparsity=0.2), layout, samples, workspace=kept)
    assert_identical(work(kept), expected)
    for index in expected.layers:
        name = f"layer_{index:05d}.safetensors"
        files = [(tmp_path / place / "progressive" / name).read_bytes() for place in ("kept", "whole")]
        assert files[0] == files[1]


# ------------------------------------------------------------------------------------------- what it is good for


def test_numbers_of_unequal_layers_are_those_of_the_unpruned_model(samples: CalibrationSet) -> None:
    model, said = make_model(), "progressive: how many experts each layer keeps follows from the unpruned model"
    recipe = recipe_for("reap", allocation="sensitivity", sensitivity_samples=4)
    pruner, before = MoEPruner(recipe), MoEPruner(plain(recipe))
    for each in (pruner, before):
        each.prune(copy.deepcopy(model), samples)
    assert pruner.pruning_plan is not None and before.pruning_plan is not None and pruner.sensitivity is not None
    assert pruner.pruning_plan.num_experts == before.pruning_plan.num_experts
    assert said in pruner.pruning_plan.provenance["notes"] and pruner.pruning_plan.provenance["sensitivity"]
    again = MoEPruner(recipe)  # by what was measured before
    again.sensitivity = pruner.sensitivity
    again.prune(copy.deepcopy(model), samples)
    assert again.pruning_plan is not None and again.pruning_plan.retained == pruner.pruning_plan.retained
    once_more = MoEPruner(recipe)  # by the statistics alone
    once_more.prune(copy.deepcopy(model), pruner.stats)
    assert once_more.pruning_plan is not None and once_more.pruning_plan.retained == pruner.pruning_plan.retained
    assert said not in plan_of(model, recipe_for("reap"), samples).provenance["notes"]


def test_the_statistics_serve_that_recipe_alone(samples: CalibrationSet, tmp_path: Path) -> None:
    model, recipe = make_model(), recipe_for("reap", num_experts=3)
    pruner = MoEPruner(recipe)
    pruner.prune(copy.deepcopy(model), samples)
    plan, stats = pruner.pruning_plan, pruner.stats
    assert plan is not None and stats is not None
    assert plan.provenance["calibration"][PROGRESSIVE] is True and plan.config["progressive"] is True
    assert plan.provenance["calibration"]["fingerprint"] == stats.fingerprint
    loaded = CalibrationStats.load(stats.save(tmp_path / "stats"))
    assert quiet_plan(loaded, recipe).retained == plan.retained
    assert loaded.fingerprint == stats.fingerprint
    unpruned = collect(model, samples, recipe.needs, **SETTINGS)
    with pytest.raises(RequestError, match="with num_experts 3, and the recipe has 4; they serve that one recipe"):
        build_plan(loaded, replace(recipe, num_experts=4))
    with pytest.raises(RequestError, match="with domain_weights None, and the recipe has"):
        build_plan(loaded, recipe, WEIGHTS)
    with pytest.raises(RequestError, match="needs statistics of the unpruned model"):
        build_plan(loaded, plain(recipe))
    with pytest.raises(RequestError, match="progressive=True chooses experts while it calibrates"):
        build_plan(unpruned, recipe)
    with pytest.raises(RequestError, match="needs statistics of the unpruned model"):
        unpruned.merge(loaded)
    with pytest.raises(RequestError, match="a sensitivity needs statistics of the unpruned model"):
        measure_sensitivity(model, samples, [plain(recipe)], loaded)
    with pytest.raises(RequestError, match="a comparison of methods needs statistics of the unpruned model"):
        compare_methods(model, loaded, samples, methods=[plain(recipe)])
    with pytest.raises(RequestError, match="compared from one calibration of the unpruned model"):
        compare_methods(model, samples, samples, methods=[recipe])
    with pytest.raises(RequestError, match="say of the experts that they were gathered with is damaged"):
        build_plan(
            replace(loaded, provenance={PROGRESSIVE: {**loaded.provenance[PROGRESSIVE], "retained": 1}}), recipe
        )


def test_without_statistics_it_changes_nothing(samples: CalibrationSet) -> None:
    for method in ("random", "aimer"):
        model, recipe = make_model(), recipe_for(method)
        plan = plan_of(model, recipe, samples)
        assert plan.retained == plan_of(model, plain(recipe), samples).retained
        assert "the method reads no text, so that progressive changes nothing" in plan.provenance["notes"]


def test_what_goes_by_the_whole_model_is_refused() -> None:
    for settings in ({"method": "auto"}, {"method": "fisher"}, {"method": "reap", "allocation": "estimated"}):
        with pytest.raises(RequestError, match="progressive does not go with"):
            recipe_for(**settings)


def test_a_model_that_does_not_run_layer_by_layer_is_refused(samples: CalibrationSet) -> None:
    model = tiny_model("inkling2_text")
    ids = [torch.arange(3, 20), torch.arange(5, 30)]
    with pytest.raises(RequestError, match="its layers cannot be pruned one after another"):
        MoEPruner(recipe_for("reap", num_experts=8)).prune(model, ids)


# ------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("kind", ["mixtral"])
def test_run(folder: Path, samples: CalibrationSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))
    arguments = ("run", "--model", folder, "--calibration", texts, "--method", "reap", "--num-experts", 3)
    code, _, said = call(capsys, *arguments, "--progressive", "--stream", tmp_path / "out")
    assert code == 0, said
    plan = PruningPlan.load(tmp_path / "out")
    assert plan.config["progressive"] and set(plan.num_experts.values()) == {3}
    assert "--progressive" in (tmp_path / "out" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.glob(".*")) == []
    work = [
        plan_work(open_layout(folder), MoEPrunerConfig(method=m, num_experts=3, progressive=p), samples)
        for m, p in (("reap", False), ("reap", True), ("pathfinder", True), ("pathfinder", False))
    ]
    assert work[0].reads == work[1].reads and work[2].reads > work[3].reads
