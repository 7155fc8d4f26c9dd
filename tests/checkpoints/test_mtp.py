# SPDX-License-Identifier: Apache-2.0
"""Heads for further tokens (MTP) in files: pruned as layers, kept, or left out; read back by transformers alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from architectures.published import LAYOUTS, read
from architectures.published_formats import write
from heads import (
    EXPERTS,
    HEAD,
    LAYERS,
    checkpoint,
    config_of,
    head_output,
    heads_of_tiny_models,  # noqa: F401  # a fixture
    loaded,
    masked,
    pruned,
    random_pruner,
    transformers_head,
    two_heads,
)
from oracles import call
from transformers import AutoConfig

from optimum_moe_prune import MoEPruner, PruningPlan
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.errors import RequestError

KINDS = list(HEAD)
COUNT = {"deepseek_v3": "n_routed_experts", "qwen3_5": "num_experts", "numbered": "num_experts"}
NUMBER = {
    "deepseek_v3": "num_nextn_predict_layers",
    "qwen3_5": "mtp_num_hidden_layers",
    "numbered": "mtp_num_hidden_layers",
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    return checkpoint(kind, tmp_path / "model")


def text_of(folder: Path) -> dict[str, object]:
    config = config_of(folder)
    return config.get("text_config", config)


def of_head(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    start = "mtp." if HEAD[kind].startswith("mtp") else HEAD[kind]
    return {name: tensor for name, tensor in read(folder).items() if name.startswith(start)}


def of_trunk(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    head = of_head(folder, kind)
    return {name: tensor for name, tensor in read(folder).items() if name not in head}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype and torch.equal(tensor, b[name]), name


def test_a_head_is_found_as_one_more_layer(kind: str, folder: Path) -> None:
    layout = open_layout(folder)
    (head,) = layout.heads
    assert (head.index, head.prefix, head.like, head.problem) == (LAYERS, HEAD[kind], LAYERS - 1, "")
    assert head.layer.num_experts == EXPERTS and not layout.foreign
    assert set(layout.head_names) == set(of_head(folder, kind))
    assert LAYERS not in layout.layers and LAYERS in layout.with_heads


@pytest.mark.usefixtures("heads_of_tiny_models")
def test_a_pruned_head_is_the_head_with_a_masked_router(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pruned(folder, tmp_path / "out")
    assert plan.heads == (LAYERS,) and plan.num_experts[LAYERS] == 8 == plan.uniform_num_experts
    assert PruningPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert text_of(tmp_path / "out")[COUNT[kind]] == 8 and "mtp_per_layer_config" not in text_of(tmp_path / "out")

    model = loaded(folder)
    ids = torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(1))
    expected, small = transformers_head(model), transformers_head(loaded(tmp_path / "out"))
    assert small.layers[0].mtp_block.mlp.gate.weight.shape[0] == 8
    whole = head_output(expected, hidden, ids)
    with masked(expected.layers[0].mtp_block, plan.retained[LAYERS], monkeypatch):
        oracle = head_output(expected, hidden, ids)
    found = head_output(small, hidden, ids)
    assert (whole - found).abs().max() > 1e-2
    torch.testing.assert_close(found, oracle, rtol=1e-5, atol=1e-5)


def test_without_statistics_the_largest_rows_of_the_router_stay(kind: str, folder: Path, tmp_path: Path) -> None:
    plan = pruned(folder, tmp_path / "out")
    norms = read(folder)[f"{HEAD[kind]}mlp.gate.weight"].norm(dim=1)
    assert plan.retained[LAYERS] == tuple(norms.topk(8).indices.sort().values.tolist())
    said = "without statistics, so the experts with the largest rows in the router are retained"
    assert any(said in note for note in plan.provenance["notes"])
    assert said in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.usefixtures("heads_of_tiny_models")
def test_a_head_that_is_kept_beside_equal_layers(kind: str, folder: Path, tmp_path: Path) -> None:
    plan = pruned(folder, tmp_path / "out", mtp="keep")
    assert plan.heads == () and LAYERS not in plan.retained
    text = text_of(tmp_path / "out")
    assert text[COUNT[kind]] == 8 and text["mtp_per_layer_config"] == {"0": {COUNT[kind]: EXPERTS}}
    assert_equal(of_head(tmp_path / "out", kind), of_head(folder, kind))
    a, b = transformers_head(loaded(folder)), transformers_head(loaded(tmp_path / "out"))
    ids, hidden = torch.arange(3, 13)[None], torch.randn(1, 10, 32)
    assert torch.equal(head_output(a, hidden, ids), head_output(b, hidden, ids))
    again = pruned(tmp_path / "out", tmp_path / "again", num_experts=6, mtp="prune")  # of a head wider than the layers
    assert again.original_num_experts[LAYERS] == EXPERTS and again.num_experts[LAYERS] == 6
    assert not text_of(tmp_path / "again").get("mtp_per_layer_config")
    assert transformers_head(loaded(tmp_path / "again")).layers[0].mtp_block.mlp.gate.weight.shape[0] == 6


def test_a_head_that_nobody_could_load_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint("qwen3_5", tmp_path / "model", loads=False)
    pruner = random_pruner(folder, mtp="keep")
    with pytest.raises(RequestError, match=r"head 4 would have 12 experts, and config.json says 8 .*num_mtp_layers"):
        pruner.prune_checkpoint(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    random_pruner(folder, mtp="prune").prune_checkpoint(tmp_path / "out")  # vLLM builds it by the one number


def test_a_head_is_left_out(kind: str, folder: Path, tmp_path: Path) -> None:
    plan = pruned(folder, tmp_path / "out", mtp="drop")
    assert plan.heads == () and plan.config["mtp"] == "drop"
    assert not of_head(tmp_path / "out", kind)
    text = text_of(tmp_path / "out")
    assert text[NUMBER[kind]] == 0 and not text.get("num_mtp_layers") and not text.get("mtp_layer_types")
    assert not open_layout(tmp_path / "out").heads
    assert "left out" in (tmp_path / "out" / "README.md").read_text()
    original = AutoConfig.from_pretrained(folder).get_text_config().to_dict()
    left = AutoConfig.from_pretrained(tmp_path / "out").get_text_config().to_dict()
    changed = {key for key in original if original[key] != left.get(key)}
    assert changed <= {COUNT[kind], NUMBER[kind], "num_mtp_layers", "mtp_layer_types", "_name_or_path"}


@pytest.mark.parametrize("mtp", ["prune", "keep", "drop"])
def test_the_layers_are_those_of_a_cut_without_heads(kind: str, folder: Path, tmp_path: Path, mtp: str) -> None:
    pruned(folder, tmp_path / "out", mtp=mtp)
    bare = write(tmp_path / "bare", of_trunk(folder, kind), config_of(folder))
    pruned(bare, tmp_path / "trunk")
    assert_equal(of_trunk(tmp_path / "out", kind), read(tmp_path / "trunk"))


def test_unequal_layers_keep_a_head_whole(kind: str, folder: Path, tmp_path: Path) -> None:
    plan = pruned(folder, tmp_path / "out", allocation="global")
    assert plan.uniform_num_experts is None and plan.heads == ()
    assert_equal(of_head(tmp_path / "out", kind), of_head(folder, kind))
    text = text_of(tmp_path / "out")
    assert text[COUNT[kind]] == EXPERTS and "mtp_per_layer_config" not in text


@pytest.mark.usefixtures("heads_of_tiny_models")
def test_a_head_pruned_beside_unequal_layers(kind: str, folder: Path, tmp_path: Path) -> None:
    plan = pruned(folder, tmp_path / "out", allocation="global", mtp="prune")
    assert plan.uniform_num_experts is None and plan.num_experts[LAYERS] == 8  # as many as layers on average
    assert text_of(tmp_path / "out")["mtp_per_layer_config"] == {"0": {COUNT[kind]: 8}}
    assert transformers_head(loaded(tmp_path / "out")).layers[0].mtp_block.mlp.gate.weight.shape[0] == 8


@pytest.mark.usefixtures("heads_of_tiny_models")
@pytest.mark.parametrize("settings", [{}, {"mtp": "keep"}, {"allocation": "global"}], ids=["prune", "keep", "unequal"])
def test_drafting_with_the_head_changes_no_token(tmp_path: Path, settings: dict[str, str]) -> None:
    folder = checkpoint("deepseek_v3", tmp_path / "model")
    pruned(folder, tmp_path / "out", **settings)
    model = loaded(tmp_path / "out")
    ids = torch.tensor([[1, 17, 40, 8, 33]])
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)
    drafted = model.generate(ids, max_new_tokens=12, do_sample=False, use_mtp=True)
    assert torch.equal(plain, drafted)


@pytest.mark.usefixtures("heads_of_tiny_models")
def test_two_heads(tmp_path: Path) -> None:
    folder = two_heads(tmp_path / "model")
    assert [head.index for head in open_layout(folder).heads] == [4, 5]
    assert pruned(folder, tmp_path / "out").heads == (4, 5)
    model = loaded(tmp_path / "out")
    ids = torch.tensor([[1, 17, 40, 8, 33]])
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(plain, model.generate(ids, max_new_tokens=8, do_sample=False, use_mtp=True))
    pruned(folder, tmp_path / "dropped", mtp="drop")
    assert not [name for name in read(tmp_path / "dropped") if re.match(r"model\.layers\.[45]\.", name)]


def test_other_experts_are_no_heads(folder: Path, tmp_path: Path) -> None:
    """Those of another part of the model, as of a talker, are counted elsewhere."""
    other = {"talker.layers.0.mlp.experts.gate_up_proj": torch.ones(EXPERTS, 2)}
    foreign = write(tmp_path / "foreign", read(folder) | other, config_of(folder))
    assert open_layout(foreign).foreign == list(other)
    with pytest.raises(RequestError, match=r"talker\..* are experts outside the model's layers, which no plan names"):
        random_pruner(foreign).prune_checkpoint(tmp_path / "out")
    pruned(foreign, tmp_path / "out", allocation="global")
    assert read(tmp_path / "out")["talker.layers.0.mlp.experts.gate_up_proj"].shape == (EXPERTS, 2)


def test_old_plans_and_other_ways(kind: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan that knows of no heads is applied by the default, or as the flag says; a settled one gives the same."""
    plan = pruned(folder, tmp_path / "out").without_heads
    assert plan.heads == () and LAYERS not in plan.retained
    path = plan.save(tmp_path / "plan.json")
    call(capsys, "apply", "--model", folder, "--plan", path, tmp_path / "applied")
    assert_equal(read(tmp_path / "applied"), read(tmp_path / "out"))
    PruningPlan.load(tmp_path / "applied").apply_to_checkpoint(folder, tmp_path / "again")
    assert_equal(read(tmp_path / "again"), read(tmp_path / "out"))
    for way in ("drop", "keep"):
        code, _, _ = call(capsys, "apply", "--model", folder, "--plan", tmp_path / "out" / "moe_pruning_plan.json",
                          "--mtp", way, tmp_path / way)  # fmt: skip
        assert code == 0
    assert not of_head(tmp_path / "drop", kind)
    assert_equal(of_head(tmp_path / "keep", kind), of_head(folder, kind))
    stored = PruningPlan.load(tmp_path / "drop")
    assert stored.config["mtp"] == "drop" and [n for n in stored.provenance["notes"] if "head" in n] == [
        "head for further tokens (layer 4): left out"
    ]
    stored.apply_to_checkpoint(folder, tmp_path / "dropped")
    assert_equal(read(tmp_path / "dropped"), read(tmp_path / "drop"))


