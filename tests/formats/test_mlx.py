# SPDX-License-Identifier: Apache-2.0
"""MLX folders cut by a plan: which bytes remain, what the folder says, and what is refused. Without mlx."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from architectures.tiny import tiny_model
from conftest import make_texts
from formats.mlx_folders import mlx_tensors, packed, write_mlx
from oracles import call, plan_for
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from optimum_moe_prune import PruningPlan
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.evaluation.compare import compare
from optimum_moe_prune.formats import form_of
from optimum_moe_prune.formats.mlx.names import is_mlx_folder
from optimum_moe_prune.formats.mlx.numbers import dequantised

QUANTISED = {"mixtral": True, "deepseek_v3": False, "qwen3_moe": True}
ALIASES = {"mixtral": {"num_experts": 12, "num_moe_experts": 12}, "qwen3_moe": {"num_experts": 12}}
COUNTED = {name: {"num_local_experts", *keys} for name, keys in ALIASES.items()} | {
    "deepseek_v3": {"n_routed_experts"}
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedModel]:
    made = {}
    for name in QUANTISED:
        made[name] = tiny_model(name)
        made[name]._folder = tmp_path_factory.mktemp(name)
    return made


@pytest.fixture(scope="module")
def folders(models: dict[str, PreTrainedModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mlx")
    return {
        name: write_mlx(root / name, models[name], mlx_tensors(models[name], quantised), **ALIASES.get(name, {}))
        for name, quantised in QUANTISED.items()
    }


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A folder of a Mixtral to be spoilt, and where nothing may be written."""
    shutil.copytree(folders["mixtral"], tmp_path / "source")
    yield tmp_path / "source", tmp_path / "out"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def refused(plan: PruningPlan, source: Path, target: Path) -> str:
    with pytest.raises(RequestError) as found:
        plan.apply_to_checkpoint(source, target)
    assert "\n" not in str(found.value)
    return str(found.value)


def change(folder: Path, **tensors: Tensor) -> None:
    """Replace tensors of a folder, or add to them."""
    held = load_file(folder / "model.safetensors")
    save_file({**held, **tensors}, folder / "model.safetensors", {"format": "mlx"})


def expected(tensors: dict[str, Tensor], plan: PruningPlan) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        cut = layer in plan.retained and (".switch_mlp." in name or ".gate." in name)
        found[name] = tensor[list(plan.retained[layer])] if cut else tensor
    return found


