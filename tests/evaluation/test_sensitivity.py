# SPDX-License-Identifier: Apache-2.0
"""Measured divergences against really pruned models, and the allocation against brute force."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import aligned, assert_equal_states, load, make_model, make_texts, make_tokenizer
from oracles import call, sensitivity_of
from transformers import PreTrainedModel

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    PruningPlan,
    RequestError,
    RunError,
    Sensitivity,
    Workspace,
    measure_sensitivity,
)
from optimum_moe_prune.calibration import calibrate as calibrating
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.evaluation import divergence as divergence_module
from optimum_moe_prune.evaluation import measure_sensitivity as measuring
from optimum_moe_prune.evaluation.divergence import divergences
from optimum_moe_prune.evaluation.losses import evaluate
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.layerwise import LayerByLayer
from optimum_moe_prune.planning.build import build_plan

MOSAIC = MoEPrunerConfig(method="mosaic", sparsity=0.5)


def random_plans(model: PreTrainedModel, count: int, seed: int = 0) -> list[dict[int, tuple[int, ...]]]:
    """Plans that prune one layer, some layers or all, to any number of experts."""
    rng = np.random.default_rng(seed)
    blocks = moe_blocks(model)
    plans = []
    for _ in range(count):
        plan = {}
        for block in rng.permutation(np.arange(len(blocks)))[: rng.integers(1, len(blocks) + 1)]:
            number = int(rng.integers(blocks[block].routing.top_k, blocks[block].num_experts + 1))
            experts = rng.permutation(blocks[block].num_experts)[:number]
            plan[blocks[block].layer] = tuple(sorted(experts.tolist()))
        plans.append(plan)
    return plans


def pruned(kind: str, plan: dict[int, tuple[int, ...]]) -> PreTrainedModel:
    """A new model, really pruned."""
    model = make_model(kind)
    for block in moe_blocks(model):
        if block.layer in plan:
            block.retain(plan[block.layer])
    return model


def mean_by_domain(sums: torch.Tensor, samples: CalibrationSet) -> dict[str, float]:
    tokens = torch.tensor([s.num_tokens - 1 for s in samples.samples])
    domains = sorted({s.domain for s in samples.samples})
    rows = {d: [i for i, s in enumerate(samples.samples) if s.domain == d] for d in domains}
    rows["all"] = list(range(len(samples)))
    return {d: float(sums[i].sum() / tokens[i].sum()) for d, i in rows.items()}


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    make_model(kind).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ------------------------------------------------------------------------------------------- divergences


def test_divergences_are_those_of_really_pruned_models(
    kind: str, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind)
    plans = random_plans(model, 9)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = divergences(LayerByLayer(model), samples, plans, batch_size=5)
    assert found.shape == (9, len(samples))
    for plan, sums in zip(plans, found, strict=True):
        expected = evaluate(pruned(kind, plan), samples, reference=model, batch_size=5).domains
        for domain, value in mean_by_domain(sums, samples).items():
            assert value == pytest.approx(expected[domain].kl_divergence, rel=1e-4, abs=1e-7)
    assert float(found.max()) > 0.01
    # The model is as it was, and runs as it did.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any("forward" in module.__dict__ for module in model.modules())
    again = divergences(LayerByLayer(model), samples, [*plans, {}], batch_size=5)
    assert torch.equal(again[:-1], found) and not again[-1].any()
    monkeypatch.setattr(divergence_module, "_STATE_BYTES", 1)  # each plan in a pass of its own
    alone = divergences(LayerByLayer(model), samples, plans, batch_size=5)
    torch.testing.assert_close(alone, found, rtol=1e-6, atol=1e-9)


def test_a_layer_is_run_once_for_what_plans_share(samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mixtral")
    calls: list[int] = []
    forward = LayerByLayer.forward
    monkeypatch.setattr(
        LayerByLayer, "forward", lambda self, index, *rest: (calls.append(index), forward(self, index, *rest))[1]
    )
    experts = (0, 1, 2)
    plans = [{0: experts}, {1: experts}, {2: experts}, {0: experts, 2: experts}, {2: experts, 1: tuple(range(8))}]
    divergences(LayerByLayer(model), samples, plans, batch_size=len(samples))
    # Layer 0: whole or not. Layer 1: those two, and the second plan. Layer 2: those three, and two more.
    assert [calls.count(layer) for layer in range(3)] == [2, 3, 5]


@pytest.mark.parametrize("stream", [False, True])
def test_from_disk_the_same(
    kind: str,
    folder: Path,
    samples: CalibrationSet,
    stream: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from optimum_moe_prune.models.memory import Compute, open_runner

    plans = random_plans(make_model(kind), 6)
    expected = divergences(LayerByLayer(aligned(make_model(kind))), samples, plans, batch_size=5)
    pruner = MoEPruner(source=folder)
    runner = open_runner(pruner.layout(), Compute(stream=stream))
    assert runner.streams is stream
    torch.testing.assert_close(divergences(runner, samples, plans, batch_size=5), expected, rtol=1e-5, atol=1e-8)
    whole = divergences(open_runner(pruner.layout(), Compute(stream=stream)), samples, plans, batch_size=5)
    kept = open_runner(pruner.layout(), Compute(stream=stream))
    assert torch.equal(divergences(kept, samples, plans, batch_size=5, workspace=Workspace(tmp_path / "store")), whole)
    assert not list((tmp_path / "store").glob("states_*"))
    monkeypatch.setattr(divergence_module, "_DISK_BYTES", 1)  # each plan in a pass of its own
    passes = divergences(
        open_runner(pruner.layout(), Compute(stream=stream)),
        samples,
        plans,
        batch_size=5,
        workspace=Workspace(tmp_path / "passes"),
    )
    torch.testing.assert_close(passes, whole, rtol=1e-6, atol=1e-9)


def test_tied_embeddings_from_disk(samples: CalibrationSet, tmp_path: Path) -> None:
    from optimum_moe_prune.models.memory import Compute, open_runner

    model = make_model("mixtral", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "model")
    plans = random_plans(model, 3)
    found = divergences(
        open_runner(MoEPruner(source=tmp_path / "model").layout(), Compute(stream=True)), samples, plans
    )
    torch.testing.assert_close(found, divergences(LayerByLayer(aligned(model)), samples, plans), rtol=1e-5, atol=1e-8)


def test_a_head_that_is_missing(samples: CalibrationSet, tmp_path: Path) -> None:
    from optimum_moe_prune.models.memory import Compute, open_runner

    model = make_model("mixtral")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(RequestError, match="lacks the weights of the model's head"):
        divergences(
            open_runner(MoEPruner(source=tmp_path / "model").layout(), Compute(stream=True)), samples, [{0: (0, 1)}]
        )


def test_a_restricted_block_is_the_pruned_block(kind: str) -> None:
    model = make_model(kind)
    block = moe_blocks(model)[1]
    block.module.config = model.config
    hidden = torch.randn(2, 7, 32)
    retained = tuple(range(1, block.num_experts, 2))
    retained = (0, *retained) if len(retained) < block.rule.top_k else retained
    state = {name: tensor.clone() for name, tensor in block.module.state_dict().items()}
    with torch.no_grad():
        whole = block.module(hidden)
        with block.restricted(retained):
            found = block.module(hidden)
        assert torch.equal(block.module(hidden), whole)
        with contextlib.suppress(ZeroDivisionError), block.restricted(retained):
            raise ZeroDivisionError
        assert torch.equal(block.module(hidden), whole)
        assert all(torch.equal(tensor, state[name]) for name, tensor in block.module.state_dict().items())
        block.retain(retained)
        torch.testing.assert_close(found, block.module(hidden), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found, whole)


# ------------------------------------------------------------------------------------------- the measurement


@pytest.fixture
def stats(kind: str, samples: CalibrationSet) -> CalibrationStats:
    return collect(make_model(kind), samples, set(Need))


def test_what_is_measured(kind: str, samples: CalibrationSet, stats: CalibrationStats) -> None:
    model = make_model(kind)
    configs = [MoEPrunerConfig(method=name, sparsity=0.5) for name in ("mosaic", "pathfinder", "reap")]
    found = sensitivity_of(model, samples, stats, configs, sparsities=(0.25, 0.4, 0.99))
    top_k, sizes = stats.model["top_k"], stats.num_experts
    assert found.tokens_by_domain == {
        d: sum(s.num_tokens - 1 for s in samples.samples if s.domain == d) for d in ("high", "low")
    }
    for config in configs:
        method = found.methods[config.method]
        for layer, entry in method.layers.items():
            assert sorted(entry.kl) == list(range(top_k, sizes[layer]))
            for count, experts in entry.retained.items():
                uniform = dataclasses.replace(config, sparsity=None, num_experts=count, allocation="uniform")
                assert experts == build_plan(stats, uniform).retained[layer]
        layer, count = max(method.layers), top_k
        expected = evaluate(pruned(kind, {layer: method.layers[layer].retained[count]}), samples, reference=model)
        assert method.layers[layer].kl[count] == pytest.approx(
            {d: r.kl_divergence for d, r in expected.domains.items()}, rel=1e-4, abs=1e-7
        )
        by_allocation = {"mosaic": ["uniform"]}.get(config.method, ["uniform", "global"])
        assert [(e.allocation, e.sparsity) for e in method.model] == [
            (allocation, sparsity) for allocation in [*by_allocation, "sensitivity"] for sparsity in (0.25, 0.4)
        ]
        for entry in method.model:
            sparse = dataclasses.replace(config, sparsity=entry.sparsity, allocation=entry.allocation)
            plan = build_plan(stats, sparse, sensitivity=found)
            assert plan.retained == entry.retained
            loss = evaluate(plan.apply(make_model(kind)), samples, reference=model).domains["all"].kl_divergence
            assert entry.kl["all"] == pytest.approx(loss, rel=1e-4, abs=1e-7)
    assert "nats per token lost by the whole model" in found.summary()


def test_only_some_numbers(samples: CalibrationSet) -> None:
    model = make_model("mixtral", num_local_experts=24)
    stats = collect(model, samples, {Need.ROUTING})
    config = MoEPrunerConfig(method="frequency", sparsity=0.5, protect={1: (3, 4, 5)}, skip_layers=(2,))
    found = sensitivity_of(model, samples, stats, [config], sparsities=())
    layers = found.methods["frequency"].layers
    assert sorted(layers[0].kl) == list(range(2, 24, 2))
    assert sorted(layers[1].kl) == [3, *range(4, 24, 2)]
    assert all({3, 4, 5} <= set(experts) for experts in layers[1].retained.values())
    assert 2 not in layers and found.methods["frequency"].model == ()
    asked = sensitivity_of(model, samples, stats, [config], sparsities=(), counts=[1, 2, 12, 24])
    assert sorted(asked.methods["frequency"].layers[0].kl) == [2, 12]
    with pytest.raises(RequestError, match="no number of experts can be measured of 24; each layer keeps at least"):
        sensitivity_of(model, samples, stats, [config], counts=[24])


def test_files_and_what_does_not_fit(
    kind: str, samples: CalibrationSet, stats: CalibrationStats, tmp_path: Path
) -> None:
    found = sensitivity_of(make_model(kind), samples, stats, [MOSAIC], sparsities=(0.4,))
    assert Sensitivity.load(found.save(tmp_path / "s.json")) == found
    by_sensitivity = dataclasses.replace(MOSAIC, allocation="sensitivity", sparsity=0.4)
    assert build_plan(stats, by_sensitivity, sensitivity=found).config["allocation"] == "sensitivity"
    for change, message in (
        ({"method": "reap"}, "measured for mosaic and not for 'reap'"),
        ({"seed": 1}, "measured with seed 0, and the recipe has 1"),
        ({"method_options": {"num_generalists": 2}}, "measured with method_options .*'num_generalists': 1"),
        ({"protect": {0: (1,)}}, "measured with protect {}"),
    ):
        with pytest.raises(RequestError, match=message):
            build_plan(stats, dataclasses.replace(by_sensitivity, **change), sensitivity=found)
    with pytest.raises(RequestError, match="measured with domain_weights None, and the recipe has"):
        build_plan(stats, by_sensitivity, {"low": 2, "high": 1}, found)
    with pytest.raises(RequestError, match="needs what was measured of the model"):
        build_plan(stats, by_sensitivity)
    other = dataclasses.replace(stats, model={**stats.model, "fingerprint": "0", "fingerprint_bfloat16": "0"})
    with pytest.raises(RequestError, match="was measured on another model"):
        build_plan(other, by_sensitivity, sensitivity=found)
    whole = json.loads((tmp_path / "s.json").read_text())
    for path, value in (
        (("format_version",), 2),
        (("methods",), []),
        (("methods", "mosaic", "layers", "0", "counts", "4", "retained"), [0, 1, 99, 2]),
        (("methods", "mosaic", "layers", "0", "counts", "4", "retained"), [0, 1, 2]),
        (("methods", "mosaic", "layers", "0", "counts", "4", "kl"), {"all": "much"}),
        (("methods", "mosaic", "layers", "0", "counts", "4", "kl"), {"high": 1.0}),
        (("methods", "mosaic", "layers", "0", "original_num_experts"), True),
        (("samples",), None),
    ):
        broken = json.loads(json.dumps(whole))
        at: Any = broken
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        with pytest.raises(RequestError, match=r"the sensitivity (is damaged|has format version)"):
            Sensitivity.from_dict(broken)


# ------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize("stream", [False, True])
def test_interrupted_work_continues(
    folder: Path, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    pruner = MoEPruner.from_pretrained(folder, config=dataclasses.replace(MOSAIC, batch_size=2))
    samples = pruner.samples(make_texts(8))
    stats = pruner.calibrate(None, samples)

    def measure(**settings: Any) -> Sensitivity:
        settings = {"stream": stream, "batch_size": 2, "sparsities": (0.4,), **settings}
        return sensitivity_of(pruner.layout(), samples, stats, [MOSAIC], **settings)

    expected = measure()
    calls = 0
    forward = LayerByLayer.forward

    def failing(self: LayerByLayer, *rest: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == limit:
            raise RuntimeError("cut")
        return forward(self, *rest)

    monkeypatch.setattr(LayerByLayer, "forward", failing)
    limit = 0
    measure()
    total, interrupted = calls, []
    for limit in (total * 2 // 5, total * 2 // 5, 0):
        calls = 0
        with pytest.raises(RuntimeError, match="cut") if limit else contextlib.nullcontext():
            found = measure(folder=tmp_path / "work")
        interrupted.append(calls)
    assert found.methods == expected.methods
    assert interrupted[-1] < total * 0.7  # a good part of it was there
    limit = total  # never reached by what is left
    with pytest.raises(
        RequestError, match=r"an unfinished measurement of something else: batch_size is 2 there and 3 now"
    ):
        measure(folder=tmp_path / "work", batch_size=3)
    with pytest.raises(
        RequestError, match=r"unfinished measurement of something else: counts is not set there and 4 now"
    ):
        measure(folder=tmp_path / "work", counts=[4])
    calls, limit = 0, 0
    assert measure(folder=tmp_path / "work", restart=True).methods == expected.methods and calls == total


def test_broken_models_are_found(samples: CalibrationSet) -> None:
    model = make_model("mixtral")
    stats = collect(model, samples, set(Need))
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(RunError, match="NaN"):
        sensitivity_of(model, samples, stats, [MOSAIC])
    with pytest.raises(RequestError, match="statistics are of another model"):
        sensitivity_of(make_model(seed=1), samples, stats, [MOSAIC])


def test_names_that_are_not_there(samples: CalibrationSet) -> None:
    model = make_model("mixtral")
    stats = collect(model, samples, set(Need))
    for change, message in (
        ({"skip_layers": (99,)}, "skip_layers names layer 99"),
        ({"protect": {0: (99,)}}, "protect names expert 99 of layer 0"),
        ({"skip_layers": (0, 1, 2)}, "skip_layers names every MoE layer"),
    ):
        config = dataclasses.replace(MOSAIC, **change)
        with pytest.raises(RequestError, match=message):
            sensitivity_of(model, samples, stats, [config])


# ------------------------------------------------------------------------------------------- the doors


def test_a_recipe_says_on_how_many_samples_is_measured(
    folder: Path, samples: CalibrationSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether statistics are given or not, in Python and on the command line."""
    few = samples.take(4)
    expected = {"all": sum(s.num_tokens - 1 for s in few.samples)}
    for sample in few.samples:
        expected[sample.domain] = expected.get(sample.domain, 0) + sample.num_tokens - 1
    recipe = MoEPrunerConfig(method="soft_frequency", sensitivity_samples=4)
    stats = collect(load(folder), samples, set(recipe.needs))
    for given in (None, stats):
        found = measure_sensitivity(folder, samples, [recipe], given, sparsities=())
        assert found.tokens_by_domain in (expected, {d: n for d, n in expected.items() if d != "all"})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(text) + "\n" for text in make_texts(12)), encoding="utf-8")
    pruner = MoEPruner.from_pretrained(folder, config=recipe)
    stats_dir = pruner.calibrate(calibration=make_texts(12)).save(tmp_path / "s")
    code, _, err = call(
        capsys, "sensitivity", "--model", folder, "--calibration", tmp_path / "t.jsonl", "--stats", stats_dir,
        "--method", "soft_frequency", "--sensitivity-samples", 2, "--sparsities", "0.5", tmp_path / "o.json",
    )  # fmt: skip
    assert code == 0, err
    two = pruner.samples(tmp_path / "t.jsonl").take(2)
    assert sum(Sensitivity.load(tmp_path / "o.json").tokens_by_domain.values()) == two.num_tokens - 2


