# SPDX-License-Identifier: Apache-2.0
"""Quantised checkpoints: the numbers they stand for, calibrated as if they were plain, cut as bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.published import LAYOUTS, dequantised, read
from architectures.published_formats import FP8, Tensors, to_fp8, to_int4, to_mxfp4, to_nvfp4, write
from architectures.tiny import tiny_model
from conftest import load, make_model, make_texts, make_tokenizer
from oracles import call
from safetensors.torch import load_file
from transformers import FineGrainedFP8Config, MixtralConfig, Mxfp4Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import dequantize_convertops

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    PruningPlan,
    RequestError,
    RunError,
    calibrate,
    compare,
    measure_sensitivity,
)
from optimum_moe_prune.calibration.calibrate import no_calibration
from optimum_moe_prune.checkpoints import dequantise
from optimum_moe_prune.checkpoints.checkpoint import Checkpoint
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.checkpoints.plain import Plain
from optimum_moe_prune.checkpoints.source import Source
from optimum_moe_prune.models.memory import load_model, model_bytes

FORMATS = {
    "deepseek_v3_fp8": ["fp8"],
    "qwen3_moe_fp8": ["fp8"],
    "minimax_m2_fp8": ["fp8"],
    "gpt_oss_mxfp4": ["mxfp4"],
    "kimi_k25_int4": ["int4 packed"],
    "deepseek_v3_nvfp4": ["nvfp4"],
    "deepseek_v4_native": ["fp4", "fp8"],
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny folder of a layout, without heads; written once."""
    place = tmp_path_factory.mktemp("published")

    def folder(layout: str) -> Path:
        if not (place / layout).exists():
            LAYOUTS[layout](place / layout, **({"mtp": False} if layout.startswith("deepseek") else {}))
        return place / layout

    return folder


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def without_quantisation(folder: Path, target: Path, dtype: torch.dtype) -> Path:
    """The same model as a plain checkpoint, read by an implementation of its own."""
    config = config_of(folder)
    for part in (config, config.get("text_config", {})):
        part.pop("quantization_config", None)
    before = read(folder)
    tensors = {
        name: value if name in before and before[name].dtype == value.dtype else value.to(dtype)
        for name, value in dequantised(folder).items()
    }
    return write(target, tensors, config)


def samples() -> CalibrationSet:
    return CalibrationSet.build(
        [torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)) for n in (9, 13, 16, 7)]
    )


def assert_same_statistics(a: CalibrationStats, b: CalibrationStats) -> None:
    assert a.layers.keys() == b.layers.keys()
    for index, layer in a.layers.items():
        assert layer.tensors.keys() == b.layers[index].tensors.keys() and layer.tensors
        for name, tensor in layer.tensors.items():
            assert torch.equal(tensor, b.layers[index].tensors[name]), (index, name)
    for name in ("fingerprint", "fingerprint_bfloat16"):
        assert a.model[name] == b.model[name]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# ------------------------------------------------------------------------------------------- published layouts


