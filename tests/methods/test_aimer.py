# SPDX-License-Identifier: Apache-2.0
"""AIMER: from files and from memory, alone and beside a calibration, the same as an oracle's."""

from __future__ import annotations

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures.published import LAYOUTS, dequantised
from architectures.tiny import tiny_model
from conftest import load, make_texts, save_checkpoint
from oracles import call
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    RequestError,
    RunError,
    calibrate,
    compare_methods,
)
from optimum_moe_prune.calibration import calibrate as calibration
from optimum_moe_prune.calibration.calibrate import no_calibration
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.checkpoints.plain import Plain
from optimum_moe_prune.planning.build import build_plan

AIMER = MoEPrunerConfig(method="aimer", num_experts=4)


def straight(weights: list[torch.Tensor]) -> np.ndarray:
    """The scores of experts from tensors with a matrix of each ``(E, ...)``."""
    flat = torch.cat([tensor.detach().double().flatten(1) for tensor in weights], dim=1)
    return (flat.square().mean(1).sqrt() / flat.abs().mean(1)).numpy()


def assert_scores(stats: CalibrationStats, expected: dict[int, np.ndarray]) -> None:
    plan = build_plan(stats, AIMER)
    assert plan.scores is not None and plan.scores.keys() == expected.keys()
    for layer, scores in expected.items():
        np.testing.assert_allclose(plan.scores[layer], scores, rtol=1e-6)
        assert set(plan.retained[layer]) == set(np.argsort(-scores, kind="stable")[:4].tolist())


def of_mixtral(model: PreTrainedModel) -> dict[int, np.ndarray]:
    """With the fused tensors transformers has in memory; in the files each expert has three of its own."""
    experts = [layer.mlp.experts for layer in model.model.layers]
    return {index: straight([e.gate_up_proj, e.down_proj]) for index, e in enumerate(experts)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_from_memory_and_from_files_as_an_oracle_says(
    dtype: torch.dtype, tmp_path: Path, tokenizer: PreTrainedTokenizerFast, samples: CalibrationSet
) -> None:
    folder = save_checkpoint("mixtral", tmp_path, tokenizer, dtype)
    model = load(folder)
    expected = of_mixtral(model)
    needs = [Need.WEIGHTS]
    for found in (no_calibration(model, needs=needs), no_calibration(folder, needs=needs)):
        assert not found.samples and found.needs == {Need.WEIGHTS}
        assert_scores(found, expected)
    wider = Compute("float32", "cpu")
    for stream in (True, False):  # beside what text says
        assert_scores(calibrate(folder, samples, ["reap", "aimer"], compute=replace(wider, stream=stream)), expected)
    assert_scores(calibrate(model, samples, ["reap", "aimer"], compute=wider), expected)


def test_biases_and_other_layouts(tmp_path: Path) -> None:
    """Experts in one tensor each, the other way round than others, with biases; experts that lie in groups."""
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path)
    experts = [layer.mlp.experts for layer in model.model.layers]
    expected = {n: straight([e.gate_up_proj, e.down_proj]) for n, e in enumerate(experts)}
    assert_scores(no_calibration(tmp_path, needs=[Need.WEIGHTS]), expected)
    with torch.no_grad():
        experts[0].down_proj_bias += 100
    assert_scores(no_calibration(model, needs=[Need.WEIGHTS]), expected)


def test_an_expert_without_weights_goes_first(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    with torch.no_grad():
        for tensor in (model.model.layers[0].mlp.experts.gate_up_proj, model.model.layers[0].mlp.experts.down_proj):
            tensor[1] = 0
    plan = build_plan(no_calibration(model, needs=[Need.WEIGHTS]), AIMER)
    assert plan.scores is not None and plan.scores[0][1] == 0 and 1 not in plan.retained[0]


def test_files_are_read_one_tensor_at_a_time_and_no_model_is_loaded(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer)
    monkeypatch.setattr(calibration, "load_model", None)
    monkeypatch.setattr(calibration, "collect_streamed", None)
    seen: list[weakref.ref[torch.Tensor]] = []
    own = Plain.read

    def read(self: Plain, *arguments: object) -> torch.Tensor:
        assert not any(tensor() is not None for tensor in seen)
        value = own(self, *arguments)  # type: ignore[arg-type]
        seen.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Plain, "read", read)
    MoEPruner.from_pretrained(folder, AIMER).prune_checkpoint(tmp_path / "out")
    assert len(seen) == 3 * 8 * 3  # layers, experts, matrices


