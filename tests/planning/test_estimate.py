# SPDX-License-Identifier: Apache-2.0
"""A budget spread by estimated divergences: the best of all ways to spread it, and never called a loss."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_model, make_texts, make_tokenizer, save_checkpoint
from oracles import call

from optimum_moe_prune import CalibrationSet, CalibrationStats, MoEPrunerConfig, Need, PruningPlan, RequestError
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.methods import get_method, list_methods
from optimum_moe_prune.methods.fisher_replay import FisherLoss
from optimum_moe_prune.models.memory import Compute
from optimum_moe_prune.names import BY_SENSITIVITY, ESTIMATED
from optimum_moe_prune.planning.build import build_plan
from optimum_moe_prune.planning.estimate import DAMPING
from optimum_moe_prune.planning.work import plan_work
from optimum_moe_prune.publishing.again import run_command

NEEDS = {Need.ROUTING, Need.ROUTED_NORMS, Need.FISHER}


@pytest.fixture(scope="module")
def texts() -> CalibrationSet:
    return CalibrationSet.build(make_texts(10), make_tokenizer())


@pytest.fixture(scope="module")
def stats(texts: CalibrationSet) -> CalibrationStats:
    return collect(make_model(), texts, NEEDS, max_tokens=80)


@pytest.mark.parametrize("method", ["reap", "fisher", "random"])
@pytest.mark.parametrize("weights", [None, {"low": 5.0, "high": 1.0}])
def test_the_numbers_are_the_best_of_all(
    method: str, weights: dict[str, float] | None, stats: CalibrationStats
) -> None:
    """Over every way to spread the budget, with the method's own sets and an expert that stays in any case."""
    recipe = MoEPrunerConfig(method, sparsity=0.4, allocation=ESTIMATED, protect={1: (5,)}, seed=2)
    plan = build_plan(stats, recipe, weights)
    weighted = stats.with_domain_weights(weights)
    losses = {layer: FisherLoss(weighted, layer, DAMPING) for layer in stats.layers}
    costs: dict[int, dict[int, float]] = {layer: {8: 0.0} for layer in stats.layers}
    for count in range(2, 8):
        uniform = MoEPrunerConfig(method, num_experts=count, allocation="uniform", protect={1: (5,)}, seed=2)
        for layer, retained in build_plan(stats, uniform, weights).retained.items():
            costs[layer][count] = losses[layer](retained)
    ways = [way for way in itertools.product(range(2, 9), repeat=3) if sum(way) == sum(plan.num_experts.values())]
    best = min(sum(costs[layer][count] for layer, count in enumerate(way)) for way in ways)
    found = sum(losses[layer](retained) for layer, retained in plan.retained.items())
    assert sum(plan.num_experts.values()) == 24 - 10 and 5 in plan.retained[1]
    assert found == pytest.approx(best, rel=1e-9)
    plain = sum(FisherLoss(weighted, layer)(retained) for layer, retained in plan.retained.items())
    assert plan.provenance["findings"]["sum of estimated divergences"] == pytest.approx(plain, abs=1e-6)
    (note,) = [note for note in plan.provenance["notes"] if "follow from estimates" in note]
    assert "nothing of it was measured" in note
    assert "sum of divergences" not in plan.provenance["findings"] and "sensitivity" not in plan.provenance


def test_every_method_that_is_measured_can_be_estimated() -> None:
    for name in list_methods():
        takes = get_method(name).takes
        if get_method(name).allocations[0] != BY_SENSITIVITY:  # which measures by itself
            assert (ESTIMATED in takes) == (BY_SENSITIVITY in takes), name
    assert {Need.ROUTING, Need.FISHER} <= MoEPrunerConfig("random", sparsity=0.5, allocation=ESTIMATED).needs
    assert Need.FISHER not in MoEPrunerConfig("reap", sparsity=0.5, allocation=BY_SENSITIVITY).needs


def test_what_is_missing_is_named(stats: CalibrationStats) -> None:
    lean = replace(stats, needs=frozenset({Need.ROUTING, Need.ROUTED_NORMS}))
    with pytest.raises(RequestError, match=r"'estimated' needs the statistics fisher, .*\(score --fisher\)"):
        build_plan(lean, MoEPrunerConfig("reap", sparsity=0.5, allocation=ESTIMATED))


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``score --fisher`` and ``plan``, or ``run`` in one go, choose the same; the command in the card is the same."""
    save_checkpoint("mixtral", tmp_path / "model", make_tokenizer())
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(map(json.dumps, make_texts(10))))
    source = ["--model", tmp_path / "model", "--calibration", texts]
    recipe = ["--method", "reap", "--sparsity", "0.4", "--allocation", "estimated"]
    code, _, err = call(capsys, "score", *source, "--method", "reap", "--fisher", "--stream", tmp_path / "stats")
    assert code == 0, err
    code, out, err = call(capsys, "plan", "--stats", tmp_path / "stats", *recipe, tmp_path / "plan.json")
    assert code == 0 and "follow from estimates" in out + err
    code, out, err = call(capsys, "run", *source, *recipe, tmp_path / "out")
    assert code == 0 and "follow from estimates" in out + err
    plan = PruningPlan.load(tmp_path / "out")
    assert (
        plan.retained == PruningPlan.load(tmp_path / "plan.json").retained and len(set(plan.num_experts.values())) > 1
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "estimates of what each layer loses alone" in card and "nothing of that was measured" in card
    again = run_command(PruningPlan.load(tmp_path / "out"), "MODEL", [])
    assert again[again.index("--allocation") + 1] == "estimated" and "--calibration" in again
    code, out, _ = call(capsys, "score", *source, "--dry-run", "--fisher", tmp_path / "not")
    assert code == 0 and not (tmp_path / "not").exists()


def test_the_work_is_planned(tmp_path: Path, texts: CalibrationSet) -> None:
    """A backward pass needs what waits on disk, and memory for what is differentiated."""
    save_checkpoint("mixtral", tmp_path / "model", make_tokenizer())
    layout = open_layout(tmp_path / "model")
    works = [
        plan_work(
            layout,
            MoEPrunerConfig("reap", sparsity=0.4, allocation=allocation),
            texts,
            output=tmp_path / "out",
            compute=Compute(stream=stream),
        )
        for allocation in ("uniform", ESTIMATED)
        for stream in (True, False)
    ]
    states = texts.num_tokens * 32 * 2  # H of them, in bfloat16 or wider
    assert works[2].unfinished - works[0].unfinished >= (3 + 1 + 2 * 2 - 2) * states
    assert works[2].memory > works[0].memory and works[3].memory > works[1].memory
    assert works[3].unfinished - works[1].unfinished < 10 * states