@pytest.mark.parametrize("name", QUANTISED)
def test_experts_and_router_rows_remain_as_they_were(
    name: str, models: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    plan, source = plan_for(models[name], 6), folders[name]
    before = load_file(source / "model.safetensors")
    assert any(key.endswith(".biases") for key in before) == QUANTISED[name]
    out = plan.apply_to_checkpoint(source, tmp_path / "out")
    after, wanted = load_file(out / "model.safetensors"), expected(before, plan)
    assert after.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert after[key].dtype == tensor.dtype and torch.equal(
            after[key].view(torch.uint8), tensor.contiguous().view(torch.uint8)
        )
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"}
    config, was = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    counted = {key for key in was if config[key] != was[key]}
    assert counted == COUNTED[name]
    assert {config[key] for key in counted} == {6} and config.keys() == was.keys()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == wanted.keys()
    assert ("total_parameters" in index["metadata"]) != QUANTISED[name]  # packed words are no parameters
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert PruningPlan.load(out).retained == plan.retained
    card = (out / "README.md").read_text()
    assert (
        "library_name: mlx" in card
        and "license: mit" in card
        and "mlx-lm](" in card
        and "transformers does not" in card
    )
    assert is_mlx_folder(out)


def test_shards_are_split_and_an_earlier_output_is_replaced(
    models: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    plan, source = plan_for(models["mixtral"], 6), folders["mixtral"]
    out = plan.apply_to_checkpoint(source, tmp_path / "out")
    whole = load_file(out / "model.safetensors")
    assert "exists and is not empty" in refused(plan, source, out)
    plan.apply_to_checkpoint(source, out, overwrite=True, max_shard_size="20KB")
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2 and not (out / "model.safetensors").exists()
    parts = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert parts.keys() == whole.keys() and all(torch.equal(parts[key], tensor) for key, tensor in whole.items())
    assert refused(plan, out, tmp_path / "again").startswith("this plan is for another model, with 12 experts")


def test_the_command_says_what_it_will_do(
    models: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_for(models["mixtral"], 6).save(tmp_path / "plan.json")
    given = ["apply", "--model", folders["mixtral"], "--plan", tmp_path / "plan.json", tmp_path / "out"]
    code, out, _ = call(capsys, *given, "--dry-run")
    assert code == 0 and "4 bits in groups of 8): 4 layers with 12 experts" in out and "6 of 12 experts" in out
    assert not (tmp_path / "out").exists()
    code, out, _ = call(capsys, *given, "--json")
    said = json.loads(out)
    assert code == 0 and (said["form"], said["num_experts"], said["opened_by"]) == ("MLX folder", 6, "mlx-lm 0.32.2")
    assert (said["original_num_experts"], said["layers"]) == (12, [0, 1, 2, 3])
    assert said["bytes"] == sum(t.nbytes for t in load_file(tmp_path / "out" / "model.safetensors").values())
    code, _, error = call(capsys, *given, "--overwrite", "--standalone")
    assert code == 2 and "--standalone is for transformers checkpoints" in error


def test_unequal_layers_are_refused(models: dict[str, PreTrainedModel], copied: tuple[Path, Path]) -> None:
    values = plan_for(models["mixtral"], 6).to_dict()
    values["layers"]["1"] |= {"num_experts": 5, "retained": [0, 1, 2, 3, 4]}
    said = refused(PruningPlan.from_dict(values), *copied)
    assert "builds all with the one number" in said and "allocation='uniform'" in said


def test_other_models_are_refused(
    models: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    other = tiny_model("mixtral", seed=1)
    assert "other router weights" in refused(plan_for(other, 6), folders["mixtral"], tmp_path / "out")  # quantised
    assert "'mixtral' model, and the model is" in refused(plan_for(other, 6), folders["qwen3_moe"], tmp_path / "out")
    plan = plan_for(tiny_model("deepseek_v3", seed=1), 6)
    assert "other router weights" in refused(plan, folders["deepseek_v3"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_plan_without_a_sketch_is_said_to_be_unproven(
    models: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = plan_for(models["mixtral"], 6).to_dict()
    del values["provenance"]["model"]["router_sketch"]
    form = form_of(folders["mixtral"])
    assert form is not None
    cut = form.prepare(PruningPlan.from_dict(values), folders["mixtral"], tmp_path / "out")
    assert "only counts and shapes were checked" in cut.summary and "only counts" in caplog.text


def test_a_sketch_proves_as_well_where_a_plan_has_no_fingerprint(
    models: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path
) -> None:
    values = plan_for(models["deepseek_v3"], 8).to_dict()
    made_for = values["provenance"]["model"]
    for name in [name for name in made_for if "fingerprint" in name]:
        del made_for[name]
    plan, source = PruningPlan.from_dict(values), folders["deepseek_v3"]
    form = form_of(source)
    assert form is not None and "as far as these tell" in form.prepare(plan, source, tmp_path / "out").summary
    made_for["router_sketch"] = {layer: [-x for x in sketch] for layer, sketch in made_for["router_sketch"].items()}
    assert "other router weights" in refused(PruningPlan.from_dict(values), source, tmp_path / "out")


def test_what_is_damaged_is_refused(models: dict[str, PreTrainedModel], copied: tuple[Path, Path]) -> None:
    plan, (source, _) = plan_for(models["mixtral"], 6), copied
    whole = (source / "model.safetensors").read_bytes()
    block = "model.layers.2.block_sparse_moe"

    (source / "model.safetensors").write_bytes(whole[:-100])
    assert "is damaged" in refused(plan, *copied)
    (source / "model.safetensors").write_bytes(whole)
    held = load_file(source / "model.safetensors")

    name = f"{block}.switch_mlp.up_proj.scales"
    change(source, **{name: held[name][:11]})
    assert f"{name} has shape (11, 24, 4), and config.json says 12 experts in layer 2" in refused(plan, *copied)

    name = f"{block}.gate.weight"
    change(source, **{**held, name: held[name][:8]})
    assert f"{name} has shape (8, 8), and the router of layer 2 has 12 rows" in refused(plan, *copied)

    change(source, **{**held, "model.layers.4.block_sparse_moe.switch_mlp.up_proj.weight": torch.ones(12, 2, 2)})
    assert "experts outside the model's layers" in refused(plan, *copied)

    change(source, **{**held, f"{block}.some_bias": torch.ones(12)})
    assert f"{block}.some_bias has shape (12,), which may be of its experts" in refused(plan, *copied)

    (source / "model.safetensors").write_bytes(whole)
    without = {name: t for name, t in held.items() if f"{block}.switch" not in name}
    save_file(without, source / "model.safetensors", {"format": "mlx"})
    assert "no stacked experts of layer 2" in refused(plan, *copied)


def test_a_config_has_to_count(models: dict[str, PreTrainedModel], copied: tuple[Path, Path]) -> None:
    source, out = copied
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "experts" not in k}))
    assert "says no number of experts" in refused(plan_for(models["mixtral"], 6), source, out)
    (source / "config.json").write_text(json.dumps({**config, "model_type": "no_such_type"}))
    assert "no_such_type" in refused(plan_for(models["mixtral"], 6), source, out)


@pytest.mark.parametrize(
    ("name", "renamed", "proof"),
    [
        (
            "bailing_hybrid",
            {"gate.weight": "gate.gate_proj.weight", "e_score_correction_bias": "expert_bias"},
            "plan was made for",
        ),
        ("ernie4_5_moe", {"e_score_correction_bias": None}, "as far as these tell"),  # mlx-lm has no such bias
    ],
)
def test_routers_that_mlx_lm_names_otherwise(
    name: str, renamed: dict[str, str | None], proof: str, tmp_path: Path
) -> None:
    model = tiny_model(name)
    model._folder = tmp_path / "model"
    tensors = {}
    for key, tensor in mlx_tensors(model).items():
        old = next((end for end in renamed if key.endswith(end)), "")
        new = renamed.get(old, "")
        if new is not None:
            tensors[key.removesuffix(old) + new] = tensor
    plan = plan_for(model, 6)
    form = form_of(source := write_mlx(tmp_path / "source", model, tensors))
    assert form is not None
    cut = form.prepare(plan, source, tmp_path / "out")
    assert cut.facts["known_by"].endswith(proof)
    after = load_file(cut.write() / "model.safetensors")
    for layer, retained in plan.retained.items():
        keys = [key for key in tensors if f"layers.{layer}.mlp." in key and (".gate." in key or "bias" in key)]
        assert len(keys) == (2 if name == "bailing_hybrid" else 1)
        assert all(torch.equal(after[key], tensors[key][list(retained)]) for key in keys)


def test_what_transformers_would_open_with_random_experts_is_not_judged(folders: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match="is an MLX folder, and models are judged in transformers"):
        compare(str(folders["deepseek_v3"]), make_texts(2))


def test_groups_and_biases_below_zero_are_said(
    models: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    form = form_of(folders["deepseek_v3"])
    assert form is not None
    form.prepare(plan_for(models["deepseek_v3"], 8), folders["deepseek_v3"], tmp_path / "out")
    assert "correction bias is below zero" in caplog.text


def test_which_folders_are_mlx(models: dict[str, PreTrainedModel], folders: dict[str, Path], tmp_path: Path) -> None:
    assert all(form_of(folder).name == "an MLX folder" for folder in folders.values())  # type: ignore[union-attr]
    assert not any(is_mlx_folder(Path(model._folder)) for model in models.values())  # type: ignore[arg-type]
    assert not is_mlx_folder(tmp_path)
    shutil.copytree(folders["deepseek_v3"], tmp_path / "plain")
    held = load_file(tmp_path / "plain" / "model.safetensors")
    save_file(held, tmp_path / "plain" / "model.safetensors")
    assert is_mlx_folder(tmp_path / "plain")  # switch_mlp tells it
    numbered = {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 2)}
    (tmp_path / "plain" / "model.safetensors.index.json").unlink()
    save_file(numbered, tmp_path / "plain" / "model.safetensors", {"format": "mlx"})
    assert not is_mlx_folder(tmp_path / "plain")  # the original's layout, written with mlx
    (tmp_path / "plain" / "model.safetensors").write_bytes(b"short")
    assert not is_mlx_folder(tmp_path / "plain")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_affine_numbers(bits: int) -> None:
    torch.manual_seed(bits)
    made = packed(torch.randn(6, 64), bits, 32)
    assert torch.allclose(dequantised(made["weight"], made["scales"], made["biases"], 64), made["numbers"], atol=1e-6)
    with pytest.raises(ValueError, match="are no 60 columns"):
        dequantised(made["weight"], made["scales"], made["biases"], 60)
    with pytest.raises(ValueError, match="without biases"):
        dequantised(made["weight"], made["scales"], None, 64)