def test_what_cannot_be_measured_is_refused_before_work(
    folder: Path, samples: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = MoEPrunerConfig(method="soft_frequency")
    stats = collect(load(folder), samples, set(recipe.needs))
    monkeypatch.setattr(measuring, "open_runner", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(calibrating, "calibrate", lambda *_, **__: pytest.fail("work began"))
    for given in (None, stats):
        with pytest.raises(RequestError, match="domain_weights must give a positive number for each domain"):
            measure_sensitivity(folder, samples, [recipe], given, domain_weights={"nowhere": 1.0})
        with pytest.raises(RequestError, match="several recipes are for method 'soft_frequency'"):
            measure_sensitivity(folder, samples, [recipe, dataclasses.replace(recipe, seed=1)], given)


def test_pruning_by_sensitivity_in_memory_and_from_files(kind: str, folder: Path, tmp_path: Path) -> None:
    texts = make_texts(12)
    config = MoEPrunerConfig(
        method="soft_frequency", sparsity=0.4, allocation="sensitivity", sensitivity_samples=6, batch_size=4
    )
    pruner = MoEPruner.from_pretrained(folder, config=config)
    model = pruner.prune(aligned(make_model(kind)), texts)
    assert pruner.sensitivity is not None and pruner.pruning_plan is not None
    assert sum(pruner.sensitivity.tokens_by_domain.values()) < pruner.samples(texts).num_tokens / 1.5
    files = MoEPruner.from_pretrained(folder, config=config)
    files.prune_checkpoint(tmp_path / "out", calibration=texts, stream=True)
    assert files.pruning_plan is not None and files.pruning_plan.retained == pruner.pruning_plan.retained
    assert_equal_states(model, MoEPruner.from_pretrained(tmp_path / "out").prune(make_model(kind)))
    assert not list(tmp_path.glob(".*partial"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--allocation sensitivity" in card and "spread so that the measured divergences" in card
    # Random needs no calibration, and texts to measure on all the same.
    drawn = dataclasses.replace(config, method="random")
    with pytest.raises(RequestError, match="needs texts to measure on"):
        MoEPruner.from_pretrained(folder, config=drawn).prune(make_model(kind))
    MoEPruner.from_pretrained(folder, config=drawn).prune(make_model(kind), texts)
    # Other texts are measured anew, unless the sensitivity was set from outside.
    fresh, others = MoEPruner.from_pretrained(folder, config=config), make_texts(12, seed=9)
    fresh.prune(aligned(make_model(kind)), others)
    first = pruner.sensitivity
    pruner.prune(aligned(make_model(kind)), others)
    assert pruner.sensitivity != first and pruner.sensitivity.methods == fresh.sensitivity.methods
    # The same through a pruner that is bound to no checkpoint.
    unbound = MoEPruner(config, tokenizer=make_tokenizer())
    for text, expected in ((texts, first), (others, fresh.sensitivity)):
        unbound.prune_checkpoint(tmp_path / "unbound", source=folder, calibration=text, overwrite=True)
        assert unbound.sensitivity.methods.keys() == expected.methods.keys()
        for name, method in expected.methods.items():
            found = unbound.sensitivity.methods[name]
            assert (found.config, found.model) == (method.config, ()) and found.layers.keys() == method.layers.keys()
            for layer, entry in method.layers.items():
                assert found.layers[layer].retained == entry.retained
                # To the bit only where parameters are aligned alike; here they lie in the file.
                for count, kl in entry.kl.items():
                    assert found.layers[layer].kl[count] == pytest.approx(kl, rel=1e-5, abs=1e-8)
    fresh.sensitivity = first
    with pytest.raises(RequestError, match="chosen by another calibration"):
        fresh.prune(make_model(kind), others)
    pruner.prune(aligned(make_model(kind)), texts)
    # What was measured once serves every budget.
    planner = MoEPruner.from_pretrained(folder, config=dataclasses.replace(config, sparsity=0.2))
    planner.sensitivity = pruner.sensitivity
    smaller = planner.plan(pruner.stats)
    assert smaller.sparsity < pruner.pruning_plan.sparsity


def test_a_model_in_memory_can_be_measured_through_the_pruner(folder: Path, kind: str) -> None:
    pruner = MoEPruner.from_pretrained(folder, config=MOSAIC)
    found = pruner.measure_sensitivity(make_model(kind), make_texts(6), sparsities=(0.4,))
    assert found is pruner.sensitivity and set(found.methods) == {"mosaic"}
    again = MoEPruner.from_pretrained(folder, config=MOSAIC)
    kl = again.measure_sensitivity(None, make_texts(6), sparsities=(0.4,)).methods["mosaic"].layers[0].kl
    for count, values in found.methods["mosaic"].layers[0].kl.items():
        assert kl[count] == pytest.approx(values, rel=1e-4, abs=1e-7)
    with pytest.raises(RequestError, match="a calibration is needed"):
        pruner.measure_sensitivity()


def test_the_command_line(kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from optimum_moe_prune.commands import main

    def call(*arguments: Any) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(record) + "\n" for record in make_texts(10)))
    given = ("--model", folder, "--calibration", texts)
    sparse = ("--sparsities", "0.25,0.4")
    both = ("--method", "reap", "--method", "frequency")
    code, out, err = call("sensitivity", *given, *both, *sparse, tmp_path / "s.json")
    assert code == 0, err
    assert "reap: nats per token lost when one layer alone" in out and out.endswith("s.json\n")
    found = Sensitivity.load(tmp_path / "s.json")
    assert set(found.methods) == {"reap", "frequency"}
    assert not list(tmp_path.glob(".*partial"))
    assert call("score", *given, tmp_path / "stats")[0] == 0
    code, out, err = call(
        "sensitivity", *given, "--stats", tmp_path / "stats", "--method", "reap", *sparse, "--stream", "--json",
        tmp_path / "t.json",
    )  # fmt: skip
    assert code == 0, err
    streamed = Sensitivity.from_dict(json.loads(out)).methods["reap"]
    for layer, entry in streamed.layers.items():
        assert entry.retained == found.methods["reap"].layers[layer].retained
        for count, kl in entry.kl.items():
            assert kl == pytest.approx(found.methods["reap"].layers[layer].kl[count], rel=1e-4, abs=1e-7)
    by = ("--method", "reap", "--allocation", "sensitivity", "--sparsity", "0.4")
    planned = (*by, "--sensitivity", tmp_path / "s.json")
    assert call("plan", "--stats", tmp_path / "stats", *planned, tmp_path / "plan.json")[0] == 0
    assert call("run", *given, *planned, tmp_path / "run")[0] == 0
    assert call("run", *given, *by, tmp_path / "measured")[0] == 0
    plans = [PruningPlan.load(tmp_path / name).retained for name in ("plan.json", "run", "measured")]
    assert plans[0] == plans[1] == plans[2]
    for arguments, message in (
        (("plan", "--stats", tmp_path / "stats", *by, tmp_path / "p.json"), "needs what was measured of the model"),
        (("sensitivity", *given, tmp_path / "s.json"), "s.json exists"),
        (("sensitivity", *given, tmp_path / "s.txt"), "must end in .json"),
        (("sensitivity", *given, "--sparsities", "2", tmp_path / "u.json"), "lie between 0 and 1"),
        (("sensitivity", *given, "--counts", "two", tmp_path / "u.json"), "--counts must be numbers"),
        (("sensitivity", *given, *both, "--option", "a=b", tmp_path / "u.json"), "--option is for one"),
    ):  # fmt: skip
        code, out, err = call(*arguments)
        assert code == 2 and message in err, (arguments, err)
