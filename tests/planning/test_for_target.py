# SPDX-License-Identifier: Apache-2.0
"""Recipes and plans for a target: numbers are rounded to what it takes or refused; outputs say whom they are for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from architectures.tiny import tiny_config, tiny_model
from conftest import make_model, save_checkpoint
from oracles import call, layout_of, plan_for
from transformers import AutoConfig, PreTrainedTokenizerFast

from optimum_moe_prune import MoEPruner, MoEPrunerConfig, PruningPlan
from optimum_moe_prune.architectures.table import architecture_of
from optimum_moe_prune.errors import RequestError
from optimum_moe_prune.planning.for_target import Served, recipe_for_target, served_by, with_target
from optimum_moe_prune.planning.work import plan_work
from optimum_moe_prune.surgery.settled import settled
from optimum_moe_prune.targets.table import TARGETS, get_target
from optimum_moe_prune.targets.target import CHECKPOINT, READ, Target

LAYERS = {0: 32, 1: 32, 2: 32}


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """A program that takes even numbers alone, also unequal ones, and reads a list of them."""

    def with_list(values: dict[str, Any], counts: Any) -> dict[str, Any]:
        return {**values, "experts_by_layer": list(counts.values())}

    target = Target(
        name="pairs",
        program="Pairs",
        version="1.0",
        opens=CHECKPOINT,
        uniform="yes",
        unequal="yes",
        quantised="no",
        evidence=READ,
        parallel="devices",
        count_multiple=lambda spec, config, size: 2 * size,
        why_multiple=lambda spec, config, size: f"it wants multiples of {2 * size}",
        check=lambda spec, config, counts, size: "refuses 6" if counts and 6 in counts.values() else None,
        config=with_list,
        knows=lambda config: False,
    )
    monkeypatch.setitem(TARGETS, "pairs", target)
    yield target


@pytest.fixture(scope="module")
def planned() -> PruningPlan:
    return plan_for(make_model("mixtral"), 6)


def rounded(recipe: MoEPrunerConfig, model_type: str = "qwen3_moe") -> tuple[MoEPrunerConfig, list[str]]:
    config = tiny_config(model_type)
    config.architectures = [{"qwen3_moe": "Qwen3MoeForCausalLM", "gpt_oss": "GptOssForCausalLM"}.get(model_type, "")]
    return recipe_for_target(recipe, architecture_of(config), config, LAYERS)


@pytest.mark.parametrize(
    ("asked", "size", "kept"),
    [
        ({"num_experts": 13}, 4, {"num_experts": 16}),
        ({"num_experts": 16}, 4, {"num_experts": 16}),
        ({"num_experts": 31}, 4, {"num_experts": 28}),  # above are all 32
        ({"sparsity": 0.3}, 8, {"num_experts": 24}),
        ({"sparsity": 0.25}, 8, {"sparsity": 0.25}),
        ({"num_experts": 13}, 1, {"num_experts": 13}),
        ({"num_experts": 10, "count_multiple_of": 5}, 2, {"num_experts": 10}),
        ({"num_experts": 15, "count_multiple_of": 5}, 2, {"num_experts": 20}),
    ],
)
def test_a_uniform_budget_is_rounded_up(asked: dict[str, Any], size: int, kept: dict[str, Any]) -> None:
    recipe, notes = rounded(MoEPrunerConfig(method="random", target="vllm", parallel_size=size, **asked))
    found = {name: getattr(recipe, name) for name in ("num_experts", "sparsity")}
    assert {name: value for name, value in found.items() if value is not None} == kept
    same = all(asked.get(name) == value for name, value in kept.items())
    assert not notes if same else len(notes) == 1 and f"that {size} devices share evenly" in notes[0]
    assert rounded(recipe) == (recipe, [])  # the rounded recipe asks for what it gets


def test_what_was_wrong_before_is_refused_as_ever() -> None:
    recipe = MoEPrunerConfig(method="random", target="vllm", parallel_size=4, num_experts=13, count_multiple_of=8)
    with pytest.raises(RequestError, match=r"count_multiple_of is 8\. Ask for 8 or 16"):
        rounded(recipe)
    with pytest.raises(RequestError, match="asks for more experts than layer 0 has"):
        rounded(replace(recipe, num_experts=40, count_multiple_of=1))
    with pytest.raises(RequestError, match=r"nothing to prune"):
        rounded(replace(recipe, num_experts=32, count_multiple_of=1))


@pytest.mark.parametrize(
    ("asked", "total"),
    [
        ({"total_experts": 41}, 44),
        ({"total_experts": 44}, 44),
        ({"num_experts": 13}, 40),
        ({"sparsity": 0.5}, 48),
        ({"total_experts": 95}, 92),
    ],
)
def test_a_budget_for_the_whole_model_is_rounded_up(pairs: Target, asked: dict[str, Any], total: int) -> None:
    recipe, notes = rounded(
        MoEPrunerConfig(method="reap", allocation="global", target="pairs", parallel_size=2, **asked)
    )
    assert recipe.count_multiple_of == 4
    if asked in ({"total_experts": total}, {"sparsity": 0.5}):
        assert not notes and {name: getattr(recipe, name) for name in asked} == asked
    else:
        assert recipe.total_experts == total and recipe.num_experts is None and recipe.sparsity is None
        assert f"kept for Pairs 1.0: {total} experts in all, since it wants multiples of 4" in notes[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"num_experts": 16, "parallel_size": 64},
            "a layer has 32 experts at most, and none can be removed for vLLM 0.33, since its expert load balancer "
            "takes only numbers that 64 devices share evenly. Ask for fewer devices; parallel_size is 64.",
        ),
        (
            {"num_experts": 16, "parallel_size": 6, "count_multiple_of": 32},
            r"share evenly \(with count_multiple_of, multiples of 96\). Ask",
        ),
        (
            {"sparsity": 0.5, "allocation": "global", "method": "reap"},
            "allocation='global' leaves layers with different numbers of experts, and vLLM 0.33 builds all layers "
            "with the same number of experts. Ask for allocation='uniform', or leave out target='vllm'.",
        ),
        (
            {"num_experts": 16, "skip_layers": (1,)},
            r"layers keep 16 to 32 experts, and vLLM 0.33 builds .* \(a uniform allocation, and no skipped layers\)",
        ),
    ],
)
def test_what_a_target_refuses_of_a_recipe(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        rounded(MoEPrunerConfig(**{"method": "random", "target": "vllm", **settings}))


def test_a_number_that_it_refuses_by_itself(pairs: Target) -> None:
    with pytest.raises(RequestError, match=r"layers keep 6 experts, and Pairs 1.0 refuses 6\. Ask"):
        rounded(MoEPrunerConfig(method="random", target="pairs", num_experts=6))
    recipe, notes = rounded(MoEPrunerConfig(method="random", target="pairs", num_experts=8))
    assert recipe.num_experts == 8 and len(notes) == 1
    assert notes[0].startswith("Pairs 1.0 has no implementation of its own of a 'qwen3_moe' model")


def test_a_file_of_another_form_is_made_of_it() -> None:
    _, notes = rounded(MoEPrunerConfig(method="random", target="llama.cpp", num_experts=7))
    assert any(note.endswith("opens GGUF files: this checkpoint has to be converted to one") for note in notes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target": "vlm"}, "target is 'vlm', and no program of that name is known. Known: vllm"),
        ({"parallel_size": 2}, "parallel_size is for a target that spreads experts over devices, and none is given"),
        ({"target": "transformers", "parallel_size": 2}, "and transformers has no use for it"),
        ({"target": "vllm", "parallel_size": 0}, "parallel_size is 0; it must be an integer of at least 1"),
        ({"target": "vllm", "parallel_size": "2"}, "parallel_size is '2'; it must be an integer of at least 1"),
        ({"target": "vllm", "parallel_size": True}, "parallel_size is True; it must be an integer of at least 1"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict[str, Any], said: str, planned: PruningPlan) -> None:
    with pytest.raises(RequestError, match=said):
        MoEPrunerConfig(num_experts=4, **settings)
    with pytest.raises(RequestError, match=said):
        with_target(planned, settings.get("target"), settings.get("parallel_size"))


def test_a_recipe_keeps_the_name_of_the_table() -> None:
    recipe = MoEPrunerConfig(num_experts=4, target="vLLM", parallel_size=2)
    assert recipe.target == "vllm" and MoEPrunerConfig.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


# ------------------------------------------------------------------------------------------- models and files


@pytest.fixture
def mixtral(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    return save_checkpoint("mixtral", tmp_path / "model", tokenizer)


def test_what_measures_keeps_the_same_number_where_the_target_wants_that(mixtral: Path) -> None:
    recipe, layout = MoEPrunerConfig(sparsity=0.5, target="vllm"), layout_of(mixtral)
    made = settled(recipe, layout)
    assert made.recipe.allocation == "uniform"
    assert made.notes == (
        "every layer keeps the same number of experts: vLLM 0.33 builds all layers with the same number of experts",
    )
    assert settled(replace(recipe, target="transformers"), layout).recipe.allocates == "sensitivity"
    assert settled(replace(recipe, target=None), make_model("mixtral")).recipe.allocates == "sensitivity"
    assert settled(recipe, make_model("mixtral")).recipe.allocation == "uniform"


def test_what_fits_is_refused_before_the_work(mixtral: Path) -> None:
    recipe = MoEPrunerConfig(method="random", fit="110KB", target="vllm", skip_layers=(1,))
    with pytest.raises(RequestError, match=r"layers keep \d to 8 experts, and vLLM 0.33 builds all layers"):
        settled(recipe, layout_of(mixtral))
    made = settled(replace(recipe, skip_layers=(), parallel_size=2), layout_of(mixtral))
    assert made.fit is not None and made.recipe.num_experts in (2, 4, 6) and made.notes == ()


def test_the_plan_of_the_work_knows_the_target_and_what_lies_beside(mixtral: Path) -> None:
    recipe = MoEPrunerConfig(method="random", num_experts=3, target="vllm", parallel_size=4)
    work = plan_work(layout_of(mixtral), recipe)
    assert work.choice is not None and work.choice.total == 12 and len(work.notes) == 1
    uneven = MoEPrunerConfig(method="reap", sparsity=0.5, allocation="global")
    said = plan_work(layout_of(mixtral), uneven, standalone=True).opened
    assert said.startswith("transformers 5.14+ (after import optimum_moe_prune, or with trust_remote_code=True)")


def test_outputs_say_whom_they_are_for(pairs: Target, mixtral: Path, tmp_path: Path) -> None:
    config = MoEPrunerConfig(method="random", num_experts=3, target="pairs", parallel_size=2)
    pruner = MoEPruner.from_pretrained(mixtral, config)
    written = pruner.prune_checkpoint(tmp_path / "files")
    plan = PruningPlan.load(written)
    assert plan.uniform_num_experts == 4 and plan.config["count_multiple_of"] == 4
    assert plan.provenance["target"] == {
        "name": "pairs", "program": "Pairs", "version": "1.0", "parallel_size": 2, "evidence": READ,
    }  # fmt: skip
    assert any("kept for Pairs 1.0: 4 experts in a layer" in note for note in plan.notes)
    values = json.loads((written / "config.json").read_text(encoding="utf-8"))
    assert values["experts_by_layer"] == [4, 4, 4]
    card = (written / "README.md").read_text(encoding="utf-8")
    read = "vLLM 0.33 (read in source), SGLang 0.5.23 (read in source)"
    assert f"\nOpened by: transformers 5.14+, {read}.\n" in card
    assert "--num-experts 4 --count-multiple-of 4 --for pairs --parallel-size 2 OUTPUT" in card
    in_memory = MoEPruner.from_pretrained(mixtral, config)
    in_memory.prune(make_model("mixtral").bfloat16())
    saved = in_memory.save_pretrained(tmp_path / "saved")
    assert json.loads((saved / "config.json").read_text(encoding="utf-8")) == values
    assert PruningPlan.load(saved).provenance["target"] == plan.provenance["target"]


def test_a_plan_is_applied_for_a_target(mixtral: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_for(make_model("mixtral"), 6)
    served = served_by(with_target(plan, "vLLM", 4), layout_of(mixtral).spec, layout_of(mixtral).config)
    assert served is not None and served.target is get_target("vllm") and served.parallel_size == 4
    assert with_target(plan, None) is plan and served_by(plan, served.spec, served.config) is None
    with pytest.raises(RequestError, match=r"SGLang 0\.5\.23 spreads experts evenly only"):
        plan.apply_to_checkpoint(mixtral, tmp_path / "out", program="sglang", parallel_size=4)
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING):
        plan.apply_to_checkpoint(mixtral, tmp_path / "out", program="vllm", parallel_size=4)
    said = "vLLM 0.33 takes 6 experts in a layer, but its expert load balancer takes only numbers that 4 devices share"
    there = PruningPlan.load(tmp_path / "out")
    assert any(note.startswith(said) for note in there.notes)
    again = with_target(there, "sglang")  # of another program the devices are not those
    assert (again.config["target"], again.config["parallel_size"]) == ("sglang", 1)
    with pytest.raises(RequestError, match="the plan's parallel_size is 'two'"):
        served_by(replace(plan, config={"target": "vllm", "parallel_size": "two"}), served.spec, served.config)


def test_unequal_layers_are_not_for_those_who_build_them_alike(mixtral: Path, tmp_path: Path) -> None:
    plan = PruningPlan.from_dict(plan_for(make_model("mixtral"), 6).to_dict())
    uneven = replace(plan, retained={**plan.retained, 1: (0, 1, 2, 3)})
    with pytest.raises(RequestError, match=r"layers keep 4 to 6 experts, and vLLM 0.33 builds all layers"):
        uneven.apply_to_checkpoint(mixtral, tmp_path / "out", program="vllm")
    uneven.apply_to_checkpoint(mixtral, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "(after import optimum_moe_prune); not by vLLM 0.33, SGLang 0.5.23." in card


@pytest.mark.parametrize("way", ["files", "memory"])
def test_routers_keys_are_in_the_output(way: str, tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "model")
    config = MoEPrunerConfig(method="random", num_experts=8, target="vllm")
    pruner = MoEPruner.from_pretrained(tmp_path / "model", config)
    if way == "files":
        pruner.prune_checkpoint(tmp_path / "out")
    else:
        pruner.prune(tiny_model("deepseek_v3"))
        pruner.save_pretrained(tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert (values["topk_method"], values["scoring_func"]) == ("noaux_tc", "sigmoid")
    assert "\nOpened by: transformers 5.14+, vLLM 0.33" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    AutoConfig.from_pretrained(tmp_path / "out")
    plain = MoEPruner.from_pretrained(tmp_path / "model", replace(config, target=None))
    plain.prune_checkpoint(tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")
    assert "transformers 5.14+; not by vLLM 0.33 (it reads topk_method and scoring_func, which --for vllm" in card


def test_on_the_command_line(mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", "--model", mixtral, "--method", "random", "--num-experts", 3)
    code, shown, _ = call(capsys, *run, "--for", "sglang", "--parallel-size", 2, "--dry-run", tmp_path / "out")
    assert code == 0 and "4 experts in each layer" in shown
    assert "\nsince   asked for: 3 experts in a layer; kept for SGLang 0.5.23: 4 experts in a layer, since" in shown
    assert "opened  by transformers 5.14+, vLLM 0.33 (read in source), SGLang 0.5.23 (read in source)" in shown
    uneven = ("run", "--model", mixtral, "--method", "random", "--sparsity", "0.5", "--allocation", "global")
    code, shown, _ = call(capsys, *uneven, "--dry-run", tmp_path / "out")
    assert code == 0 and "(after import optimum_moe_prune); not by vLLM 0.33, SGLang 0.5.23\n" in shown
    code, shown, _ = call(capsys, *run, "--for", "sglang", "--parallel-size", 2, "--json", tmp_path / "out")
    values = json.loads(shown)
    assert code == 0 and values["opened_by"].startswith("transformers 5.14+, vLLM 0.33")
    assert values["num_experts"] == {"0": 4, "1": 4, "2": 4}
    plan = tmp_path / "out" / "moe_pruning_plan.json"
    again = ("apply", "--model", mixtral, "--plan", plan, tmp_path / "again", "--for", "sglang")
    code, _, error = call(capsys, *again, "--parallel-size", 8)
    assert code == 2 and "error: layers keep 4 experts, and SGLang 0.5.23 spreads" in error
    assert "--parallel-size is 8. Ask for" in error and not (tmp_path / "again").exists()
    code, _, error = call(capsys, *run, "--for", "vlm", tmp_path / "again")
    assert code == 2 and error.startswith("error: --for is 'vlm', and no program of that name is known. Known: vllm")
    code, _, error = call(capsys, *run, "--parallel-size", 2, tmp_path / "again")
    assert code == 2 and "error: --parallel-size is for a target" in error
    code, shown, _ = call(capsys, *again, "--parallel-size", 4)
    assert code == 0 and "opened by: transformers 5.14+" in shown


def test_a_plan_from_statistics_needs_the_models_config(
    mixtral: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], samples: Any
) -> None:
    stats = MoEPruner.from_pretrained(mixtral, MoEPrunerConfig(method="reap")).calibrate(calibration=samples)
    stats.save(tmp_path / "stats")
    plan = ("plan", "--stats", tmp_path / "stats", "--method", "reap", "--sparsity", "0.6", tmp_path / "p.json")
    code, _, error = call(capsys, *plan, "--model", mixtral)
    assert code == 2 and "--model is for --fit SIZE and --for NAME" in error
    moved = mixtral.rename(tmp_path / "moved")
    code, _, error = call(capsys, *plan, "--for", "vllm", "--parallel-size", 2)
    assert code == 2 and "error: --for needs the model's config, and " in error and "(--model DIR)" in error
    code, shown, _ = call(capsys, *plan, "--for", "vllm", "--parallel-size", 2, "--model", moved)
    assert code == 0 and "asked for: a sparsity of 0.6; kept for vLLM 0.33: 4 experts in a layer, since" in shown
    assert PruningPlan.load(tmp_path / "p.json").config["target"] == "vllm"


def test_served_says_why() -> None:
    config = tiny_config("gpt_oss")
    config.architectures = ["GptOssForCausalLM"]
    served = Served(get_target("vllm"), architecture_of(config), config, 4)
    assert served.multiple == 4 and served.refusal({0: 8, 1: 8}) is None
    assert served.refusal({0: 6, 1: 6}) == (
        "vLLM 0.33 spreads experts of this model evenly only (gpt_oss.py, line 1322)"
    )
