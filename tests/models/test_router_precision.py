# SPDX-License-Identifier: Apache-2.0
"""Routers in another precision than the model, or than its files: the same plans, tensors and numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.tiny import TINY, UPSTREAM, model_class, tiny_config, tiny_model
from conftest import VOCABULARY, assert_equal_states
from safetensors.torch import load_file
from transformers import AutoConfig

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan, RequestError
from optimum_moe_prune.architectures.fingerprint import same_routers
from optimum_moe_prune.architectures.table import architecture_of
from optimum_moe_prune.calibration.calibrate import calibrate
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.models.blocks import model_facts, moe_blocks
from optimum_moe_prune.models.memory import Compute
from optimum_moe_prune.statistics.needs import Need

HALF = MoEPrunerConfig(method="random", num_experts=6)
FAST = ("deepseek_v3",)  # router and bias are kept in float32; elsewhere the bias alone, or nothing


def dtypes(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in load_file(folder / "model.safetensors").items()}


def pruned_of(plan: PruningPlan, source: Path, target: Path) -> Any:
    plan.apply_to_checkpoint(source, target)
    return load(target)


def load(folder: Path, dtype: Any = "auto") -> Any:
    config = AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder, config=config, dtype=dtype).eval()


def known(model_type: str) -> bool:
    try:
        return bool(architecture_of(tiny_config(model_type)))
    except RequestError:
        return False


@pytest.mark.parametrize(
    "model_type",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in TINY
        if name not in UPSTREAM and known(name)
    ],
)
def test_kept_in_float32_or_not(model_type: str, tmp_path: Path) -> None:
    """A checkpoint of bfloat16 alone, whose routers a loaded model keeps in float32 where its class says so."""
    kept = tiny_model(model_type, dtype=torch.bfloat16)
    in_files = type(kept)._from_config(kept.config, dtype=torch.bfloat16)
    in_files.load_state_dict(kept.state_dict())
    in_files.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    kept.save_pretrained(tmp_path / "kept")
    for folder in (tmp_path / "bfloat16", tmp_path / "kept"):
        model, whole = load(folder), load(folder)
        before = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        layout = open_layout(folder)
        assert same_routers(layout.facts(), model_facts(model))
        pruner = MoEPruner(HALF, source=folder)
        assert pruner.prune(model) is model
        plan = pruner.pruning_plan
        pruner.save_pretrained(tmp_path / f"{folder.name} in memory")
        assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == before
        again = load(tmp_path / f"{folder.name} in memory")
        assert_equal_states(again, model)
        assert_equal_states(pruned_of(plan, folder, tmp_path / f"{folder.name} files"), model)
        written, source = dtypes(tmp_path / f"{folder.name} files"), dtypes(folder)
        assert all(source[name] == dtype for name, dtype in written.items() if name in source)
        of_files = replace(plan, provenance={"model": layout.facts()})
        assert_equal_states(of_files.apply(whole), model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_plans_cross_to_float16(stored: torch.dtype, tmp_path: Path) -> None:
    """Which has fewer bits than bfloat16 for what is small."""
    loaded = torch.float16
    model = tiny_model("qwen3_moe")
    with torch.no_grad():
        for block in moe_blocks(model):
            block.router.weight[::3] *= 1e-5
    model.to(stored).save_pretrained(tmp_path / "whole")
    tiny_model("qwen3_moe", seed=1).to(stored).save_pretrained(tmp_path / "other")
    in_memory = load(tmp_path / "whole", loaded)
    pruner = MoEPruner(HALF)
    pruner.prune(load(tmp_path / "whole", loaded))
    plan = pruner.pruning_plan
    assert plan is not None
    plan.apply_to_checkpoint(tmp_path / "whole", tmp_path / "pruned")
    with pytest.raises(RequestError, match="other router weights"):
        plan.apply_to_checkpoint(tmp_path / "other", tmp_path / "wrong")
    replace(plan, provenance={"model": open_layout(tmp_path / "whole").facts()}).apply(in_memory)
    assert {name: t.dtype for name, t in load(tmp_path / "pruned").state_dict().items()} == dict.fromkeys(
        in_memory.state_dict(), stored
    )


def test_routers_that_a_person_keeps_in_float32(tmp_path: Path) -> None:
    """The files hold each tensor as it is in memory."""
    model = tiny_model("mixtral", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "whole")
    for block in moe_blocks(model):
        block.router.float()
    pruner = MoEPruner(HALF, source=tmp_path / "whole")
    pruner.prune(model)
    pruner.save_pretrained(tmp_path / "pruned")
    written = dtypes(tmp_path / "pruned")
    assert {dtype for name, dtype in written.items() if "gate.weight" in name} == {torch.float32}
    assert {dtype for name, dtype in written.items() if "gate.weight" not in name} == {torch.bfloat16}
    assert_equal_states(load(tmp_path / "pruned"), model.to(torch.bfloat16))  # where transformers knows no better


def test_streamed_routers_are_kept_in_float32_as_well(tmp_path: Path) -> None:
    """Numbers that bfloat16 has not: what is routed is the same only where they are kept."""
    tiny_model("deepseek_v3").save_pretrained(tmp_path)
    ids = list(torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0)))
    whole, streamed = (
        calibrate(tmp_path, ids, Need.ROUTING, batch_size=4, compute=Compute("bfloat16", stream=stream))
        for stream in (False, True)
    )
    for index, layer in whole.layers.items():
        assert layer.tensors.keys() == streamed.layers[index].tensors.keys()
        for name, tensor in layer.tensors.items():
            assert torch.equal(tensor, streamed.layers[index].tensors[name]), name