@pytest.mark.parametrize("layout", FORMATS)
def test_numbers_are_those_of_another_reader(layout: str, published: Callable[[str], Path]) -> None:
    found = open_layout(published(layout))
    expected = dequantised(published(layout))
    assert found.plain.formats == FORMATS[layout]
    assert found.plain.tensors.keys() == expected.keys()
    with found.checkpoint.reader() as read_tensor:
        for name, tensor in expected.items():
            value = found.plain.read(read_tensor, name)
            assert found.plain.tensors[name].shape == value.shape
            assert torch.equal(value.float(), tensor.float()), name
            if found.plain.tensors[name].format:
                assert torch.equal(found.plain.read(read_tensor, name, torch.bfloat16), tensor.bfloat16())
    assert model_bytes(found, "auto") == 2 * sum(tensor.numel() for tensor in expected.values())


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("layout", FORMATS)
def test_calibrated_as_if_it_were_plain(
    layout: str, dtype: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published(layout)
    plain = without_quantisation(folder, tmp_path / "plain", torch.bfloat16 if dtype == "auto" else torch.float32)
    oracle = calibrate(plain, samples(), compute=Compute(dtype, stream=False))
    assert "dequantised" not in oracle.provenance
    for stream in (True, False):
        found = calibrate(folder, samples(), compute=Compute(dtype, stream=stream))
        assert_same_statistics(found, oracle)
        assert found.provenance["dequantised"] == FORMATS[layout]
        assert found.provenance["dtype"] == ("bfloat16" if dtype == "auto" else dtype)


@pytest.mark.parametrize("allocation", ["uniform", "unequal"])
@pytest.mark.parametrize("layout", FORMATS)
def test_what_is_retained_is_the_sources_bytes(
    layout: str, allocation: str, published: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = published(layout)
    pruner = MoEPruner.from_pretrained(folder, MoEPrunerConfig(method="random", num_experts=8, seed=1))
    plan = pruner.plan(no_calibration(folder))
    if allocation == "unequal":
        first = min(plan.retained)
        values = {**plan.retained, first: tuple(range(12))}
        plan = PruningPlan(**{**vars(plan), "retained": values})
    plan.apply_to_checkpoint(folder, tmp_path / "out")
    before, after = read(folder), read(tmp_path / "out")
    expected: Tensors = {}
    for name, tensor in before.items():
        layer = re.search(r"\blayers\.(\d+)\.", name)
        retained = plan.retained.get(int(layer[1])) if layer else None
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if retained is None or len(retained) == 12:
            expected[name] = tensor
        elif expert and int(expert[1]) in retained:
            new = f".experts.{retained.index(int(expert[1]))}."
            expected[name.replace(expert[0], new)] = tensor
        elif not expert:
            cut = tensor.dim() > 0 and tensor.shape[0] == 12
            expected[name] = tensor[list(retained)] if cut else tensor
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("tid2eid"):
            continue  # names the retained experts
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape, name
        assert torch.equal(bits(after[name]), bits(tensor)), name
    now, was = config_of(tmp_path / "out"), config_of(folder)
    assert now.get("quantization_config") == was.get("quantization_config")
    assert open_layout(tmp_path / "out").num_experts == {index: len(kept) for index, kept in plan.retained.items()}


def test_measured_and_loaded_as_if_it_were_plain(published: Callable[[str], Path], tmp_path: Path) -> None:
    """``compare`` and ``measure_sensitivity`` load a whole model, which transformers 5.24 cannot read at all."""
    folder = published("deepseek_v3_nvfp4")
    plain = without_quantisation(folder, tmp_path / "plain", torch.bfloat16)
    results = compare([folder, plain], data=list(samples().token_ids))
    first, second = results.models.values()
    assert first.evaluation.domains == second.evaluation.domains and first.nbytes == second.nbytes
    for stream in (True, False):
        recipe = MoEPrunerConfig(method="frequency", num_experts=8)
        found, expected = (
            measure_sensitivity(source, samples(), [recipe], counts=(8,), compute=Compute(stream=stream))
            for source in (folder, plain)
        )
        assert found.methods["frequency"] == expected.methods["frequency"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7, "max_new_tokens": 3}))
    model = load_model(Source.of(folder), Compute())
    assert not hasattr(model.config, "quantization_config") and model.config.name_or_path == str(folder)
    assert model.generation_config.eos_token_id == 7 and {p.dtype for p in model.parameters()} <= {
        torch.bfloat16,
        torch.float32,
    }
    assert calibrate(model, samples()).layers


@pytest.mark.parametrize("layout", ["deepseek_v3_fp8", "gpt_oss_mxfp4"])
def test_run(
    layout: str, published: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(layout)
    make_tokenizer().save_pretrained(folder)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in make_texts(8)))
    capsys.readouterr()  # what writing the folder showed
    options = ("--calibration", tmp_path / "texts.jsonl", "--method", "reap", "--num-experts", 8)
    code, _, err = call(capsys, "run", "--model", folder, *options, tmp_path / "out")
    assert code == 0 and "warning" not in err.lower(), err  # the plan of the work is shown there
    config = config_of(tmp_path / "out")
    assert config["quantization_config"] == config_of(folder)["quantization_config"]
    model = load(tmp_path / "out")  # transformers dequantises these itself where there is no GPU
    for name, tensor in load_model(Source.of(tmp_path / "out"), Compute()).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


# ------------------------------------------------------------------------------------------- number formats


def plain_of(folder: Path, tensors: Tensors, quantisation: dict[str, object] | None = None) -> Plain:
    """A checkpoint of nothing but these tensors."""
    write(folder, tensors, {}, shards=1)
    config = MixtralConfig(quantization_config=quantisation or {"quant_method": "fp8"})
    return Plain(Checkpoint.open(str(folder)), config)


def values_of(plain: Plain, name: str) -> torch.Tensor:
    plain.check()
    with plain.checkpoint.reader() as read_tensor:
        return plain.read(read_tensor, name)


