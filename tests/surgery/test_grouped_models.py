# SPDX-License-Identifier: Apache-2.0
"""Small models whose routers choose among groups of experts, from calibration to the pruned checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import load, make_tokenizer
from oracles import call, masked_routers, plan_for
from transformers import PreTrainedModel

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    PruningPlan,
    RequestError,
)
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.methods import list_methods
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.planning.build import build_plan

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
KINDS = ("deepseek_v3", "deepseek_v2", "mistral4")
"""Sigmoid scores and a bias, groups by their two best; softmax, groups by their best; softmax, by their two best."""


@pytest.fixture(scope="module", params=KINDS)
def grouped(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def stats(grouped: str, samples: CalibrationSet) -> CalibrationStats:
    return collect(tiny_model(grouped), samples, set(Need))


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"num_experts": 6}, {"num_experts": 8, "method_options": {"search": "greedy"}}])
@pytest.mark.parametrize("method", [name for name in list_methods() if name != "auto"])
def test_pruned_is_masked(
    grouped: str,
    stats: CalibrationStats,
    method: str,
    settings: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "method_options" in settings and method not in ("enumeration", "mosaic"):
        settings = {"num_experts": 10, "count_multiple_of": 5}
    plan = build_plan(stats, MoEPrunerConfig(method=method, **settings))
    model = tiny_model(grouped)
    assert stats.routing.groups == 2 and moe_blocks(model)[0].num_experts == 12
    whole = logits(model)
    masked = tiny_model(grouped)
    biases = [t for b in moe_blocks(masked) for name, t in b.router_tensors.items() if name.endswith("bias")]
    with contextlib.nullcontext() if biases else masked_routers(masked, plan, monkeypatch):
        for retained, bias in zip(plan.retained.values(), biases, strict=bool(biases)):
            bias[[e for e in range(12) if e not in retained]] = -torch.inf
        expected = logits(masked)
    found = logits(plan.apply(model))
    assert (whole - expected).abs().max() > 0.01 * expected.abs().max(), "the cut must matter"
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_plans_edited_by_hand_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In memory, for files and on the command line, before anything is changed or written."""
    model = tiny_model("deepseek_v3")
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    plan = plan_for(model, 6)
    values = plan.to_dict()
    values["layers"]["1"] |= {"retained": [0, 1, 2, 3, 6, 7], "num_experts": 6}
    (tmp_path / "plan.json").write_text(json.dumps(values))
    edited = PruningPlan.load(tmp_path / "plan.json")
    said = "retains 4, 2 experts of the router's 2 groups, and each must keep the same number, at least 3"
    with pytest.raises(RequestError, match=f"^layer 1: the plan {said}"):
        edited.apply(model)
    assert all(block.num_experts == 12 for block in moe_blocks(model))
    with pytest.raises(RequestError, match=said):
        edited.apply_to_checkpoint(tmp_path / "model", tmp_path / "out")
    with pytest.raises(RequestError, match=r"3, 2 experts .* at least 3\."):
        dataclasses.replace(edited, retained={**plan.retained, 2: (0, 1, 2, 10, 11)}).apply(model)
    with pytest.raises(RequestError, match=r"2, 2 experts .* at least 3\."):
        dataclasses.replace(edited, retained={**plan.retained, 2: (0, 1, 10, 11)}).apply(model)
    code, _, err = call(
        capsys, "apply", "--model", tmp_path / "model", "--plan", tmp_path / "plan.json", tmp_path / "out"
    )
    assert code == 2 and said in err and not (tmp_path / "out").exists()
    values["layers"]["1"] |= {"retained": [0, 1, 2, 3, 6, 7, 8, 9], "num_experts": 8}
    equal = PruningPlan.from_dict(values)
    expected = equal.apply(model)(input_ids=IDS).logits
    found = load(equal.apply_to_checkpoint(tmp_path / "model", tmp_path / "out"))(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)


def test_a_budget_is_refused_before_any_work(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "model")
    with pytest.raises(RequestError, match=r"7 experts, and each of the router's 2 groups .* Ask for 6 or 8\."):
        MoEPruner.from_pretrained(tmp_path / "model", MoEPrunerConfig(method="reap", num_experts=7))
