# SPDX-License-Identifier: Apache-2.0
"""A small model whose router chooses among groups of experts, from calibration to the pruned checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import load, make_model, make_tokenizer
from optimum_moe_prune.architectures.mixtral import MIXTRAL
from oracles import call, masked_routers, plan_for
from synthetic import GroupedTopK
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.models.mixtral import modeling_mixtral

from optimum_moe_prune import (
    CalibrationSet,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    PruningPlan,
    RequestError,
    register_architecture,
)
from optimum_moe_prune.architectures import table
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.methods import list_methods
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.planning.build import build_plan

IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


class GroupedRouter(modeling_mixtral.MixtralTopKRouter):
    """Mixtral's router, choosing in the better half of the experts it has, as DeepSeek-V3 does."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        scores = logits.float().sigmoid()
        halves = scores.view(len(scores), 2, -1)
        better = halves.topk(2).values.sum(-1).argmax(1)
        weights, chosen = halves[torch.arange(len(scores)), better].topk(self.top_k)
        return logits, weights / weights.sum(-1, keepdim=True), chosen + better[:, None] * halves.shape[2]


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], PreTrainedModel]]:
    """Mixtral is such a model inside the test, and its row says so; the function makes one of twelve experts."""
    row = dataclasses.replace(
        table._ROWS["mixtral"], rule=lambda config: GroupedTopK(config.num_experts_per_tok, 2, 1)
    )
    monkeypatch.setattr(modeling_mixtral, "MixtralTopKRouter", GroupedRouter)
    monkeypatch.setattr(table, "_ROWS", {name: row for name, row in table._ROWS.items() if name != "mixtral"})
    register_architecture(row)
    yield lambda: make_model("mixtral", num_local_experts=12)


@torch.no_grad()
@pytest.mark.parametrize("method", list_methods())
def test_pruned_is_masked(
    grouped: Callable[[], PreTrainedModel], samples: CalibrationSet, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = collect(grouped(), samples, set(Need))
    plan = build_plan(stats, MoEPrunerConfig(method=method, num_experts=6))
    model = grouped()
    whole = model(input_ids=IDS).logits
    with masked_routers(model, plan, monkeypatch):
        expected = model(input_ids=IDS).logits
    found = plan.apply(model)(input_ids=IDS).logits
    assert (whole - expected).abs().max() > 0.01 * expected.abs().max(), "the cut must matter"
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
def test_plans_edited_by_hand_are_refused(
    grouped: Callable[[], PreTrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In memory, for files and on the command line, before anything is changed or written."""
    model = grouped()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    plan = plan_for(model, 6)
    values = plan.to_dict()
    values["layers"]["1"] |= {"retained": [0, 1, 2, 3, 6, 7], "num_experts": 6}
    (tmp_path / "plan.json").write_text(json.dumps(values))
    edited = PruningPlan.load(tmp_path / "plan.json")
    said = "retains 4, 2 experts of the router's 2 groups, and each must keep the same number, at least 2"
    with pytest.raises(RequestError, match=f"^layer 1: the plan {said}"):
        edited.apply(model)
    assert all(block.num_experts == 12 for block in moe_blocks(model))
    with pytest.raises(RequestError, match=said):
        edited.apply_to_checkpoint(tmp_path / "model", tmp_path / "out")
    with pytest.raises(RequestError, match=r"3, 2 experts .* at least 2\."):
        dataclasses.replace(edited, retained={**plan.retained, 2: (0, 1, 2, 10, 11)}).apply(model)
    with pytest.raises(RequestError, match=r"1, 1 experts .* at least 2\."):
        dataclasses.replace(edited, retained={**plan.retained, 2: (0, 11)}).apply(model)
    code, _, err = call(
        capsys, "apply", "--model", tmp_path / "model", "--plan", tmp_path / "plan.json", tmp_path / "out"
    )
    assert code == 2 and said in err and not (tmp_path / "out").exists()
    values["layers"]["1"] |= {"retained": [0, 1, 2, 3, 6, 7, 8, 9], "num_experts": 8}
    equal = PruningPlan.from_dict(values)
    expected = equal.apply(model)(input_ids=IDS).logits
    found = load(equal.apply_to_checkpoint(tmp_path / "model", tmp_path / "out"))(input_ids=IDS).logits
    torch.testing.assert_close(found, expected)


def test_a_budget_is_refused_before_any_work(grouped: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    grouped().save_pretrained(tmp_path / "model")
    with pytest.raises(RequestError, match=r"7 experts, and each of the router's 2 groups .* Ask for 6 or 8\."):
        MoEPruner.from_pretrained(tmp_path / "model", MoEPrunerConfig(method="reap", num_experts=7))
