# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that bring their own code: the same model without this package, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import aligned, load, make_texts, make_tokenizer, save_checkpoint

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, names
from optimum_moe_prune.architectures import unequal

IDS = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))

LOAD = """
import sys, shutil, torch
from transformers import AutoModel, AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__name__.startswith("Unequal"), type(model)
for parameter in model.parameters():
    parameter.data = parameter.data.clone()
ids = torch.load(folder + "/../ids.pt")
with torch.no_grad():
    out = model(input_ids=ids, labels=ids, output_router_logits=True)
    result = {"logits": out.logits, "aux": out.aux_loss, "generated": model.generate(ids, max_new_tokens=4,
        do_sample=False), "state": model.state_dict(), "experts": model.config._experts_implementation}
model.save_pretrained(folder + "/../again")
again = AutoModelForCausalLM.from_pretrained(folder + "/../again", trust_remote_code=True)
assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
fresh = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
assert [p.shape for p in fresh.parameters()] == [p.shape for p in model.parameters()]
assert all(0 < p.std() < 1 for name, p in fresh.named_parameters() if "experts" in name)
from safetensors.torch import load_file, save_file
tensors = load_file(folder + "/model.safetensors")
gone = [name for name in tensors if "layers.2." in name and ".experts." in name]
damaged = folder + "/../damaged"
shutil.copytree(folder, damaged)
kept = {name: tensor for name, tensor in tensors.items() if name not in gone}
save_file(kept, damaged + "/model.safetensors", {"format": "pt"})
for door, where, how in (
    (AutoModelForCausalLM, folder, {}),
    (AutoModel, folder, {"trust_remote_code": True}),
    (AutoModelForCausalLM, damaged, {"trust_remote_code": True, "ignore_mismatched_sizes": True}),
):
    try:
        door.from_pretrained(where, **how)
    except (AttributeError, RuntimeError) as error:
        assert ("layer 2" in str(error)) == (where == damaged), error
    else:
        raise AssertionError("loaded what it should not")
assert "optimum_moe_prune" not in sys.modules
torch.save(result, folder + "/../result.pt")
"""


def prune(kind: str, path: Path, **settings: object) -> MoEPruner:
    save_checkpoint(kind, path / "base", make_tokenizer())
    config = MoEPrunerConfig(**{"method": "pathfinder", "sparsity": 0.3, "method_options": {"tau": 0.2}, **settings})
    pruner = MoEPruner.from_pretrained(path / "base", config)
    pruner.prune(load(path / "base"), calibration=make_texts())
    return pruner


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen2_moe", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_the_code_in_the_checkpoint_gives_the_same_model(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = prune(kind, tmp_path)
    pruner.save_pretrained(tmp_path / "out", standalone=True)
    model = load(tmp_path / "out")  # with the package and without trust, transformers' own class
    assert type(model).__module__.startswith("transformers.models.")
    torch.save(IDS, tmp_path / "ids.pt")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pt")
    expected = aligned(model)(input_ids=IDS, labels=IDS, output_router_logits=True)
    assert torch.equal(result["logits"], expected.logits) and torch.equal(result["aux"], expected.aux_loss)
    assert torch.equal(result["generated"], model.generate(IDS, max_new_tokens=4, do_sample=False))
    assert result["experts"] == model.config._experts_implementation
    state = model.state_dict()
    assert result["state"].keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in result["state"].items())


def test_code_for_other_numbers_does_not_stay(tmp_path: Path) -> None:
    """Pruned again, or applied again without the option: the config names no file that is not there."""
    pruner = prune("mixtral", tmp_path)
    config_file = tmp_path / "base" / "config.json"
    theirs = {"AutoTokenizer": ["own.py", None]}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"auto_map": theirs}))
    pruner.save_pretrained(tmp_path / "out", standalone=True)
    first = json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert first["AutoTokenizer"] == theirs["AutoTokenizer"] and "Unequal" in first["AutoModelForCausalLM"]
    again = MoEPruner.from_pretrained(tmp_path / "out")
    again.prune(load(tmp_path / "base"))
    again.save_pretrained(tmp_path / "again")
    fewer = MoEPruner.from_pretrained(tmp_path / "out", MoEPrunerConfig(method="random", num_experts=2))
    model = fewer.prune(load(tmp_path / "out"))
    fewer.save_pretrained(tmp_path / "fewer")
    model.save_pretrained(tmp_path / "alone")
    for name in ("again", "fewer", "alone"):
        assert json.loads((tmp_path / name / "config.json").read_text())["auto_map"] == theirs
        assert not list((tmp_path / name).glob("*.py"))


def test_equal_layers_need_no_code(tmp_path: Path) -> None:
    pruner = prune("mixtral", tmp_path, allocation="uniform", sparsity=0.5)
    pruner.save_pretrained(tmp_path / "out", standalone=True)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))


def test_the_file_that_travels_knows_its_name() -> None:
    assert unequal.FILE_STEM == names.STANDALONE_STEM
