# SPDX-License-Identifier: Apache-2.0
"""Recovered weights in a checkpoint's files: whatever way these hold them, and no other byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures.tiny import tiny_model

from optimum_moe_prune import RunError
from optimum_moe_prune.architectures.structure import structure_of
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.models.down import down_projection
from optimum_moe_prune.recovery.writing import put_into_files

# an expert a tensor; fused; fused and transposed in the model; turned on loading; several shards with other names
KINDS = ("mixtral", "gpt_oss", "llama4_text", "qwen3_vl_moe", "granitemoe", "nemotron_h")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_loads(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    blocks, parameters = moe_blocks(model), dict(model.named_parameters())
    path = structure_of(model, blocks[0].spec).layers
    down = down_projection(blocks[-1])
    assert down is not None
    names = [f"{path}.{block.layer}.{end}" for block in blocks for end in (down.path, block.structure.logits_from)]
    weights = {name: torch.randn_like(parameters[name]) for name in names}
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    put_into_files(tmp_path, weights)
    for name, value in type(model).from_pretrained(tmp_path).named_parameters():
        assert torch.equal(value, weights.get(name, parameters[name])), name


def test_what_is_not_finite_is_not_written(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(RunError, match="was recovered as NaN or infinite"):
        put_into_files(tmp_path, {"model.layers.0.mlp.gate.weight": torch.full((12, 32), torch.nan)})
    assert (tmp_path / "model.safetensors").read_bytes() == before