@pytest.mark.parametrize("layout", ["qwen3_moe_fp8", "gpt_oss_mxfp4"])
def test_quantised_files_are_dequantised(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path)
    found: dict[int, dict[int, list[torch.Tensor]]] = {}
    for name, tensor in dequantised(tmp_path).items():
        if (match := re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)?", name)) and not name.endswith("bias"):
            matrices = enumerate(tensor) if match[2] is None else [(int(match[2]), tensor)]
            for expert, matrix in matrices:
                found.setdefault(int(match[1]), {}).setdefault(expert, []).append(matrix.float().reshape(1, -1))
    expected = {
        layer: np.concatenate([straight(experts[number]) for number in sorted(experts)])
        for layer, experts in found.items()
    }
    assert_scores(no_calibration(tmp_path, needs=[Need.WEIGHTS]), expected)


def test_damaged_files_are_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if ".experts.2." in n)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(RunError, match=f"{name} holds NaN"):
        no_calibration(folder, needs=[Need.WEIGHTS])


def test_commands_without_a_calibration(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer)
    expected = build_plan(no_calibration(folder, needs=[Need.WEIGHTS]), AIMER)
    recipe = ("--method", "aimer", "--num-experts", 4)
    assert call(capsys, "run", "--model", folder, *recipe, tmp_path / "out")[0] == 0
    written = json.loads((tmp_path / "out" / "moe_pruning_plan.json").read_text())
    assert {int(n): tuple(layer["retained"]) for n, layer in written["layers"].items()} == expected.retained
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))
    score = ("score", "--model", folder, "--calibration", texts)
    code, _, err = call(capsys, *score, "--method", "aimer", tmp_path / "no")
    assert code == 2 and "method 'aimer' needs no calibration" in err
    assert call(capsys, *score, "--method", "all", tmp_path / "stats")[0] == 0
    assert call(capsys, "plan", "--stats", tmp_path / "stats", *recipe, tmp_path / "plan.json")[0] == 0
    of_stats = json.loads((tmp_path / "plan.json").read_text())
    assert {int(n): tuple(layer["retained"]) for n, layer in of_stats["layers"].items()} == expected.retained


def test_statistics_keep_merge_and_lack_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, samples: CalibrationSet
) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer)
    model = load(folder).float()
    halves = [CalibrationSet.build(make_texts(4, seed=seed), tokenizer) for seed in (1, 2)]
    needs = {Need.ROUTING, Need.WEIGHTS}
    parts = [collect(model, half, needs) for half in halves]
    merged = parts[0].merge(parts[1])
    merged.save(tmp_path / "merged")
    expected = of_mixtral(model)
    for stats in (merged, CalibrationStats.load(tmp_path / "merged")):
        assert_scores(stats, expected)
    alone = no_calibration(folder, needs=[Need.WEIGHTS])
    alone.save(tmp_path / "alone")
    assert_scores(CalibrationStats.load(tmp_path / "alone"), expected)
    with pytest.raises(RequestError, match="method 'aimer' needs the statistics weights, and these hold routing"):
        build_plan(collect(model, samples, {Need.ROUTING}), AIMER)


def test_compared_with_what_reads_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, samples: CalibrationSet
) -> None:
    folder = save_checkpoint("mixtral", tmp_path / "model", tokenizer)
    heldout = make_texts(3, seed=5)
    stats = collect(load(folder), samples, {Need.ROUTING})  # which hold no weights; the model does
    for chosen_on in (stats, samples):
        found = compare_methods(
            folder, chosen_on, heldout, methods=["frequency", "aimer"], sparsities=[0.5], tokenizer=tokenizer
        )
        plan = next(plan for plan in found.plans.values() if plan.method == "aimer")
        assert plan.retained == build_plan(no_calibration(folder, needs=[Need.WEIGHTS]), AIMER).retained
        assert plan.provenance["calibration"]["samples"] == 0
