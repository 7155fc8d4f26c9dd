# SPDX-License-Identifier: Apache-2.0
"""The front door: prune, save, reload, apply again, and requests it refuses."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import KINDS, assert_equal_states, load, make_model, make_texts, make_tokenizer, save_checkpoint
from huggingface_hub import HfApi
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OlmoeConfig, PreTrainedTokenizerBase

import optimum_moe_prune
from optimum_moe_prune import Compute, MoEPruner, MoEPrunerConfig, PruningPlan, RequestError, RunError
from optimum_moe_prune.architectures import table
from optimum_moe_prune.calibration.in_memory import collect
from optimum_moe_prune.calibration.samples import CalibrationSet
from optimum_moe_prune.models.blocks import moe_blocks
from optimum_moe_prune.statistics.stats import Need

TEXTS = make_texts()
COUNT_KEY = {kind: "num_local_experts" if kind == "mixtral" else "num_experts" for kind in KINDS}


def test_prune_save_reload_and_apply_again(kind: str, folder: Path, tmp_path: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, MoEPrunerConfig(method="mosaic", num_experts=4))
    base = load(folder)
    model = pruner.prune(base, calibration=TEXTS)
    assert model is base
    assert pruner.pruning_plan.num_experts == {b.layer: 4 for b in moe_blocks(model)}
    assert pruner.stats.domains.keys() == {"low", "high"}
    pruner.save_pretrained(tmp_path / "out")

    reloaded = load(tmp_path / "out")
    assert_equal_states(reloaded, model)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"] == [1, 4, 5]
    assert PruningPlan.load(tmp_path / "out") == pruner.pruning_plan
    assert MoEPrunerConfig.from_pretrained(tmp_path / "out") == pruner.config
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"], "nothing is left beside the target"

    again = MoEPruner.from_pretrained(tmp_path / "out")
    assert_equal_states(again.prune(load(folder)), model)
    again.save_pretrained(tmp_path / "again")
    for name in (
        "model.safetensors",
        "config.json",
        "moe_pruning_plan.json",
        "moe_pruner_config.json",
        "tokenizer.json",
    ):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_only_the_pruning_keys_of_the_config_change(kind: str, folder: Path, tmp_path: Path) -> None:
    source = json.loads((folder / "config.json").read_text())
    source = {"torch_dtype": source.pop("dtype"), "rope_theta": 10000.0, "a_key_of_others": [1, {"x": None}], **source}
    source["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(source))
    pruner = MoEPruner.from_pretrained(folder, method="random", num_experts=3)
    pruner.prune(load(folder))
    pruner.save_pretrained(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == source | {COUNT_KEY[kind]: 3}
    assert list(written) == list(source)
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_a_model_in_another_dtype_is_saved_as_it_is(folder: Path, tmp_path: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="random", num_experts=3)
    model = pruner.prune(load(folder, dtype=torch.float32))
    pruner.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert_equal_states(load(tmp_path / "out"), model)


def test_model_save_pretrained_alone_gives_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = MoEPruner.from_pretrained(folder, method="random", num_experts=3).prune(load(folder))
    model.save_pretrained(tmp_path / "out")
    assert_equal_states(load(tmp_path / "out"), model)


def test_generation_config_is_carried(folder: Path, tmp_path: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_new_tokens": 7}))
    pruner = MoEPruner.from_pretrained(folder, method="random", num_experts=3)
    pruner.prune(load(folder))
    pruner.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["max_new_tokens"] == 7


def test_pruning_a_pruned_checkpoint_keeps_the_earlier_plan(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = MoEPruner.from_pretrained(folder, method="random", num_experts=5)
    first.prune(load(folder))
    first.save_pretrained(tmp_path / "five")
    with caplog.at_level(logging.WARNING):
        recipe = MoEPrunerConfig(method="frequency", num_experts=3)
        second = MoEPruner.from_pretrained(tmp_path / "five", config=recipe)
    assert "five was pruned before; with a new recipe it is taken as the model to prune" in caplog.text
    second.prune(load(tmp_path / "five"), TEXTS)
    assert set(second.pruning_plan.original_num_experts.values()) == {5}
    second.save_pretrained(tmp_path / "three")
    plan = PruningPlan.load(tmp_path / "three")
    assert PruningPlan.from_dict(plan.provenance["parent"]) == first.pruning_plan
    assert_equal_states(MoEPruner.from_pretrained(tmp_path / "three").prune(load(tmp_path / "five")), second.model)


def test_a_plan_for_another_checkpoint_has_no_parent_of_the_bound_one(folder: Path, tmp_path: Path) -> None:
    first = MoEPruner.from_pretrained(folder, method="random", num_experts=5)
    first.prune_checkpoint(tmp_path / "five")
    (tmp_path / "five" / "README.new.md").write_text("a card that was not put in place")
    second = MoEPruner.from_pretrained(tmp_path / "five", MoEPrunerConfig(method="random", num_experts=3))
    second.prune_checkpoint(tmp_path / "three")
    assert "parent" in PruningPlan.load(tmp_path / "three").provenance
    assert not (tmp_path / "three" / "README.new.md").exists()
    second.pruning_plan = None
    second.prune_checkpoint(tmp_path / "other", source=folder)
    assert set(second.pruning_plan.original_num_experts.values()) != {5}
    for plan in (second.pruning_plan, PruningPlan.load(tmp_path / "other")):
        assert "parent" not in plan.provenance


def test_what_is_no_setting_is_refused_whatever_there_is_to_do(folder: Path, tmp_path: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="random", num_experts=4)
    for _ in range(2):  # the second time there is a plan, and nothing is calculated
        with pytest.raises(TypeError, match="overwrit"):
            pruner.prune_checkpoint(tmp_path / "out", overwrit=True)
        assert not list(tmp_path.glob("*out*"))
        pruner.prune(load(folder))
    with pytest.raises(RequestError, match="is bound to no model; pass the config"):
        MoEPruner(MoEPrunerConfig(num_experts=4)).samples(["a text"])


def test_statistics_are_used_in_place_of_a_calibration(folder: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="reap", num_experts=3)
    stats = pruner.calibrate(load(folder), TEXTS)
    expected = pruner.plan(stats).retained
    pruner.prune(load(folder), stats)
    assert pruner.pruning_plan.retained == expected
    other = MoEPruner.from_pretrained(folder, method="reap", num_experts=3)
    with pytest.raises(RequestError, match="other router weights"):
        other.prune(make_model(seed=4) if "mixtral" in str(stats.model) else make_model("qwen2_moe", seed=4), stats)


def test_domain_weights_change_the_plan() -> None:
    model = make_model()
    samples = CalibrationSet.build([torch.arange(3 + 40 * i, 40 + 40 * i) for i in range(2)])
    domains = tuple(type(s)(s.hash, name, s.num_tokens) for s, name in zip(samples.samples, "ab", strict=True))
    stats = collect(model, CalibrationSet(domains, samples.token_ids), {Need.ROUTING})
    pruner = MoEPruner(MoEPrunerConfig(method="frequency", num_experts=4))
    plans = [pruner.plan(stats, weights) for weights in (None, {"a": 1000, "b": 1}, {"a": 1, "b": 1000})]
    assert plans[1].retained != plans[2].retained
    assert plans[1].provenance["calibration"]["domain_weights"] == {"a": 1000, "b": 1}


def test_random_needs_no_calibration_and_others_say_so(folder: Path) -> None:
    MoEPruner.from_pretrained(folder, method="random", num_experts=3).prune(load(folder))
    with pytest.raises(RequestError, match="method 'reap' needs a calibration"):
        MoEPruner.from_pretrained(folder, method="reap", num_experts=3).prune(load(folder))


@pytest.mark.parametrize("method", ["mosaic", "random"])
def test_nan_weights_are_found_and_nothing_changes(folder: Path, method: str) -> None:
    model = load(folder)
    with torch.no_grad():
        moe_blocks(model)[0].expert_tensors["down_proj"][2, 0, 0] = float("nan")
    pruner = MoEPruner.from_pretrained(folder, method=method, num_experts=4)
    with pytest.raises(RunError, match=r"model.layers.0.mlp.experts.down_proj holds NaN or infinite weights"):
        pruner.prune(model, TEXTS)
    assert all(b.num_experts > 4 for b in moe_blocks(model))


def test_models_without_experts_and_unknown_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_ROWS", {name: row for name, row in table._ROWS.items() if name != "olmoe"})
    dense = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(dense).save_pretrained(tmp_path / "dense")
    OlmoeConfig().save_pretrained(tmp_path / "olmoe")
    with pytest.raises(RequestError, match=r"'llama' model has no experts.*Known architectures: .*mixtral"):
        MoEPruner.from_pretrained(tmp_path / "dense", num_experts=3)
    with pytest.raises(RequestError, match="architecture 'olmoe' is not known, and could not be found out: "):
        MoEPruner.from_pretrained(tmp_path / "olmoe", num_experts=3)
    with pytest.raises(RequestError, match=r"is not a model's folder: it has no config\.json"):
        MoEPruner.from_pretrained(tmp_path, num_experts=3)


def test_a_sparse_architecture_without_sparse_layers_is_refused() -> None:
    with pytest.raises(RequestError, match="no tensor of this 'qwen2_moe' model grows with num_experts"):
        moe_blocks(make_model("qwen2_moe", mlp_only_layers=[0, 1, 2]))


def test_impossible_budgets_are_refused_by_the_config_alone(folder: Path) -> None:
    for setting in ({"num_experts": 1}, {"num_experts": 40}, {"sparsity": 0.01}, {"sparsity": 0.95}):
        with pytest.raises(RequestError, match="Ask for"):
            MoEPruner.from_pretrained(folder, method="reap", **setting)


def test_outputs_in_the_way_and_failures_leave_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="random", num_experts=3)
    with pytest.raises(RequestError, match="there is no pruned model to save"):
        pruner.save_pretrained(tmp_path / "out")
    pruner.prune(load(folder))
    with pytest.raises(RequestError, match="does not have the numbers of experts of the plan"):
        pruner.save_pretrained(tmp_path / "out", load(folder))
    with pytest.raises(RequestError, match=r"is or holds .*, which is read; name another folder"):
        pruner.save_pretrained(folder, overwrite=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    with pytest.raises(RequestError, match="exists and is not empty"):
        pruner.save_pretrained(tmp_path / "full")
    with pytest.raises(RequestError, match="holds something else than an output of this package"):
        pruner.save_pretrained(tmp_path / "full", overwrite=True)
    monkeypatch.setattr(PruningPlan, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(RunError, match=r"writing .*out failed: disk full. Nothing was left there"):
        pruner.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "model"]


def test_a_pruner_without_a_folder(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    pruner = MoEPruner(MoEPrunerConfig(method="reap", num_experts=3), tokenizer=tokenizer)
    model = pruner.prune(make_model(), TEXTS)
    pruner.save_pretrained(tmp_path / "out")
    assert_equal_states(load(tmp_path / "out"), model)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(RequestError, match="this pruner has no recipe"):
        MoEPruner().prune(make_model(), TEXTS)


def test_a_plan_edited_by_hand_applies(folder: Path, tmp_path: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="random", num_experts=3)
    pruner.prune(load(folder))
    path = pruner.pruning_plan.save(tmp_path / "plan.json")
    values = json.loads(path.read_text())
    for entry in values["layers"].values():
        entry["retained"] = [0, 2, 5]
    path.write_text(json.dumps(values))
    model = PruningPlan.load(path).apply(load(folder))
    original = load(folder)
    for now, before in zip(moe_blocks(model), moe_blocks(original), strict=True):
        assert torch.equal(now.expert_tensors["down_proj"], before.expert_tensors["down_proj"][[0, 2, 5]])


def test_changes_made_in_memory_are_saved(folder: Path, tmp_path: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="random", num_experts=3)
    model = load(folder)
    model.resize_token_embeddings(100, mean_resizing=False)
    model.config.rms_norm_eps = 0.5
    pruner.prune(model)
    pruner.save_pretrained(tmp_path / "out")
    reloaded = load(tmp_path / "out")
    assert_equal_states(reloaded, model)
    assert reloaded.config.rms_norm_eps == 0.5


def test_what_is_saved_is_the_plan_that_was_applied(folder: Path, tmp_path: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="frequency", num_experts=3)
    pruner.prune(load(folder), TEXTS)
    applied = pruner.pruning_plan
    pruner.plan(domain_weights={"low": 1e6, "high": 1})
    assert pruner.pruning_plan.provenance != applied.provenance
    pruner.save_pretrained(tmp_path / "out")
    assert PruningPlan.load(tmp_path / "out") == applied


def test_a_plan_that_was_made_is_the_one_that_is_applied(folder: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="frequency", num_experts=3)
    pruner.calibrate(calibration=TEXTS)  # loads the bound model for it
    plan = pruner.plan(domain_weights={"low": 1e6, "high": 1})
    pruner.prune(load(folder))
    assert pruner.pruning_plan is plan
    pruner.calibrate(load(folder), TEXTS[:2])
    assert pruner.pruning_plan is None, "it would not rest on the new statistics"
    with pytest.raises(RequestError, match="a calibration is needed"):
        pruner.calibrate(load(folder))


def test_overrides_reach_a_stored_recipe(folder: Path, tmp_path: Path) -> None:
    pruner = MoEPruner.from_pretrained(folder, method="random", num_experts=3)
    pruner.prune(load(folder))
    pruner.save_pretrained(tmp_path / "out")
    again = MoEPruner.from_pretrained(tmp_path / "out", batch_size=1, trust_remote_code=True)
    assert again.config.batch_size == 1 and again.config.method == "random" and again.pruning_plan is not None


def test_models_without_plain_parameters_are_refused_first(folder: Path) -> None:
    config = MoEPrunerConfig(method="random", num_experts=3)
    for attribute, value, message in (
        ("peft_config", {}, "PEFT adapters"),
        ("hf_quantizer", object(), "is quantised"),
    ):
        model = load(folder)
        setattr(model, attribute, value)
        with pytest.raises(RequestError, match=message):
            MoEPruner(config).prune(model)
    with torch.device("meta"):
        meta = make_model()
    with pytest.raises(RequestError, match="on the meta device"):
        MoEPruner(config).prune(meta)


def test_nested_experts_are_seen_and_unknown_types_list_the_known(tmp_path: Path) -> None:
    nested = LlamaConfig()
    nested.text_part = {"deep": {"num_experts": 4}}
    nested.save_pretrained(tmp_path / "nested")
    with pytest.raises(RequestError, match="architecture 'llama' is not known"):
        MoEPruner.from_pretrained(tmp_path / "nested", num_experts=3)
    for name, content in (
        ("new", {"model_type": "from_tomorrow"}),
        ("none", {}),
        ("odd", {"model_type": "mixtral", "num_local_experts": "x"}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        with pytest.raises(
            RequestError, match=r"no model can be read from .* Known architectures: .*mixtral, .*qwen2_moe"
        ):
            MoEPruner.from_pretrained(tmp_path / name, num_experts=3)


# ------------------------------------------------------------------------------------------- the recipe


def test_recipes_travel_as_json(tmp_path: Path) -> None:
    config = MoEPrunerConfig(
        method="mosaic",
        sparsity=0.5,
        count_multiple_of=4,
        method_options={"num_domains": "8"},
        protect={3: [1, 2]},
        skip_layers=[0],
        seed=7,
    )
    assert config.method_options == {"num_domains": 8}
    assert MoEPrunerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    path = config.save_pretrained(tmp_path)
    assert path.name == "moe_pruner_config.json"
    assert MoEPrunerConfig.from_pretrained(tmp_path) == MoEPrunerConfig.from_pretrained(path) == config
    assert MoEPrunerConfig.from_pretrained(tmp_path, num_experts=4).sparsity is None
    with pytest.raises(RequestError, match=r"has no moe_pruner_config\.json"):
        MoEPrunerConfig.from_pretrained(save_checkpoint("mixtral", tmp_path / "m", make_tokenizer()))


def test_overrides_take_what_depends_on_them_along() -> None:
    stored = MoEPrunerConfig(
        method="pathfinder", total_experts=20, allocation="global", sample_selection="kmeans", num_clusters=4
    ).to_dict()
    first = MoEPrunerConfig.from_dict(stored, sample_selection="first")
    assert (first.sample_selection, first.num_clusters, first.total_experts) == ("first", None, 20)
    mosaic = MoEPrunerConfig.from_dict(stored, method="mosaic", sparsity=0.5)
    assert (mosaic.allocation, mosaic.total_experts, mosaic.num_clusters) == (None, None, 4)


def test_keys_of_newer_versions_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    values = MoEPrunerConfig(num_experts=4).to_dict()
    assert values["version"] == optimum_moe_prune.__version__
    future = values | {"from_the_future": 1, "version": "99.0"}
    with caplog.at_level(logging.WARNING):
        read = MoEPrunerConfig.from_dict(future)
    assert read == MoEPrunerConfig(num_experts=4) and read.version == optimum_moe_prune.__version__
    assert "written by optimum-moe-prune 99.0, which is newer" in caplog.text and "from_the_future" in caplog.text
    for version in ({}, {"version": "0.0.1"}, {"version": values["version"]}, {"version": "no version"}):
        wrong = {"num_experts": 4, "num_sample": 3} | version
        with pytest.raises(RequestError, match=r"'num_sample' is no setting of \w+\. Settings: num_samples"):
            MoEPrunerConfig.from_dict(wrong)


def test_recipes_may_be_yaml(tmp_path: Path) -> None:
    file = tmp_path / "recipe.YML"
    file.write_text("# mine\nmethod: Soft-Frequency\nsparsity: 40%\nprotect: {0: [1, 2]}\nskip_layers: [2]\n")
    read = MoEPrunerConfig.from_pretrained(file, seed=3)
    expected = MoEPrunerConfig("soft_frequency", sparsity=0.4, protect={0: (1, 2)}, skip_layers=(2,), seed=3)
    assert read == expected and read.method == "soft_frequency"
    assert MoEPrunerConfig.from_pretrained(read.save_pretrained(tmp_path)) == expected


@pytest.mark.parametrize(("written", "meant"), [("40%", 0.4), (" 12.5 % ", 0.125), (".5%", 0.005)])
def test_fractions_as_people_write_them(written: str, meant: float) -> None:
    assert MoEPrunerConfig(sparsity=written).sparsity == meant


@pytest.mark.parametrize("written", ["40", "0", "100%", "1.5", "-1%", "many", "0,4", "%", True, "nan", [0.4]])
def test_what_is_no_fraction(written: object) -> None:
    with pytest.raises(RequestError, match="sparsity"):
        MoEPrunerConfig(sparsity=written)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bf16", "BF16", "bfloat16", "torch.bfloat16", torch.bfloat16])
def test_precisions_by_their_other_names(dtype: Any) -> None:
    assert Compute(dtype=dtype) == Compute(dtype="bfloat16")


def test_precisions_by_all_their_names() -> None:
    for name, others in {"float32": "fp32 float single full", "float16": "fp16 half f16", "auto": "AUTO"}.items():
        assert {Compute(dtype=other).dtype for other in others.split()} == {name}
    with pytest.raises(RequestError, match="dtype 'int8' is not known"):
        Compute(dtype="int8")


def test_a_recipe_needs_a_budget_only_for_a_plan(folder: Path) -> None:
    recipe = MoEPrunerConfig(method="frequency")
    pruner = MoEPruner.from_pretrained(folder, recipe)
    message = "exactly one of num_experts .* sparsity .* total_experts .* given: none"
    with pytest.raises(RequestError, match=message):
        pruner.prune_checkpoint(folder.with_name("out"), calibration=TEXTS)
    with pytest.raises(RequestError, match=message):
        pruner.prune(load(folder), TEXTS)
    stats = pruner.calibrate(calibration=TEXTS)
    with pytest.raises(RequestError, match=message):
        pruner.plan(stats)
    assert MoEPruner(MoEPrunerConfig.from_dict(recipe.to_dict(), sparsity=0.5)).plan(stats).sparsity > 0.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 4, "sparsity": 0.5}, "given: num_experts and sparsity"),
        ({"num_experts": 4, "total_experts": 9, "method": "reap"}, "given: num_experts and total_experts"),
        (
            {"total_experts": 12, "method": "mosaic"},
            "for allocations 'global', 'sensitivity' and 'estimated'",
        ),
        ({"total_experts": 12, "method": "pathfinder", "allocation": "uniform"}, "total_experts is for allocation"),
        ({"total_experts": 0, "method": "pathfinder"}, "total_experts is 0; it must be an integer of at least 1"),
        ({"num_experts": 4, "count_multiple_of": 0}, "count_multiple_of is 0; it must be an integer of at least 1"),
        ({"sparsity": 0}, "sparsity is 0; .* between 0 and 1"),
        ({"sparsity": float("nan")}, "sparsity is nan"),
        ({"num_experts": 0}, "num_experts is 0; it must be an integer of at least 1"),
        ({"num_experts": True}, "num_experts is True"),
        ({"num_experts": 4, "method": "mosiac"}, "Known: mosaic"),
        ({"num_experts": 4, "method_options": {"x": 1}}, "has no option 'x'"),
        ({"num_experts": 4, "allocation": "globl"}, "allocation 'globl' is not known. Known: global, uniform"),
        ({"num_experts": 4, "sample_selection": "best"}, "sample_selection 'best' is not known. Known: "),
        ({"num_experts": 4, "batch_size": 0}, "batch_size is 0; it must be an integer of at least 1"),
        ({"num_experts": 4, "max_length": 1}, "max_length is 1; it must be an integer of at least 2"),
        ({"num_experts": 4, "seed": -1}, "seed is -1"),
        ({"num_experts": 4, "seed": 2**32}, "seed is 4294967296; .* at most 4294967295"),
        ({"sparsity": "0.5"}, "sparsity is '0.5'"),
        ({"num_experts": 4, "method": []}, r"method \[\] is not known"),
        ({"num_experts": 4, "method_options": "abc"}, "method_options is 'abc'"),
        ({"num_experts": 4, "allocation": 5}, "allocation 5 is not known"),
        ({"num_experts": 4, "pack": "no"}, "pack is 'no'; it must be true or false"),
        ({"num_experts": 4, "protect": {"0": "12"}}, "protect must be"),
        ({"num_experts": 4, "skip_layers": [1.7]}, "protect must be"),
        ({"num_experts": 4, "protect": [1]}, r"protect must be \{layer: \[expert, ...\]\}"),
    ],
)
def test_wrong_recipes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        MoEPrunerConfig(**settings)
    with pytest.raises(RequestError, match=r"'metod' is no setting of MoEPrunerConfig\. Settings: method"):
        MoEPrunerConfig.from_dict({}, metod="mosaic")


def test_a_recipe_is_pushed_as_one_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The last step of the Hub's client replaced: which file would be uploaded where."""
    uploads = []
    monkeypatch.setattr(HfApi, "create_repo", lambda _self, repo_id, **_: SimpleNamespace(repo_id=f"me/{repo_id}"))

    def upload(_self: HfApi, **given: object) -> SimpleNamespace:
        uploads.append(given)
        return SimpleNamespace(commit_url="address")

    monkeypatch.setattr(HfApi, "upload_file", upload)
    config = MoEPrunerConfig(num_experts=4)
    assert config.push_to_hub("recipe", revision="next") == "address"
    config.save_pretrained(tmp_path / "folder", push_to_hub=True)
    assert [(u["repo_id"], u["path_in_repo"]) for u in uploads] == [
        ("me/recipe", "moe_pruner_config.json"),
        ("me/folder", "moe_pruner_config.json"),
    ]
    assert uploads[0]["revision"] == "next"
    assert json.loads(uploads[0]["path_or_fileobj"]) == config.to_dict()