def test_the_same_numbers_as_transformers() -> None:
    torch.manual_seed(0)
    weight, theirs = torch.randn(64, 96), Fp8Dequantize(None)
    parts = to_fp8(weight, (32, 32))
    for scale in (parts["weight_scale_inv"], torch.tensor(0.3), torch.randint(100, 140, (64, 3), dtype=torch.uint8)):
        expected = theirs._dequantize_one(parts["weight"], scale, torch.float32)
        assert torch.equal(dequantise.scaled(parts["weight"], scale), expected)
    four = to_mxfp4(weight)
    expected = theirs._dequantize_one(four["packed"].view(torch.int8), four["exponents"], torch.float32)
    assert torch.equal(dequantise.four_bits(four["packed"], four["exponents"]), expected)
    blocks = four["packed"].unflatten(-1, (-1, 16))
    expected = dequantize_convertops(blocks[None], four["exponents"][None], torch.float32)[0]
    assert torch.equal(dequantise.in_blocks(blocks, four["exponents"]), expected)


def test_blocks_that_are_cut() -> None:
    """transformers takes the size of a block from the number of scales, and errs where the last one is cut."""
    weight = torch.randn(40, 20)
    parts = to_fp8(weight, (16, 16))
    scale = parts["weight_scale_inv"]
    wide = scale.repeat_interleave(16, 0)[:40].repeat_interleave(16, 1)[:, :20]
    found = dequantise.scaled(parts["weight"], scale, [(128, 128), (16, 16)])
    assert torch.equal(found, parts["weight"].float() * wide)
    with pytest.raises(ValueError, match="does not fit"):
        dequantise.scaled(parts["weight"], torch.rand(7, 2), [(16, 16)])


def test_every_power_of_two() -> None:
    """Bytes 0 to 254 are exponents; 255 is no number, and no number comes of it."""
    found = dequantise.factors(torch.arange(256, dtype=torch.uint8))
    assert found[:255].tolist() == [2.0**exponent for exponent in range(-127, 128)] and found[255].isnan()
    assert torch.equal(found[:255], torch.arange(255, dtype=torch.uint8).view(torch.float8_e8m0fnu).float())


def test_fused_experts_with_scales_of_all_shapes(tmp_path: Path) -> None:
    experts = torch.randn(5, 32, 48)
    eight = experts.to(FP8)
    stack = [to_nvfp4(expert) for expert in experts]
    four = {name: torch.stack([part[name] for part in stack]) for name in stack[0]}
    turned = [to_nvfp4(expert.mT.contiguous()) for expert in experts]  # llama4: pairs lie in columns
    tensors: Tensors = {
        "one.up": eight,
        "one.up_scale": torch.tensor(0.5),
        "each.up": eight.clone(),
        "each.up_scale": torch.rand(5),
        "rows.up": eight.clone(),
        "rows.up_scale_inv": torch.rand(5, 32, 1),
        "columns.up": eight.clone(),
        "columns.up_scale": torch.rand(5, 1, 48),
        "blocks.up": eight.clone(),
        "blocks.up_scale_inv": torch.rand(5, 2, 3),
        "nv.up": four["weight"],
        "nv.up_weight_scale": four["weight_scale"],
        "nv.up_weight_scale_2": four["weight_scale_2"],
        "nv.up_input_scale": torch.tensor(1.0),
        "turned.up": torch.stack([part["weight"].mT for part in turned]),
        "turned.up_weight_scale": torch.stack([part["weight_scale"].mT for part in turned]),
        "turned.up_weight_scale_2": torch.tensor([0.25]),
    }
    plain = plain_of(tmp_path / "model", tensors)
    assert set(plain.tensors) == {
        f"{kind}.up" for kind in ("one", "each", "rows", "columns", "blocks", "nv", "turned")
    }
    exact = eight.float()
    wide = tensors["blocks.up_scale_inv"].repeat_interleave(16, 1).repeat_interleave(16, 2)
    for name, expected in {
        "one.up": exact * 0.5,
        "each.up": exact * tensors["each.up_scale"].view(5, 1, 1),
        "rows.up": exact * tensors["rows.up_scale_inv"],
        "columns.up": exact * tensors["columns.up_scale"],
        "blocks.up": exact * wide,
    }.items():
        assert torch.equal(values_of(plain, name), expected), name
    error = (values_of(plain, "nv.up") - experts).abs().amax()
    assert plain.tensors["nv.up"].shape == (5, 32, 48) and error < 0.2 * experts.abs().amax()
    halves = [dequantise.four_bits(p["weight"], p["weight_scale"], torch.tensor(0.25)).mT for p in turned]
    assert torch.equal(values_of(plain, "turned.up"), torch.stack(halves))


