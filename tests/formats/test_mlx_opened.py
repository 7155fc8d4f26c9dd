# SPDX-License-Identifier: Apache-2.0
"""mlx-lm opens cut MLX folders, and answers as the masked original does."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures.tiny import tiny_model
from mlx_models import answers, converted, mask, mx, opened, saved_for_mlx
from oracles import plan_for
from safetensors.torch import load_file

from optimum_moe_prune.formats import form_of
from optimum_moe_prune.formats.mlx.numbers import dequantised

WIDE = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}  # groups of 32 are the smallest of mlx
MODELS = {
    "mixtral": {
        "sliding_window": None,
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "head_dim": None,
        "intermediate_size": 32,
    },
    "qwen2_moe": {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": False, **WIDE}
    | {"intermediate_size": 64, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**WIDE, "intermediate_size": 64},
    "deepseek_v3": {"n_group": 1, "topk_group": 1, **WIDE, "intermediate_size": 64},
}
IDS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_folder_answers_as_the_masked_original(name: str, tmp_path: Path) -> None:
    model = tiny_model(name, **MODELS[name])
    plan = plan_for(model, 6)
    checkpoint = saved_for_mlx(model, tmp_path / "checkpoint")
    with torch.no_grad():
        pruned = plan.apply(copy.deepcopy(model))(input_ids=IDS).logits
        whole = model(input_ids=IDS).logits
    out = plan.apply_to_checkpoint(converted(checkpoint, tmp_path / "float"), tmp_path / "out")
    assert torch.allclose(answers(opened(out), IDS), pruned, atol=1e-4)
    assert not torch.allclose(pruned, whole, atol=0.5)

    source = converted(checkpoint, tmp_path / "four", bits=4)
    names = load_file(source / "model.safetensors")
    assert any(name.endswith("switch_mlp.up_proj.biases") for name in names)
    assert any(name.endswith("gate.biases") for name in names) == (name != "deepseek_v3")
    four = plan.apply_to_checkpoint(source, tmp_path / "out four")
    masked = opened(source)
    assert not torch.allclose(answers(masked, IDS), answers(opened(four), IDS), atol=0.5)
    mask(masked, plan.retained)
    assert torch.allclose(answers(masked, IDS), answers(opened(four), IDS), atol=1e-4)


@pytest.mark.parametrize(("mode", "bits", "group"), [("mxfp4", 4, 32), ("nvfp4", 4, 16)])
def test_other_modes_are_cut_alike(mode: str, bits: int, group: int, tmp_path: Path) -> None:
    model = tiny_model("qwen3_moe", **MODELS["qwen3_moe"])
    plan = plan_for(model, 6)
    source = converted(saved_for_mlx(model, tmp_path / "checkpoint"), tmp_path / "source", bits, group, mode)
    form = form_of(source)
    assert form is not None
    cut = form.prepare(plan, source, tmp_path / "out")
    assert "as far as these tell" in cut.facts["known_by"]
    masked = opened(source)
    mask(masked, plan.retained)
    assert torch.allclose(answers(masked, IDS), answers(opened(cut.write()), IDS), atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "bits", "group"),
    [("affine", bits, 32) for bits in (2, 3, 4, 5, 6, 8)] + [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_numbers_are_those_of_mlx(mode: str, bits: int, group: int) -> None:
    weight = mx.array(np.random.default_rng(bits).standard_normal((6, 128)).astype(np.float32))
    packed, scales, *biases = mx.quantize(weight, group, bits, mode=mode)
    exact = mx.dequantize(packed, scales, *biases, group_size=group, bits=bits, mode=mode).astype(mx.float32)
    tensors = [torch.from_numpy(np.array(array)) for array in (packed, scales, *biases)]
    ours = dequantised(tensors[0], tensors[1], tensors[2] if biases else None, 128)
    assert torch.allclose(ours, torch.from_numpy(np.array(exact)), atol=1e-6)


def test_numbers_with_a_scale_of_the_whole() -> None:
    weight = mx.array(np.random.default_rng(0).standard_normal((6, 128)).astype(np.float32))
    whole = mx.max(mx.abs(weight)).astype(mx.float32)
    packed, scales = mx.quantize(weight, 16, 4, mode="nvfp4", global_scale=whole)
    exact = mx.dequantize(packed, scales, None, 16, 4, mode="nvfp4", global_scale=whole).astype(mx.float32)
    arrays = [torch.from_numpy(np.array(array)) for array in (packed, scales, whole)]
    ours = dequantised(arrays[0], arrays[1], None, 128, arrays[2])
    assert torch.allclose(ours, torch.from_numpy(np.array(exact)), atol=1e-5)
