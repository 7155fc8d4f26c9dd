# SPDX-License-Identifier: Apache-2.0
"""Pruned models against the original with the pruned experts masked in the router, and through save and reload."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import KINDS, aligned, load, make_model
from oracles import masked_routers, plan_for
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe_prune import PruningPlan, RequestError
from optimum_moe_prune.models.blocks import moe_blocks

IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))


def assert_masked(model: PreTrainedModel, plan: PruningPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the bit: a router of another width is another matrix product, and how it rounds is the processor's."""
    whole = model(input_ids=IDS).logits
    with masked_routers(model, plan, monkeypatch):
        expected = model(input_ids=IDS).logits
    found = plan.apply(model)(input_ids=IDS).logits
    scale = expected.abs().max()
    assert (whole - expected).abs().max() > 0.01 * scale, "the cut must matter"
    assert (found - expected).abs().max() <= 1e-5 * scale


@torch.no_grad()
@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("num_experts", [3, 4, 6])
def test_pruned_is_masked(kind: str, num_experts: int, allocation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(kind)
    plans = (plan_for(model, num_experts, seed, allocation) for seed in range(50))
    room = num_experts > moe_blocks(model)[0].routing.top_k
    plan = next(p for p in plans if (p.uniform_num_experts is None) == (allocation == "global" and room))
    assert_masked(model, plan, monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_pruned_is_masked_whatever_runs_the_experts(
    kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind)
    model.set_experts_implementation(implementation)
    assert_masked(model, plan_for(model), monkeypatch)


@torch.no_grad()
def test_bfloat16_pruned_is_masked_where_nothing_ties(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tokens whose routing was decided without a tie in any layer, within the rounding of bfloat16."""
    model = make_model(kind).to(torch.bfloat16)
    plan = plan_for(model)
    tied = torch.zeros(IDS.numel(), dtype=torch.bool)

    def note_ties(module: torch.nn.Module, _inputs: object, output: tuple[Tensor, ...]) -> None:
        best = output[0].float().topk(module.top_k + 1, dim=-1).values
        tied.logical_or_(best[:, -1] == best[:, -2])

    with masked_routers(model, plan, monkeypatch):
        handles = [block.router.register_forward_hook(note_ties) for block in moe_blocks(model)]
        expected = model(input_ids=IDS).logits.flatten(0, 1)
        for handle in handles:
            handle.remove()
    found = plan.apply(model)(input_ids=IDS).logits.flatten(0, 1)
    # Attention carries a tie to later tokens of its sample.
    clean = ~tied.view(IDS.shape).cummax(1).values.flatten()
    assert clean.sum() > 5
    scale = expected[clean].abs().max()
    assert ((found - expected)[clean].abs().max()) <= 0.05 * scale


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_count_follows(kind: str, implementation: str) -> None:
    model = make_model(kind)
    plan = plan_for(model)
    model.set_experts_implementation(implementation)
    parameters = sum(p.numel() for p in model.parameters())
    plan.apply(model)
    count_key = "num_local_experts" if kind == "mixtral" else "num_experts"
    assert getattr(model.config, count_key) == model.num_experts == 4
    for block in moe_blocks(model):
        assert block.experts.num_experts == block.router.num_experts == block.num_experts == 4
        assert all(
            len(t) == 4 and t.is_contiguous() for t in (*block.expert_tensors.values(), *block.router_tensors.values())
        )
    assert sum(p.numel() for p in model.parameters()) < parameters
    model.train()
    result = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    result.loss.backward()
    assert torch.isfinite(result.aux_loss)
    assert all(p.grad is not None for p in model.parameters())


def test_requires_grad_and_training_mode_survive() -> None:
    model = make_model().train()
    model.model.layers[0].mlp.experts.gate_up_proj.requires_grad_(False)
    plan_for(model).apply(model)
    assert model.training
    assert not model.model.layers[0].mlp.experts.gate_up_proj.requires_grad
    assert model.model.layers[1].mlp.experts.gate_up_proj.requires_grad


def test_the_rows_that_stay_are_the_retained_ones(kind: str) -> None:
    model, original = make_model(kind), make_model(kind)
    plan = plan_for(model)
    plan.apply(model)
    for now, before in zip(moe_blocks(model), moe_blocks(original), strict=True):
        rows = list(plan.retained[now.layer])
        for name, tensor in now.expert_tensors.items():
            assert torch.equal(tensor, before.expert_tensors[name][rows])
        for name, tensor in now.router_tensors.items():
            assert torch.equal(tensor, before.router_tensors[name][rows])
    for (name, now_p), (_, before_p) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        if "experts." not in name and "gate.weight" not in name:
            assert torch.equal(now_p, before_p)


RELOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "optimum_moe_prune" not in sys.modules
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        torch.save({"logits": model(input_ids=ids).logits, "generated": model.generate(ids, max_new_tokens=5,
        do_sample=False),
                    "state": model.state_dict()}, folder + "/result.pt")
assert "optimum_moe_prune" not in sys.modules
"""


def test_a_fresh_process_reloads_with_plain_transformers(tmp_path: Path) -> None:
    models: dict[Path, PreTrainedModel] = {}
    for kind, dtype in itertools.product(KINDS, (torch.float32, torch.bfloat16)):
        base, pruned = (tmp_path / f"{kind} {dtype} {name}" for name in ("base", "pruned"))
        make_model(kind).to(dtype).save_pretrained(base)
        model = load(base)
        assert model.dtype == dtype
        aligned(plan_for(model).apply(model)).save_pretrained(pruned, max_shard_size="20KB")
        assert len(list(pruned.glob("*.safetensors"))) > 1
        models[pruned] = model
    torch.save(IDS, tmp_path / "ids.pt")
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "ids.pt"), *map(str, models)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    for folder, model in models.items():
        result = torch.load(folder / "result.pt")
        with torch.no_grad():
            assert torch.equal(result["logits"], model(input_ids=IDS).logits)
            assert torch.equal(result["generated"], model.generate(IDS, max_new_tokens=5, do_sample=False))
        state = model.state_dict()
        assert result["state"].keys() == state.keys()
        assert all(torch.equal(result["state"][name], tensor) for name, tensor in state.items())


def test_a_plan_of_another_model_is_refused_and_nothing_changes(kind: str) -> None:
    model = make_model(kind)
    before = model.state_dict()
    others = {
        "other router weights": plan_for(make_model(kind, seed=1)),
        "for another model, with 6 experts in layer 0; this model has": plan_for(
            make_model(kind, **{"num_local_experts" if kind == "mixtral" else "num_experts": 6})
        ),
        "it names layer 3, and the model has layers 0 to 2": plan_for(make_model(kind, num_hidden_layers=4)),
    }
    other_kind = "qwen2_moe" if kind == "mixtral" else "mixtral"
    others[f"this plan is for a '{other_kind}' model"] = plan_for(make_model(other_kind))
    for message, plan in others.items():
        with pytest.raises(RequestError, match=message):
            plan.apply(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_plan_is_not_applied_twice() -> None:
    model = make_model()
    plan = plan_for(model)
    plan.apply(model)
    with pytest.raises(RequestError, match="with 8 experts in layer 0; this model has 4"):
        plan.apply(model)
