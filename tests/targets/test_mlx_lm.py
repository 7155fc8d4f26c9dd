# SPDX-License-Identifier: Apache-2.0
"""What mlx-lm reads of checkpoints: with the keys of ``--for mlx`` its logits are transformers', or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.tiny import TINY, tiny_config, tiny_model
from mlx_models import answers, opened, saved_for_mlx
from oracles import call, plan_for
from transformers import AutoModelForCausalLM

from optimum_moe_prune.architectures.table import find_architecture
from optimum_moe_prune.targets.mlx_lm import MLX
from optimum_moe_prune.targets.mlx_models import MODELS

ROPE = {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN, LINEAR = {"rope_type": "yarn", **ROPE}, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
ALL_SPARSE = {"mlp_only_layers": [], "decoder_sparse_step": 1}
SAME: list[tuple[str, dict[str, Any]]] = [
    ("mixtral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("qwen2_moe", {**ALL_SPARSE, "norm_topk_prob": False}),
    ("qwen3_moe", {}),
    ("glm4_moe", {}),
    ("exaone_moe", {}),
    ("gemma4", {}),
    ("granitemoehybrid", {}),
    ("nemotron_h", {}),
    ("deepseek_v3", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("mixtral", {}, "does not know this model's sliding window (8 tokens)"),
    ("mixtral", {"sliding_window": None, "hidden_act": "gelu"}, "with silu whatever hidden_act says"),
    ("mixtral", {"sliding_window": None, "head_dim": 16}, "says something else"),
    ("qwen2_moe", {}, "every layer of this model with experts"),
    ("qwen2_moe", {**ALL_SPARSE, "norm_topk_prob": True}, "does not read norm_topk_prob"),
    ("qwen3_moe", {"rope_parameters": YARN}, "rotary embeddings of the type 'yarn'"),
    ("qwen3_moe", {"attention_bias": True}, "has no biases in this model's attention"),
    ("deepseek_v2", {}, "with scaled rotary embeddings only"),
    ("deepseek_v3", {"rope_interleave": False}, "rotates neighbouring numbers"),
    ("deepseek_v3", {"num_experts_per_tok": 1}, "does not normalise the weight of a single expert"),
    ("deepseek_v3", {"tie_word_embeddings": True}, "wants an output layer of its own"),
    ("olmoe", {"clip_qkv": 0.5}, "does not read clip_qkv"),
    ("minimax_m3_vl", {}, "goes by rotary_dim"),
    ("jamba", {}, "divides the weights"),
    ("ernie4_5_moe", {}, "drops the correction bias"),
    ("kimi_linear", {}, "wants linear_attn_config in config.json, and this has none"),
]
IDS = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))


def check(config: Any, counts: dict[int, int] | None = None) -> str | None:
    spec = find_architecture(config)
    assert spec is not None
    return MLX.check(spec, config, counts, 1)


@pytest.mark.parametrize(("name", "settings"), SAME, ids=[name for name, _ in SAME])
def test_its_logits_are_those_of_transformers(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(name, **settings)
    assert check(model.config) is None and MODELS[model.config.model_type].compared
    folder = saved_for_mlx(model, tmp_path / "checkpoint")
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert torch.allclose(answers(opened(folder), IDS), expected, atol=1e-3)
        again = type(model).from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(again(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(("name", "settings", "why"), REFUSED)
def test_what_it_would_calculate_otherwise_is_refused(name: str, settings: dict[str, Any], why: str) -> None:
    assert why in (check(tiny_config(name, **settings)) or "")


@pytest.mark.parametrize(
    ("name", "settings"),
    [("qwen2_moe", {**ALL_SPARSE, "norm_topk_prob": True}), ("qwen3_moe", {"rope_parameters": LINEAR})],
)
def test_refusals_are_true(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Whoever makes mlx-lm read these finds out here."""
    model = tiny_model(name, **settings)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    assert check(model.config) is not None
    assert not torch.allclose(answers(opened(saved_for_mlx(model, tmp_path / "m")), IDS), expected, atol=0.1)


def test_experts_as_transformers_5_names_them() -> None:
    config = tiny_config("gpt_oss")
    config.transformers_version = "5.24.0"  # as it is read from a file
    assert "as transformers 5 names them in files" in (check(config) or "")
    config.quantization_config = {"quant_method": "mxfp4"}
    assert check(config) is None
    config.transformers_version, config.quantization_config = "4.55.0", None
    assert check(config) is None


def test_unequal_layers_and_unknown_types() -> None:
    config = tiny_config("olmoe")
    assert check(config, {0: 4, 1: 4}) is None
    assert check(config, {0: 4, 1: 5}) == "builds all layers with the same number of experts"
    assert not MLX.knows(tiny_config("hy_v3")) and check(tiny_config("hy_v3")) is None
    assert MLX.config({"model_type": "hy_v3", "rope_parameters": {"rope_theta": 1.0}}, {}) == {
        "model_type": "hy_v3",
        "rope_parameters": {"rope_theta": 1.0},
    }


def test_rows_are_of_models_that_are_known() -> None:
    assert [name for name in MODELS if name in TINY and find_architecture(tiny_config(name)) is None] == []


def test_an_output_for_mlx_is_opened_by_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    plan_for(model, 6).save(tmp_path / "plan.json")
    given = ["apply", "--model", tmp_path / "model", "--plan", tmp_path / "plan.json", "--for", "mlx"]
    code, _, error = call(capsys, *given, tmp_path / "out")
    assert code == 0, error
    assert "mlx-lm 0.32.2" in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_experts"], config["num_local_experts"], config["rope_theta"]) == (6, 6, 10000.0)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(answers(opened(tmp_path / "out"), IDS), loaded(input_ids=IDS).logits, atol=1e-4)


def test_what_it_refuses_whatever_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("qwen3_moe", rope_parameters=YARN)
    model.save_pretrained(tmp_path / "model")
    plan_for(model, 6).save(tmp_path / "plan.json")
    given = ["--model", tmp_path / "model", "--for", "mlx"]
    code, _, error = call(capsys, "apply", *given, "--plan", tmp_path / "plan.json", tmp_path / "out")
    assert code == 2 and "'yarn' as transformers does for this model. Leave out --for mlx" in error
    (tmp_path / "text.txt").write_text("some words")
    run = ["run", *given, "--calibration", tmp_path / "text.txt", "--method", "random", "--num-experts", 6]
    code, _, error = call(capsys, *run, tmp_path / "out")
    assert code == 2 and "Leave out --for mlx" in error and "random:" not in error
    assert not (tmp_path / "out").exists()