def test_a_plan_with_heads_prunes_a_model_in_memory(folder: Path, tmp_path: Path) -> None:
    plan = pruned(folder, tmp_path / "out")
    pruner = MoEPruner.from_plan(plan, folder)
    pruner.prune(loaded(folder))
    pruner.save_pretrained(tmp_path / "memory")
    trunk = loaded(tmp_path / "out").state_dict()
    assert_equal(dict(trunk), dict(loaded(tmp_path / "memory").state_dict()))


def test_a_plan_for_another_head_is_refused(folder: Path, tmp_path: Path) -> None:
    values = pruned(folder, tmp_path / "out").to_dict()
    values["layers"]["4"]["original_num_experts"] = 13
    with pytest.raises(RequestError, match="with 13 experts in head 4; this model has 12"):
        PruningPlan.from_dict(values).apply_to_checkpoint(folder, tmp_path / "other")


def test_scales_in_a_head_travel_with_their_experts(tmp_path: Path) -> None:
    folder = LAYOUTS["deepseek_v3_fp8"](tmp_path / "model")
    plan = pruned(folder, tmp_path / "out")
    before, after = read(folder), read(tmp_path / "out")
    for new, old in enumerate(plan.retained[LAYERS]):
        for part in ("gate_proj.weight", "gate_proj.weight_scale_inv", "down_proj.weight_scale_inv"):
            path = f"model.layers.{LAYERS}.mlp.experts.{{}}.{part}"
            assert torch.equal(after[path.format(new)].float(), before[path.format(old)].float())
    for part in ("gate.weight", "gate.e_score_correction_bias"):
        path = f"model.layers.{LAYERS}.mlp.{part}"
        assert torch.equal(after[path], before[path][list(plan.retained[LAYERS])])
    assert f"model.layers.{LAYERS}.mlp.experts.8.gate_proj.weight" not in after
    for name in ("eh_proj.weight", "shared_head.head.weight", "self_attn.o_proj.weight_scale_inv"):
        path = f"model.layers.{LAYERS}.{name}"
        assert torch.equal(after[path].float(), before[path].float())


