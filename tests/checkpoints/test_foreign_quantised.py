# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that torchao and bitsandbytes quantised, as transformers saves them: called that, cut right, judged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from conftest import make_model, make_texts, make_tokenizer
from oracles import call, plan_for
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from optimum_moe_prune import Compute, RequestError, calibrate
from optimum_moe_prune.calibration.samples import CalibrationSet
from optimum_moe_prune.models.blocks import moe_blocks

EXPERTS = r"re:.*\.experts\.(gate_up_proj|down_proj)"
NOT_READ = "is quantised with '{}', which is not read here. Calibrate with an unquantised checkpoint; its plan can be"


def by_torchao(folder: Path, kind: str) -> Path:
    """A checkpoint quantised by torchao: by its defaults, or experts alone, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import Float8WeightOnlyConfig, FqnToConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = Float8WeightOnlyConfig() if kind.startswith("float8") else Int8WeightOnlyConfig()
        if kind.endswith("experts"):
            config = FqnToConfig({EXPERTS: config})  # type: ignore[assignment]
        make_model().bfloat16().save_pretrained(folder / "plain")
        quantised = AutoModelForCausalLM.from_pretrained(
            folder / "plain", dtype="auto", quantization_config=TorchAoConfig(config), device_map="cpu"
        )
        quantised.save_pretrained(folder / kind)
    make_tokenizer().save_pretrained(folder / kind)
    return folder / kind


def loaded(folder: Path) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", experts_implementation="eager")


@pytest.mark.parametrize("kind", ["int8", "int8 experts", "float8 experts"])
@torch.no_grad()
def test_torchao(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused as a calibration's, cut as bytes without harm, and judged."""
    folder, texts = by_torchao(tmp_path, kind), CalibrationSet.build(make_texts(2), make_tokenizer())
    for stream in (True, False):
        with pytest.raises(RequestError, match=NOT_READ.format("torchao")):
            calibrate(folder, texts, compute=Compute(stream=stream))
    plain = make_model().bfloat16()
    plan = plan_for(plain, 3, allocation="global")
    plan.apply_to_checkpoint(folder, tmp_path / "out")
    pruned, whole = loaded(tmp_path / "out"), loaded(folder)
    for block, cut in zip(moe_blocks(whole), moe_blocks(pruned), strict=True):
        retained = plan.retained[block.layer]
        for name, tensor in block.expert_tensors.items():
            expected = torch.stack([tensor[expert].to(torch.bfloat16).dequantize() for expert in retained])
            found = torch.stack([cut.expert_tensors[name][e].dequantize() for e in range(len(retained))])
            assert torch.equal(found, expected)
        assert type(cut.expert_tensors["down_proj"].data) is type(block.expert_tensors["down_proj"].data)
    (tmp_path / "data.jsonl").write_text(json.dumps(make_texts(1)[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = ("--model", tmp_path / "out", "--data", tmp_path / "data.jsonl", "--json")
        code, out, err = call(capsys, "evaluate", *given)
    assert code == 0 and json.loads(out), err


def bitsandbytes(folder: Path, bits: int) -> Path:
    """A checkpoint with the tensors that bitsandbytes has of attention, and the experts as they were."""
    make_model().bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        weight = tensors[name]
        if bits == 8:
            tensors |= {name: weight.char(), name.replace("weight", "SCB"): torch.ones(len(weight))}
            continue
        state = torch.frombuffer(bytearray(b'{"quant_type": "nf4"}'), dtype=torch.uint8)
        tensors |= {
            name: torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
            f"{name}.absmax": torch.ones(weight.numel() // 64),
            f"{name}.quant_map": torch.ones(16),
            f"{name}.quant_state.bitsandbytes__nf4": state,
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, texts = bitsandbytes(tmp_path / "model", bits), CalibrationSet.build(make_texts(2), make_tokenizer())
    said = NOT_READ.format("bitsandbytes")
    with pytest.raises(RequestError, match=said):
        calibrate(folder, texts, compute=Compute(stream=True))
    (tmp_path / "data.jsonl").write_text(json.dumps(make_texts(1)[0]))
    given = ("--model", folder, "--calibration", tmp_path / "data.jsonl", "--method", "reap", "--num-experts", 3)
    code, _, err = call(capsys, "run", *given, tmp_path / "run", "--dry-run")
    assert code == 2 and said in err and err.count("\n") == 1
    plan = plan_for(make_model().bfloat16(), 3, allocation="global")
    plan.apply_to_checkpoint(folder, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    numbers = {layer: dict(enumerate(kept)) for layer, kept in plan.retained.items()}
    for name, tensor in after.items():
        if ".experts." in name:
            start, _, rest = name.partition(".experts.")
            number, _, rest = rest.partition(".")
            old = numbers[int(start.split(".")[2])][int(number)]
            assert torch.equal(tensor, before[f"{start}.experts.{old}.{rest}"])
        elif ".gate." not in name:
            assert torch.equal(tensor, before[name])
