# SPDX-License-Identifier: Apache-2.0
"""Every row on a tiny model of its type, from calibration to a reloaded pruned checkpoint.

The oracle of pruning is written without the package: the whole model, with the pruned experts' logits (and selection
biases) at minus infinity where the router's own matrix product leaves it.
"""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.tiny import EXPERTS, TINY, UPSTREAM, tiny_config, tiny_model
from architectures.tiny_text import TEXT
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from optimum_moe_prune import MoESpec, Need, PruningPlan, RequestError, list_architectures
from optimum_moe_prune.architectures import overview
from optimum_moe_prune.architectures.table import all_architectures, architecture_of
from optimum_moe_prune.calibration.calibrate import calibrate
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.commands.list import _models
from optimum_moe_prune.models.blocks import model_facts, moe_blocks
from optimum_moe_prune.models.memory import Compute

IDS = torch.randint(3, 96, (2, 16), generator=torch.Generator().manual_seed(0))
TWO = {"min_new_tokens": 2, "max_new_tokens": 2, "do_sample": False}
NEEDS = {Need.ROUTING, Need.ROUTED_NORMS, Need.GRAM}


def known(model_type: str) -> bool:
    try:
        architecture_of(tiny_config(model_type))
    except RequestError:
        return False
    return True


KNOWN = [name for name in TINY if known(name)]
RUNS = [name for name in KNOWN if name not in UPSTREAM]
ONE_OF_EACH_ROW = [name for name in RUNS if name in TEXT or name in ("qwen3_5_moe", "gemma4", "kimi_k25", "step3p7")]


def row(model_type: str) -> MoESpec:
    return architecture_of(tiny_config(model_type))


def test_every_row_is_walked() -> None:
    walked = {architecture_of(tiny_config(name)).model_type for name in KNOWN}
    assert walked == {spec.model_type for spec in all_architectures() if not spec.refused and spec.found is None}


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def plan_of(model: PreTrainedModel, *counts: int) -> PruningPlan:
    """Experts at random, the same number in each group of a layer."""
    draw = random.Random(0)
    blocks = moe_blocks(model)
    retained = {}
    for place, block in enumerate(blocks):
        groups = block.rule.groups
        size = EXPERTS // groups
        each = counts[place % len(counts)] // groups
        members = [draw.sample(range(g * size, (g + 1) * size), each) for g in range(groups)]
        retained[block.layer] = tuple(sorted(expert for group in members for expert in group))
    return PruningPlan(
        model_type=blocks[0].spec.model_type,
        top_k=blocks[0].rule.top_k,
        method="random",
        retained=retained,
        original_num_experts=dict.fromkeys(retained, EXPERTS),
        provenance={"model": model_facts(model)},
    )


@contextlib.contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[None]:
    """Inside, routers choose among the retained experts; no tensor of the model has another shape."""
    undo: list[tuple[nn.Module, str, Any]] = []
    outside: dict[int, list[int]] = {}
    tables = contextlib.ExitStack()
    for block in moe_blocks(model):
        gone = [e for e in range(EXPERTS) if e not in plan.retained[block.layer]]
        # Without a choice there is nothing to mask; nor where a router puts 0 in place of what was masked.
        if block.table is not None or getattr(block.rule, "others_are_zero", False):
            tables.enter_context(block.restricted(plan.retained[block.layer]))
            continue
        outside[id(dict(block.decoder_layer.named_parameters())[block.structure.logits_from])] = gone
        for path in block.structure.router_tensors[1:]:
            owner = block.decoder_layer.get_submodule(path.rpartition(".")[0])
            name = path.rpartition(".")[2]
            if "bias" in name and name in dict(owner.named_buffers(recurse=False)) | dict(owner.named_parameters()):
                value = getattr(owner, name)
                if path != f"{block.structure.router}.bias":  # part of the logits, which are masked
                    undo.append((owner, name, value.clone()))
                    value.data[..., gone] = -torch.inf
    real = functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        out = real(x, weight, bias)
        if id(weight) in outside:
            out = out.clone()
            out[..., outside[id(weight)]] = -torch.inf
        return out

    try:
        with tables, pytest.MonkeyPatch.context() as patch:
            patch.setattr(functional, "linear", linear)
            yield
    finally:
        for owner, name, value in undo:
            getattr(owner, name).data.copy_(value)


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