def test_native_names_of_deepseek_v4(tmp_path: Path) -> None:
    folder = LAYOUTS["deepseek_v4_native"](tmp_path / "model")
    plan = pruned(folder, tmp_path / "out")
    before, after = read(folder), read(tmp_path / "out")
    assert after["mtp.0.ffn.gate.weight"].shape[0] == 8
    for new, old in enumerate(plan.retained[LAYERS]):
        for part in ("w1.weight", "w1.scale"):
            path = f"mtp.0.ffn.experts.{{}}.{part}"
            assert torch.equal(after[path.format(new)].view(torch.uint8), before[path.format(old)].view(torch.uint8))
    pruned(folder, tmp_path / "dropped", mtp="drop")
    assert not [name for name in read(tmp_path / "dropped") if name.startswith("mtp.")]
    assert config_of(tmp_path / "dropped")["num_nextn_predict_layers"] == 0


def test_damaged_heads_are_named(tmp_path: Path) -> None:
    whole = checkpoint("deepseek_v3", tmp_path / "whole")
    tensors = read(whole)
    del tensors["model.layers.4.mlp.experts.5.up_proj.weight"]
    folder = write(tmp_path / "model", tensors, config_of(whole))
    with pytest.raises(RequestError, match=r"outside the model's layers, .*experts.5.up_proj.weight is missing"):
        random_pruner(folder).prune_checkpoint(tmp_path / "out")
    random_pruner(folder, mtp="drop").prune_checkpoint(tmp_path / "out")


def test_a_wrong_way_is_refused(folder: Path) -> None:
    with pytest.raises(RequestError, match="mtp 'remove' is not known"):
        random_pruner(folder, mtp="remove")