def test_formats_of_compressed_tensors(tmp_path: Path) -> None:
    weight = torch.randn(32, 64)
    four, whole = to_nvfp4(weight), to_int4(weight)
    tensors = {
        "nv.weight_packed": four["weight"],
        "nv.weight_scale": four["weight_scale"],
        "nv.weight_global_scale": torch.tensor([32.0]),
        "nv.input_global_scale": torch.tensor([3.0]),
        "mx.weight_packed": to_mxfp4(weight)["packed"],
        "mx.weight_scale": to_mxfp4(weight)["exponents"],
        "int8.weight": torch.randint(-128, 128, (32, 64), dtype=torch.int8),
        "int8.weight_scale": torch.rand(32, 1),
        "channel.weight_packed": whole["weight_packed"],
        "channel.weight_scale": torch.rand(32, 1),
        "channel.weight_shape": torch.tensor([32, 61]),
    }
    weights = {"num_bits": 4, "type": "int", "group_size": 32}
    plain = plain_of(
        tmp_path / "model",
        tensors,
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": weights}}},
    )
    assert plain.formats == ["fp4", "int4 packed", "int8", "nvfp4"]
    expected = dequantise.four_bits(four["weight"], four["weight_scale"].float() / 32)
    assert torch.equal(values_of(plain, "nv.weight"), expected)
    assert torch.equal(values_of(plain, "int8.weight"), tensors["int8.weight"] * tensors["int8.weight_scale"])
    assert (values_of(plain, "mx.weight") - weight).abs().amax() < 0.3 * weight.abs().amax()
    codes = (whole["weight_packed"].unsqueeze(-1) >> torch.arange(0, 32, 4)).flatten(-2) & 15
    expected = (codes[:, :61] - 8) * tensors["channel.weight_scale"]
    assert torch.equal(values_of(plain, "channel.weight"), expected)


# ------------------------------------------------------------------------------------------- half, damaged, unknown


def experts_of(folder: Path) -> tuple[Path, Tensors]:
    """A Mixtral of which the experts alone are in fp8, and its tensors."""
    make_model().to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        parts = to_fp8(tensors[name], (16, 16))
        tensors |= {name: parts["weight"], f"{name}_scale_inv": parts["weight_scale_inv"]}
    config = config_of(folder) | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
    return write(folder, tensors, config, shards=1), tensors


NAME = "model.layers.1.block_sparse_moe.experts.0.w2.weight"


def rewritten(folder: Path, tensors: Tensors) -> Path:
    (folder / "model.safetensors").unlink(missing_ok=True)
    return write(folder, tensors, config_of(folder), shards=1)


def test_only_the_experts_are_quantised(tmp_path: Path) -> None:
    folder, _ = experts_of(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    oracle = calibrate(without_quantisation(folder, tmp_path / "plain", torch.bfloat16), samples())
    for stream in (True, False):
        assert_same_statistics(calibrate(folder, samples(), compute=Compute(stream=stream)), oracle)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "change, message",
    [
        ("no scales", rf"{NAME} is quantised \(F8_E4M3 \(32, 24\)\), and the scale beside it is missing"),
        ("other shape", rf"{NAME} is quantised .* its scale {NAME}_scale_inv has shape \(5, 1\), which does not fit"),
        ("unknown", rf"{NAME} is quantised \(U8 .* no number format with a scale F16 is known here"),
        ("zero points", rf"{NAME} is quantised .* {NAME}_zero_point is a zero point, which is not read here"),
        ("not a number", rf"{NAME}(_scale_inv)? holds NaN or infinite weights"),
    ],
)
def test_damage_is_named(change: str, message: str, stream: bool, tmp_path: Path) -> None:
    """All experts alike: that one is unlike the others is seen before."""
    folder, tensors = experts_of(tmp_path / "model")
    for name in [name for name in tensors if re.search(r"layers\.1\..*experts\.\d+\.w2\.weight$", name)]:
        if change == "no scales":
            del tensors[f"{name}_scale_inv"]
        elif change == "other shape":
            tensors[f"{name}_scale_inv"] = torch.ones(5, 1)
        elif change == "unknown":
            tensors |= {name: torch.zeros(32, 12, dtype=torch.uint8), f"{name}_scale_inv": torch.ones(2, 2).half()}
        elif change == "zero points":
            tensors[f"{name}_zero_point"] = torch.zeros(2, 2)
    if change == "not a number":
        tensors[f"{NAME}_scale_inv"].fill_(torch.nan)
    rewritten(folder, tensors)
    with pytest.raises((RequestError, RunError), match=message) as caught:
        calibrate(folder, samples(), compute=Compute(stream=stream))
    assert "\n" not in str(caught.value)


