# SPDX-License-Identifier: Apache-2.0
"""Which precision is calculated in, by what products take; and who is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import make_model, save_checkpoint
from oracles import assert_identical, assert_same, calibrated, layout_of
from safetensors.torch import load_file, save_file

from optimum_moe_prune import (
    CalibrationSet,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    RequestError,
    calibrate,
    evaluate,
    measure_sensitivity,
)
from optimum_moe_prune import compare as compare_models
from optimum_moe_prune.calibration import streamed as streamed_calibration
from optimum_moe_prune.compat.experts import grouped_product
from optimum_moe_prune.evaluation.compare_methods import compare_methods
from optimum_moe_prune.models import precision
from optimum_moe_prune.models.memory import begun_with
from optimum_moe_prune.models.precision import computing_dtype, is_slow, measured, ratio
from optimum_moe_prune.planning.work import plan_work
from optimum_moe_prune.statistics.needs import Need
from optimum_moe_prune.storage.growing import unfinished

REAP = {Need.ROUTING, Need.ROUTED_NORMS}


@pytest.mark.parametrize(
    ("narrow", "wide", "slow"),
    [
        ({"plain": 7.8, "grouped": 11.3}, {"plain": 0.67, "grouped": 0.47}, True),  # AVX2
        ({"plain": 1.9, "grouped": 1.6}, {"plain": 0.45, "grouped": 0.40}, True),  # AVX-512 without units
        ({"plain": 0.45, "grouped": 0.6}, {"plain": 0.40, "grouped": 0.20}, False),  # with bfloat16 units alone
        ({"plain": 0.16, "grouped": 0.30}, {"plain": 0.41, "grouped": 0.18}, False),  # AMX
        ({"plain": 0.47, "grouped": 0.39}, {"plain": 0.44, "grouped": 0.20}, False),  # the same, float16
    ],
)
def test_decided_by_what_was_measured(narrow: dict[str, float], wide: dict[str, float], slow: bool) -> None:
    assert is_slow(ratio(narrow, wide)) == slow


def test_the_least_of_several_times_but_not_the_first() -> None:
    """Both precisions in turn; what else the machine does, for a while, adds to some times of both."""
    runs = [(50.0, 50.0), (9.0, 1.0), (8.0, 30.0), (700.0, 600.0), (8.5, 2.0)]
    now = 0.0
    ticks: list[float] = []
    for narrow, wide in runs:
        for taken in (narrow, wide, narrow, wide):  # plain and grouped
            ticks += [now, now + taken]
            now += taken + 5
    narrow_least, wide_least = measured(torch.bfloat16, iter(ticks).__next__)
    assert {kind: round(t, 9) for kind, t in narrow_least.items()} == {"plain": 8.0, "grouped": 8.0}
    assert {kind: round(t, 9) for kind, t in wide_least.items()} == {"plain": 1.0, "grouped": 1.0}


def test_only_processors_only_narrow_ones_only_where_nothing_is_asked_for(multiplied: Callable) -> None:
    multiplied(12.0)
    assert computing_dtype(torch.bfloat16, "cpu") == computing_dtype(torch.float16, "cpu") == torch.float32
    assert computing_dtype(torch.bfloat16, "cuda:1") == torch.bfloat16
    assert computing_dtype(torch.float32, "cpu") == torch.float32
    assert computing_dtype(torch.bfloat16, "cpu", "bfloat16") == torch.bfloat16
    assert computing_dtype(torch.bfloat16, "cpu", "float16") == torch.float16
    multiplied(1.7)
    assert computing_dtype(torch.bfloat16, "cpu") == torch.bfloat16


def test_the_product_of_transformers_own_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.integrations import moe

    x, weight = torch.randn(12, 8), torch.randn(3, 8, 4)
    ends = torch.tensor([4, 4, 12], dtype=torch.int32)
    expected = torch.cat([x[:4] @ weight[0], x[4:] @ weight[2]])
    torch.testing.assert_close(grouped_product(x, weight, ends), expected)
    monkeypatch.delattr(moe, "_grouped_mm")
    torch.testing.assert_close(grouped_product(x, weight, ends), expected)


# ------------------------------------------------------------------------------------------- what is done with it


@pytest.fixture
def small(tmp_path: Path, tokenizer: Any) -> Path:
    return save_checkpoint("mixtral", tmp_path / "small", tokenizer)


def numbers_in_float32(folder: Path, samples: CalibrationSet, **how: Any) -> Any:
    return calibrated(layout_of(folder), samples, Need, dtype="float32", **how)


@pytest.mark.parametrize("stream", [False, True])
def test_statistics_of_bfloat16_files_in_float32(
    small: Path, samples: CalibrationSet, multiplied: Callable, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    narrow = calibrated(layout_of(small), samples, Need, stream=stream)
    multiplied(12.4)
    precision._say.cache_clear()
    caplog.set_level(logging.INFO, "optimum_moe_prune")
    wide = calibrated(layout_of(small), samples, Need, stream=stream)
    assert_same(wide, numbers_in_float32(small, samples, stream=stream), 2e-4)
    said = [record.getMessage() for record in caplog.records if "computing in" in record.getMessage()]
    assert said == [
        "computing in float32 from bfloat16 weights: this processor multiplies float32 12 times as fast as bfloat16"
    ]
    assert (wide.provenance["dtype"], wide.provenance["checkpoint_dtype"]) == ("float32", "bfloat16")
    assert (narrow.provenance["dtype"], narrow.provenance["checkpoint_dtype"]) == ("bfloat16", "bfloat16")
    assert wide.model == narrow.model  # fingerprints are of the files
    as_asked = calibrated(layout_of(small), samples, Need, stream=stream, dtype="bfloat16")
    assert_identical(as_asked, narrow)
    a, b = samples.samples[:6], samples.samples[6:]
    halves = [CalibrationSet(a, samples.token_ids[:6]), CalibrationSet(b, samples.token_ids[6:])]
    first = calibrated(layout_of(small), halves[0], Need, stream=stream)
    second = calibrated(layout_of(small), halves[1], Need, stream=stream, dtype="bfloat16")
    with pytest.raises(RequestError, match="calibrate both in the same precision"):
        first.merge(second)


def test_a_model_in_memory_keeps_its_bytes(samples: CalibrationSet, multiplied: Callable) -> None:
    """Statistics and measurements as of the model in float32; plans, and what is pruned, in bfloat16."""
    model = make_model("qwen2_moe").to(torch.bfloat16)
    wide = make_model("qwen2_moe")
    for parameter in wide.parameters():
        parameter.data = parameter.data.bfloat16().float()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    multiplied(12.0)
    stats = calibrate(model, samples, "all")
    expected = calibrate(wide, samples, "all")
    assert_same(stats, expected, 2e-4)
    assert (stats.provenance["dtype"], stats.provenance["checkpoint_dtype"]) == ("float32", "bfloat16")
    assert calibrate(model, samples, REAP, compute=Compute("bf16")).provenance["dtype"] == "bfloat16"
    recipe = MoEPrunerConfig(method="reap", sensitivity_samples=4)
    found = measure_sensitivity(model, samples, [recipe], stats, sparsities=(0.5,))
    other = measure_sensitivity(wide, samples, [recipe], expected, sparsities=(0.5,))
    assert (found.provenance["dtype"], found.provenance["checkpoint_dtype"]) == ("float32", "bfloat16")
    for layer, measured_layer in found.methods["reap"].layers.items():
        assert measured_layer.retained == other.methods["reap"].layers[layer].retained
        for count, by_domain in measured_layer.kl.items():
            assert by_domain == pytest.approx(other.methods["reap"].layers[layer].kl[count], rel=1e-3)
    compared = compare_methods(model, stats, samples, methods=["reap"], sparsities=0.4)
    assert compared.comparison.settings["dtype"] == "bfloat16"
    assert compared.comparison.settings["computing_dtype"] == "float32"
    lost, as_wide = (evaluate(m, samples).domains["all"].loss for m in (model, wide))
    assert lost == pytest.approx(as_wide, rel=1e-5)
    assert evaluate(model, samples, dtype="bfloat16").domains["all"].loss != pytest.approx(as_wide, rel=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.dtype == torch.bfloat16


def test_what_is_written_are_the_bytes_of_the_files(
    small: Path, samples: CalibrationSet, multiplied: Callable, tmp_path: Path
) -> None:
    multiplied(12.0)
    pruner = MoEPruner.from_pretrained(small, MoEPrunerConfig(method="reap", num_experts=4))
    pruner.prune_checkpoint(tmp_path / "pruned", calibration=samples)
    assert pruner.pruning_plan is not None and pruner.pruning_plan.provenance["calibration"]["dtype"] == "float32"
    written, source = (load_file(f / "model.safetensors") for f in (tmp_path / "pruned", small))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(written[name].view(torch.int16), source[name].view(torch.int16))
    result = compare_models(tmp_path / "pruned", samples, reference=small)
    assert (result.settings["dtype"], result.settings["computing_dtype"]) == ("auto", "float32")
    plain = compare_models(tmp_path / "pruned", samples, reference=small, compute=Compute("float32"))
    both = [comparison.models["pruned"].evaluation.domains["all"].loss for comparison in (result, plain)]
    assert both[0] == pytest.approx(both[1], rel=1e-5)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gemma4_text"])
def test_one_layer_at_a_time_rounds_as_the_model_in_memory(
    model_type: str, samples: CalibrationSet, multiplied: Callable, tmp_path: Path
) -> None:
    """Files with a router in float32, a bias that stays so, a buffer that is made: the same numbers in both ways."""
    tiny_model(model_type, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "gate.weight" in name or "router" in name:
            tensors[name] = tensor.float() * (1 + torch.rand(tensor.shape, generator=noise) / 300)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    multiplied(12.0)
    in_memory, streamed = (calibrated(layout_of(tmp_path), samples, REAP, stream=stream) for stream in (False, True))
    assert in_memory.provenance["dtype"] == streamed.provenance["dtype"] == "float32"
    assert_same(in_memory, streamed, 2e-5)


def test_unfinished_work_goes_on_in_the_precision_it_began_in(
    small: Path, samples: CalibrationSet, multiplied: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"stream": True, "batch_size": 3}
    expected = calibrated(layout_of(small), samples, REAP, **how)
    real = streamed_calibration.LayerObserver

    class Stopped(Exception):
        pass

    def begun(folder: Path, times: float) -> None:
        multiplied(times)
        made: list[None] = []

        def counted(*args: Any, **kwargs: Any) -> Any:
            made.append(None)
            if len(made) == 2:
                raise Stopped
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(streamed_calibration, "LayerObserver", counted)
            calibrated(layout_of(small), samples, REAP, **how, folder=folder)

    begun(tmp_path / "with units", 1.0)
    assert begun_with(None, unfinished(tmp_path / "with units")) == (True, "bfloat16")
    multiplied(12.0)
    with pytest.raises(RequestError, match=r"else: dtype is auto there and float32 now\. Run the command"):
        calibrated(layout_of(small), samples, REAP, **how, folder=tmp_path / "with units", dtype="float32")
    assert_identical(calibrated(layout_of(small), samples, REAP, **how, folder=tmp_path / "with units"), expected)
    begun(tmp_path / "without", 12.0)
    multiplied(1.0)
    stats = calibrated(layout_of(small), samples, REAP, **how, folder=tmp_path / "without")
    assert stats.provenance["dtype"] == "float32"
    assert_identical(stats, calibrated(layout_of(small), samples, REAP, **how, dtype="float32"))


def test_the_plan_of_the_work_says_it(small: Path, samples: CalibrationSet, multiplied: Callable) -> None:
    recipe = MoEPrunerConfig(method="reap", num_experts=4)
    ways = {stream: plan_work(small, recipe, samples, compute=Compute(stream=stream)) for stream in (False, True)}
    multiplied(12.0)
    wide = {stream: plan_work(small, recipe, samples, compute=Compute(stream=stream)) for stream in (False, True)}
    assert "on cpu in bfloat16, one layer at a time" in ways[True].summary()
    assert "on cpu in float32 from bfloat16 weights, one layer at a time" in wide[True].summary()
    assert all((wide[way].dtype, wide[way].weights_dtype) == ("float32", "bfloat16") for way in wide)
    assert wide[True].memory > ways[True].memory and wide[False].memory > ways[False].memory
    settled = Compute().settled(layout_of(small))
    multiplied(1.0)
    assert settled.computing == settled.settled(layout_of(small)).computing == "float32"  # decided once
    assert replace(settled, dtype="bfloat16").settled(layout_of(small)).computing == "bfloat16"


@pytest.fixture(autouse=True)
def told_anew() -> Iterator[None]:
    """What is said once in a process is said in each test."""
    precision._say.cache_clear()
    logging.getLogger("optimum_moe_prune").setLevel(logging.NOTSET)
    yield
    precision._say.cache_clear()
