# SPDX-License-Identifier: Apache-2.0
"""Folders that other tools wrote are called what they are, and not damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from optimum_moe_prune import RequestError
from optimum_moe_prune.checkpoints.layout import open_layout

Tensors = dict[str, torch.Tensor]


def mlx(tensors: Tensors, config: dict) -> Tensors:
    config["quantization"] = {"group_size": 64, "bits": 4}
    stacked: Tensors = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for name in tensors:
        if ".experts.0." in name:
            new = name.replace(".experts.0.", ".switch_mlp.")
            stacked[new] = torch.zeros(8, 4, 4, dtype=torch.int32)
            stacked[new.replace(".weight", ".scales")] = torch.zeros(8, 4, 1)
    return stacked


def packed(quant_method: str, *parts: str) -> Callable[[Tensors, dict], Tensors]:
    """Experts of which some have the tensors of a 4-bit method, as where conversion broke off."""

    def made(tensors: Tensors, config: dict) -> Tensors:
        config["quantization_config"] = {"quant_method": quant_method, "bits": 4, "group_size": 32}
        changed = dict(tensors)
        for name in tensors:
            if ".experts.1." in name:
                weight = changed.pop(name)
                for part in parts:
                    changed[name.replace(".weight", f".{part}")] = torch.zeros(len(weight), 4, dtype=torch.int32)
        return changed

    return made


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (mlx, "MLX, quantised to 4 bits in groups of 64"),
        (packed("gptq", "qweight", "qzeros", "scales", "g_idx"), "GPTQ, quantised to 4 bits"),
        (packed("awq", "qweight", "qzeros", "scales"), "AWQ, quantised to 4 bits"),
    ],
    ids=["mlx", "gptq", "awq"],
)
def test_they_are_named(made: Callable[[Tensors, dict], Tensors], said: str, tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    save_file(
        made(load_file(tmp_path / "model.safetensors"), config), tmp_path / "model.safetensors", {"format": "pt"}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=f"holds weights in another format: {said}.*Prune the original") as error:
        open_layout(tmp_path)
    assert "damaged" not in str(error.value)