def test_loading_stops_where_a_number_is_missing(tmp_path: Path) -> None:
    """Threads of transformers' that still read must not hide why."""
    folder, tensors = experts_of(tmp_path / "model")
    tensors[f"{NAME}_scale_inv"].fill_(torch.nan)
    with pytest.raises(RunError, match=f"{NAME} holds NaN"):
        load_model(Source.of(rewritten(folder, tensors)), Compute())


def test_one_missing_scale_is_named_by_the_layout(tmp_path: Path) -> None:
    folder, tensors = experts_of(tmp_path / "model")
    del tensors[f"{NAME}_scale_inv"]
    with pytest.raises(RequestError, match=f"{NAME}_scale_inv is missing in .*; the other experts have it"):
        open_layout(rewritten(folder, tensors))


def test_what_weight_shape_says(published: Callable[[str], Path], tmp_path: Path) -> None:
    folder = published("kimi_k25_int4")
    tensors = read(folder)
    name = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"
    tensors[f"{name}_shape"] = torch.tensor([64, 40]).int()
    wrong = write(tmp_path / "wrong", tensors, config_of(folder))
    with pytest.raises(RequestError, match=rf"{name}_packed is quantised .* says \(64, 40\), which does not fit it"):
        calibrate(wrong, samples(), compute=Compute(stream=True))


def test_a_method_that_is_not_read(tmp_path: Path) -> None:
    """Its plan has to come from elsewhere, and can be applied: experts are cut as bytes."""
    folder, tensors = experts_of(tmp_path / "model")
    for name in [name for name in tensors if ".experts." in name]:
        value = tensors.pop(name)
        if name.endswith(".weight"):
            stem = name.removesuffix("weight")
            tensors |= {f"{stem}qweight": torch.zeros(len(value), 4).int(), f"{stem}scales": torch.ones(1, 4).half()}
    rewritten(folder, tensors)
    config = config_of(folder) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match="is quantised with 'gptq', which is not read here"):
        calibrate(folder, samples(), compute=Compute(stream=True))
    make_model().to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    pruner = MoEPruner.from_pretrained(tmp_path / "plain", MoEPrunerConfig(method="random", num_experts=5))
    pruner.plan(no_calibration(tmp_path / "plain")).apply_to_checkpoint(folder, tmp_path / "out")
    kept = {int(n[1]) for name in read(tmp_path / "out") if (n := re.search(r"experts\.(\d+)\.w1\.qweight", name))}
    assert kept == set(range(5))


def test_float8_without_scales_is_plain_where_nothing_says_otherwise(tmp_path: Path) -> None:
    weight = torch.randn(8, 8).to(FP8)
    write(tmp_path / "model", {"a.weight": weight, "b.bias": torch.ones(3, dtype=torch.uint8)}, {}, shards=1)
    plain = Plain(Checkpoint.open(str(tmp_path / "model")), MixtralConfig())
    assert plain.formats == [] and torch.equal(values_of(plain, "a.weight").float(), weight.float())


@pytest.mark.parametrize("layout, config", [("qwen3_moe_fp8", FineGrainedFP8Config), ("gpt_oss_mxfp4", Mxfp4Config)])
def test_a_model_that_transformers_dequantised(
    layout: str, config: Any, published: Callable[[str], Path], tmp_path: Path
) -> None:
    """It is pruned and saved as a plain one, and its plan fits the quantised files."""
    folder = published(layout)
    model = load(folder, quantization_config=config(dequantize=True))
    pruner = MoEPruner.from_pretrained(folder, MoEPrunerConfig(method="reap", num_experts=8))
    pruned = pruner.prune(model, calibration=samples())
    pruner.save_pretrained(tmp_path / "plain", pruned)
    assert "quantization_config" not in config_of(tmp_path / "plain") and open_layout(tmp_path / "plain").num_experts
    pruner.pruning_plan.apply_to_checkpoint(folder, tmp_path / "files")
    plain, files = (load_model(Source.of(tmp_path / name), Compute()) for name in ("plain", "files"))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, files.state_dict()[name]), name


def test_a_model_that_is_still_quantised_in_memory(published: Callable[[str], Path]) -> None:
    model = tiny_model("qwen3_moe")
    model.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(RequestError, match="quantised in memory"):
        calibrate(model, samples())