@pytest.mark.parametrize("model_type", RUNS)
def test_from_calibration_to_reload(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "whole")
    plan = plan_of(model, 8)

    with masked(model, plan):
        expected = logits(model)
    smaller = plan.apply(copy.deepcopy(model))
    assert same(logits(smaller), expected)
    assert not same(logits(model), expected, 1e-3)  # the masks did something, and are gone

    plan.apply_to_checkpoint(tmp_path / "whole", tmp_path / "pruned")
    reloaded = type(model).from_pretrained(tmp_path / "pruned").eval()
    numbers = smaller.state_dict()
    assert numbers.keys() == reloaded.state_dict().keys()
    assert all(torch.equal(value, numbers[name]) for name, value in reloaded.state_dict().items())
    assert reloaded.generate(input_ids=IDS[:1, :6], **TWO).shape == (1, 8)

    stats = calibrate(model, list(IDS), NEEDS, batch_size=1)  # proves the rule of every layer
    if not row(model_type).streams:
        with pytest.raises(RequestError, match="cannot be run one layer at a time"):
            calibrate(tmp_path / "whole", list(IDS), NEEDS, compute=Compute("float32", stream=True))
    else:
        streamed = calibrate(
            tmp_path / "whole", list(IDS), NEEDS, batch_size=1, compute=Compute("float32", stream=True)
        )
        for index, layer in stats.layers.items():
            assert layer.routing == streamed.layers[index].routing
            for name in layer.tensors:
                torch.testing.assert_close(
                    streamed.layers[index].tensors[name], layer.tensors[name], atol=1e-4, rtol=1e-4
                )


@pytest.mark.parametrize("model_type", ONE_OF_EACH_ROW)
def test_layers_of_different_widths(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    plan = plan_of(model, 8, 6, 10)
    if not row(model_type).unequal:
        with pytest.raises(RequestError, match="is not homogeneous across layers"):
            plan.apply(model)
        return
    model.save_pretrained(tmp_path / "whole")
    plan.apply_to_checkpoint(tmp_path / "whole", tmp_path / "pruned")
    smaller = plan.apply(model)
    reloaded = type(smaller).from_pretrained(tmp_path / "pruned").eval()
    assert {block.layer: block.num_experts for block in moe_blocks(reloaded)} == plan.num_experts
    assert same(logits(reloaded), logits(smaller))


@pytest.mark.parametrize("model_type", ONE_OF_EACH_ROW)
def test_rules_hold_in_bfloat16(model_type: str) -> None:
    model = tiny_model(model_type, dtype=torch.bfloat16)
    model.set_experts_implementation("eager") if hasattr(model, "set_experts_implementation") else None
    stats = calibrate(model, list(IDS), {Need.ROUTING}, batch_size=2)
    assert stats.num_experts == dict.fromkeys(stats.num_experts, EXPERTS)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "minimax_m2", "gpt_oss", "qwen3_5_moe"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_plans_cross_between_memory_and_files(model_type: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Whichever precision a model is loaded in, and whether or not its routers are kept in float32."""
    tiny_model(model_type, dtype=stored).save_pretrained(tmp_path / "whole")
    tiny_model(model_type, seed=1, dtype=stored).save_pretrained(tmp_path / "other")
    loaded = type(tiny_model(model_type)).from_pretrained(tmp_path / "whole", dtype=torch.bfloat16).eval()
    made_in_memory = plan_of(loaded, 8)
    made_in_memory.apply_to_checkpoint(tmp_path / "whole", tmp_path / "pruned")
    with pytest.raises(RequestError, match="made for a model with other router weights"):
        made_in_memory.apply_to_checkpoint(tmp_path / "other", tmp_path / "wrong")
    facts = open_layout(tmp_path / "whole").facts()
    of_files = replace(made_in_memory, provenance={"model": facts})
    of_files.apply(loaded)
    of_files.apply(type(loaded).from_pretrained(tmp_path / "whole", dtype=torch.float32))


@pytest.mark.parametrize("model_type", [spec.model_type for spec in all_architectures() if spec.refused])
def test_what_is_refused_is_told_why(model_type: str) -> None:
    assert model_type not in list_architectures()
    if model_type in TINY:
        with pytest.raises(RequestError, match=f"a '{model_type}' model cannot be pruned: "):
            architecture_of(tiny_config(model_type))


def test_the_table_of_models_is_not_stale() -> None:
    page = (Path(overview.__file__).parent / "README.md").read_text(encoding="utf-8")
    written = page.split("<!-- models -->\n")[1].split("\n<!-- /models -->")[0]
    shown, _ = _models(markdown=True)
    assert written == shown, "python -m optimum_moe_prune list models --markdown"
