# SPDX-License-Identifier: Apache-2.0
"""The commands as a person gives them: what they print, what they write, how they end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_equal_states, load, make_model, make_texts, make_tokenizer, save_checkpoint
from oracles import call
from safetensors import safe_open
from transformers import LlamaConfig

from optimum_moe_prune import (
    CalibrationStats,
    MoEPruner,
    MoEPrunerConfig,
    PruningPlan,
    list_architectures,
    list_methods,
)
from optimum_moe_prune.commands.base import as_flags
from optimum_moe_prune.evaluation.comparison import Comparison
from optimum_moe_prune.methods import get_method


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny bfloat16 Mixtral and calibration texts."""
    place = tmp_path_factory.mktemp("place")
    save_checkpoint("mixtral", place / "model", make_tokenizer())
    (place / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in make_texts(10)))
    return place


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def test_run_equals_score_plan_apply(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, texts = place / "model", place / "texts.jsonl"
    budget = ("--method", "mosaic", "--num-experts", 4, "--option", "num_domains=4", "--seed", 3)
    code, out, err = call(capsys, "run", "--model", model, "--calibration", texts, *budget, tmp_path / "run")
    assert code == 0 and "4 experts in each layer" in err and "error" not in err
    assert out.startswith("mosaic: 12 of 24 experts retained in 3 layers (50% removed)\n  layer 0  4 of 8: ")

    code, out, _ = call(capsys, "score", "--model", model, "--calibration", texts, "--seed", 3, tmp_path / "stats")
    assert code == 0 and out.startswith("10 samples, ")
    code, out, _ = call(capsys, "plan", "--stats", tmp_path / "stats", *budget, tmp_path / "plan.json")
    assert code == 0 and str(tmp_path / "plan.json") in out
    code, out, _ = call(capsys, "apply", "--model", model, "--plan", tmp_path / "plan.json", tmp_path / "apply")
    assert code == 0

    assert PruningPlan.load(tmp_path / "plan.json").retained == PruningPlan.load(tmp_path / "run").retained
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {p.name for p in (tmp_path / "apply").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "moe_pruner_config.json",
        "moe_pruning_plan.json",
    }
    for name in ("config.json", "model.safetensors", "tokenizer.json", "moe_pruner_config.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "apply" / name).read_bytes()
    assert load(tmp_path / "run").config.num_local_experts == 4


def test_one_calibration_serves_every_method(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ("--calibration", place / "texts.jsonl")
    score = ("score", "--model", place / "model", *texts, "--method", "all", "--fisher")
    recipe = MoEPrunerConfig(method="reap", num_experts=4).save_pretrained(tmp_path)
    assert call(capsys, *score, "--config", recipe, tmp_path / "stats")[0] == 0
    for method in set(list_methods()) - {"auto"}:
        code, out, _ = call(
            capsys,
            "plan",
            "--stats",
            tmp_path / "stats",
            "--method",
            method,
            "--sparsity",
            0.25,
            "--json",
            tmp_path / f"{method}.json",
        )
        told = json.loads(out)
        assert code == 0 and told["method"] == method and told["sparsity"] == 0.25
        assert sum(told["num_experts"].values()) == 18
        if get_method(method).allocations[0] == "uniform":
            assert told["num_experts"] == {"0": 6, "1": 6, "2": 6}


def test_score_gathers_what_one_method_needs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = ("score", "--model", place / "model", "--calibration", place / "texts.jsonl")
    code, out, _ = call(capsys, *score, "--method", "frequency", "--json", tmp_path / "stats")
    assert code == 0 and json.loads(out)["needs"] == ["routing"]
    assert {str(n) for n in CalibrationStats.load(tmp_path / "stats").needs} == {"routing"}
    plan = ("plan", "--stats", tmp_path / "stats", "--num-experts", 4, "--method", "mosaic", tmp_path / "plan.json")
    code, _, err = call(capsys, *plan)
    assert code == 2 and "error: method 'mosaic' needs the statistics" in err and "score --method all" in err
    code, _, err = call(capsys, *score, "--method", "random", tmp_path / "other")
    assert code == 2 and "needs no calibration" in err


def test_the_calibrations_precision_is_not_what_is_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = (
        "run",
        "--model",
        place / "model",
        "--calibration",
        place / "texts.jsonl",
        "--method",
        "reap",
        "--num-experts",
        4,
    )
    assert call(capsys, *run, "--dtype", "float32", tmp_path / "out")[0] == 0
    written, source = tensors(tmp_path / "out"), tensors(place / "model")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    assert torch.equal(written["model.embed_tokens.weight"], source["model.embed_tokens.weight"])
    assert PruningPlan.load(tmp_path / "out").provenance["calibration"]["dtype"] == "float32"


def test_unequal_layers_from_run_to_evaluate(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", "--model", place / "model", "--calibration", place / "texts.jsonl", "--method", "pathfinder")
    budget = ("--sparsity", 0.25, "--option", "tau=0.2", "--sample-selection", "kmeans", "--num-clusters", 3)
    code, out, err = call(capsys, *run, *budget, "--standalone", tmp_path / "run")
    assert code == 0 and err.startswith("model") and "25.0% removed)" in err
    assert out.startswith("pathfinder: 18 of 24 experts retained in 3 layers (25% removed)\n  layer 0  ")
    assert "import optimum_moe_prune before loading it, or pass trust_remote_code=True." in out
    plan = PruningPlan.load(tmp_path / "run")
    assert len(set(plan.num_experts.values())) > 1 and plan.provenance["calibration"]["samples"] == 6
    assert (tmp_path / "run" / "modeling_unequal_moe.py").is_file() and (tmp_path / "run" / "README.md").is_file()
    # The same plan, edited by hand and applied.
    values = json.loads((tmp_path / "run" / "moe_pruning_plan.json").read_text())
    widest = max(values["layers"].values(), key=lambda layer: layer["num_experts"])
    widest["retained"].pop()
    widest["num_experts"] -= 1
    (tmp_path / "edited.json").write_text(json.dumps(values))
    apply = ("apply", "--model", place / "model", "--plan", tmp_path / "edited.json")
    code, out, _ = call(capsys, *apply, tmp_path / "applied")
    assert code == 0 and "17 of 24" in out and "before loading it." in out
    data = ("--reference", place / "model", "--data", place / "texts.jsonl", "--json")
    code, out, _ = call(capsys, "evaluate", "--model", tmp_path / "applied", *data)
    assert code == 0 and json.loads(out)["models"]["applied"]["domains"]["all"]["kl_divergence"] > 0
    # A checkpoint whose config was edited too.
    values = json.loads((tmp_path / "applied" / "config.json").read_text())
    layer, entry = next(iter(values["per_layer_config"].items()))
    entry["num_local_experts"] -= 1
    (tmp_path / "applied" / "config.json").write_text(json.dumps(values))
    code, out, err = call(capsys, "evaluate", "--model", tmp_path / "applied", *data)
    assert (code, out) == (1, "") and f"layer {layer}: config.json says {entry['num_local_experts']} experts" in err


def test_the_same_number_everywhere_says_that_nothing_is_needed(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("run", "--model", place / "model", "--method", "random", "--num-experts", 4, "--standalone")
    code, out, _ = call(capsys, *run, tmp_path / "out")
    assert code == 0 and "plain transformers loads it, --standalone adds nothing" in out


def test_recipes_flags_and_their_precedence(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ("run", "--model", place / "model", "--calibration", place / "texts.jsonl")
    flags = (
        "--method",
        "frequency",
        "--sparsity",
        0.5,
        "--protect",
        "0:6,7",
        "--domain-weight",
        "low=2",
        "--domain-weight",
        "high=1",
    )
    assert call(capsys, *run, *flags, "--num-samples", 6, tmp_path / "a")[0] == 0
    plan = PruningPlan.load(tmp_path / "a")
    assert {6, 7} <= set(plan.retained[0])
    assert plan.provenance["calibration"]["samples"] == 6
    assert plan.provenance["calibration"]["domain_weights"] == {"low": 2, "high": 1}
    recipe = tmp_path / "a" / "moe_pruner_config.json"
    assert call(capsys, *run, "--config", recipe, "--num-experts", 3, tmp_path / "b")[0] == 0
    plan = PruningPlan.load(tmp_path / "b")
    assert plan.method == "frequency" and plan.num_experts[0] == 3 and {6, 7} <= set(plan.retained[0])


def test_evaluate_prints_domains(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("--data", place / "texts.jsonl")
    call(capsys, "run", "--model", place / "model", "--method", "random", "--num-experts", 4, tmp_path / "out")
    code, out, _ = call(capsys, "evaluate", "--model", tmp_path / "out", "--reference", place / "model", *data)
    assert code == 0
    first, second, words, verdict = out.split("\n\n")
    assert words.startswith("Perplexity: among how many") and "nats per token: 0.1 is 11% more" in words
    assert verdict.startswith("Perplexity ") and "(x " in verdict and "held-out" not in verdict
    assert [line.split()[0] for line in first.splitlines()] == ["domain", "high", "low", "all"]
    assert [line.split()[0] for line in second.splitlines()] == ["model", "out", "model"]
    code, out, _ = call(capsys, "evaluate", "--model", place / "model", *data, "--json")
    assert code == 0 and json.loads(out)["models"]["model"]["domains"]["all"]["perplexity"] > 1


def test_the_flags_of_tasks_are_arguments(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from optimum_moe_prune import Source
    from optimum_moe_prune.evaluation import compare as compare_models

    asked: list[Any] = []
    monkeypatch.setattr(compare_models, "compare", lambda *args, **how: asked.append((args, how)) or Comparison({}))
    run = ("evaluate", "--model", "me/a", "--revision", "v1", "--reference", "me/b", "--tasks", "x,y", "--tasks", "z")
    flags = ("--task-limit", 5, "--num-fewshot", 2, "--allow-code", "--task-include", place, "--gen-kwargs", "top_p=1")
    chat = ("--apply-chat-template", "--system-instruction", "Be brief.", "--no-fewshot-as-multiturn")
    assert call(capsys, *run)[0] == call(capsys, *run, *flags, *chat, "--speed", "--new-tokens", 3)[0] == 0
    assert call(capsys, *run, "--apply-chat-template", "tool_use")[0] == 0
    args, how = asked[1]
    assert args == ([Source("me/a", revision="v1")], None) and how["reference"] == Source("me/b")
    expected = {"tasks": ["x", "y", "z"], "limit": 5, "num_fewshot": 2, "allow_code": True, "include": [str(place)]}
    expected |= {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": False}
    expected |= {"gen_kwargs": "top_p=1", "speed": True, "new_tokens": 3, "batch_size": 8, "max_length": 2048}
    assert expected.items() <= how.items()
    assert asked[0][1]["apply_chat_template"] is False and asked[0][1]["fewshot_as_multiturn"] is True
    assert asked[2][1]["apply_chat_template"] == "tool_use"


def test_several_models_their_card_and_their_files(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("--data", place / "texts.jsonl")
    for name, seed in (("a", 0), ("b", 1)):
        random = ("--method", "random", "--num-experts", 4, "--seed", seed)
        call(capsys, "run", "--model", place / "model", *random, tmp_path / name)
    both = ("evaluate", "--model", tmp_path / "a", "--model", tmp_path / "b", "--reference", place / "model", *data)
    code, out, err = call(capsys, *both, "--markdown", "--output", tmp_path / "results.json")
    assert code == 0, err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.split("\n\n")[0].splitlines()]
    assert rows[0] == ["lost (nats)", "a", "b"] and "**" in out, "models are columns, domains rows, the best bold"
    assert [row[0] for row in rows[2:5]] == ["high", "low", "mean"]
    found = Comparison.load(tmp_path / "results.json")
    assert list(found.models) == ["a", "b", "model"] and found.reference == "model"
    alone = json.loads(call(capsys, *both[:3], *both[5:], "--json")[1])
    assert alone["models"]["a"] == json.loads((tmp_path / "results.json").read_text())["models"]["a"]
    code, out, err = call(capsys, *both[:3], *both[5:], "--speed", "--new-tokens", 4, "--update-card", "--json")
    assert code == 0, err
    speed = json.loads(out)["models"]["a"]["generation"]
    assert speed["rounds"] == 5 and speed["speedup"] > 0 and speed["hardware"]
    assert speed["new_tokens"] == 4 and speed["tokens_per_second"] > 0 and speed["peak_memory_bytes"] > 10**7
    assert (tmp_path / "a" / "moe_evaluation.json").is_file()
    card = (tmp_path / "a" / "README.md").read_text()
    assert "## Results against the original" in card and "Measured with: text texts.jsonl" in card
    tokens = ("--model", tmp_path / "a", "--reference", place / "model", "--speed", "--new-tokens", 2, "--update-card")
    assert call(capsys, "evaluate", *tokens)[0] == 0
    assert "| low |" in (tmp_path / "a" / "README.md").read_text(), "earlier results stay"
    shutil.copytree(tmp_path / "b", tmp_path / "other" / "a")
    named = call(capsys, "evaluate", *tokens[:2], "--model", tmp_path / "other" / "a", *data, "--json")[1]
    assert list(json.loads(named)["models"]) == ["a", "a (2)"]
    for arguments, message in (
        (both[:3], "there is nothing to evaluate on"),
        ((*both[:3], "--reference", tmp_path / "a", *data), "is named twice"),
        ((*both, "--batch-size", "0"), "--batch-size is 0"),
        ((*both, "--update-card"), "--update-card takes one pruned model"),
        ((*both, "--json", "--markdown"), "exclude each other"),
        ((*both, "--output", tmp_path / "results.json"), "results.json exists"),
        ((*both, "--output", tmp_path / "a"), "must end in .json"),
        ((*both, "--revision", "main"), "--revision is for one model"),
        (("evaluate", "--model", place / "model", *data, "--update-card"), "is no folder of a checkpoint"),
    ):
        code, out, err = call(capsys, *arguments)
        assert code == 2 and message in err, (arguments, err)


def test_one_command_with_results_and_report(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip("matplotlib")
    texts = place / "texts.jsonl"
    run = ("run", "--model", place / "model", "--calibration", texts, "--method", "mosaic", "--num-experts", 5)
    code, out, err = call(capsys, *run, "--evaluate", texts, "--report", "--json", tmp_path / "out")
    assert code == 0, err
    told = json.loads(out)
    assert set(told["evaluation"]["models"]) == {"out", "model"} and told["report"].endswith("report.html")
    said = "10 of 10 evaluation samples were calibrated on: on other text more may be lost"
    assert said in told["evaluation"]["verdict"] and caplog.text.count(said) == 1, "before any work as well"
    assert told["evaluation"]["models"]["out"]["overlap"]["calibrated_on"] == 10
    assert "generation" not in told["evaluation"]["models"]["out"], "speed is measured where it is asked for"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "[report.html](report.html)" in card
    assert any((tmp_path / "out" / "report_pictures").glob("*.png"))
    # A second pruning carries none of that along.
    again = ("run", "--model", tmp_path / "out", "--method", "random", "--num-experts", 3, tmp_path / "again")
    assert call(capsys, *again)[0] == 0
    names = {path.name for path in (tmp_path / "again").iterdir()}
    assert not names & {"report.html", "report_pictures", "moe_evaluation.json"}
    code, _, err = call(capsys, *run, "--evaluate", tmp_path / "none.jsonl", tmp_path / "c")
    assert code == 2 and "none.jsonl" in err and not (tmp_path / "c").exists()
    code, _, err = call(capsys, *run, "--private", tmp_path / "c")
    assert code == 2 and "--private is for --push-to-hub" in err
    code, _, err = call(capsys, *run, "--push-to-hub", "a/b/c", tmp_path / "c")
    assert code == 2 and "--push-to-hub" in err and not (tmp_path / "c").exists()
    monkeypatch.setattr("optimum_moe_prune.models.memory.available_memory", lambda device: 10**4)
    code, _, err = call(capsys, *run, "--evaluate", texts, tmp_path / "c")
    assert code == 2 and "--evaluate holds the original and the pruned model in memory, up to" in err
    page = tmp_path / "page.html"
    code, out, err = call(capsys, "report", "--plan", tmp_path / "out", "--plan", tmp_path / "again", page)
    assert code == 0 and page.is_file() and any((tmp_path / "page_pictures").iterdir()), err
    assert call(capsys, "report", tmp_path / "nothing.html")[0] == 2


def test_a_plan_for_other_programs(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = ("--method", "random", "--num-experts", 4)
    call(capsys, "run", "--model", place / "model", *random, tmp_path / "out")
    code, _, err = call(capsys, "export", "--plan", tmp_path / "out", "--format", "json", tmp_path / "experts.json")
    assert code == 0, err
    plan = PruningPlan.load(tmp_path / "out")
    assert (tmp_path / "experts.json").read_text() == plan.export("json")
    assert json.loads(plan.export())["layers"]["0"]["retained"] == list(plan.retained[0])
    code, _, err = call(capsys, "export", "--plan", tmp_path / "out", tmp_path / "experts.json")
    assert code == 2 and "exists" in err


def test_list_names_methods_and_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "list", "methods")
    assert code == 0 and all(f"\n{name} " in f"\n{out}" for name in list_methods())
    assert "arXiv 2511.19822" in out and "allocation: global, uniform" in out
    code, out, _ = call(capsys, "list", "models", "--json")
    found = json.loads(out)
    assert found["models"] == list_architectures() == list(found["support"])
    assert found["support"]["gemma4_text"]["unequal"] is False and "attention" in found["refused"]["jetmoe"]
    code, out, _ = call(capsys, "list", "models")
    assert all(f"\n{name} " in f"\n{out}" for name in list_architectures()) and "\njetmoe: " in out


RUN = ("run", "--model", "{model}", "--calibration", "{texts}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*RUN, "--num-experts", "0", "{out}"), "--num-experts is 0"),
        (
            (*RUN, "--method", "mosaic", "--num-experts", "1", "{out}"),
            "--num-experts 1 leaves layer 0 with 1 experts, and every token uses 2",
        ),
        ((*RUN, "--num-experts", "8", "{out}"), "nothing to prune"),
        ((*RUN, "--method", "mosaic", "--num-experts", "9", "{out}"), "asks for more experts than layer 0 has (8)"),
        (
            (*RUN, "--method", "mosaic", "--num-experts", "5", "--count-multiple-of", "2", "{out}"),
            "leaves layer 0 with 5 experts, and --count-multiple-of is 2. Ask for 4 or 6",
        ),
        (
            (*RUN, "--method", "pathfinder", "--total-experts", "13", "--count-multiple-of", "4", "{out}"),
            "--count-multiple-of is 4: what layers keep adds up to 12 or 16. Ask for 12 or 16",
        ),
        ((*RUN, "--num-experts", "4", "--sparsity", "0.5", "{out}"), "given: --num-experts and --sparsity"),
        ((*RUN, "{out}"), "given: none"),
        ((*RUN, "--sparsity", "1.5", "{out}"), "sparsity is 1.5"),
        ((*RUN, "--method", "mosaic", "--sparsity", "0.01", "{out}"), "removes 0 of 8 experts"),
        ((*RUN, "--num-experts", "4", "--method", "mosiac", "{out}"), "method 'mosiac' is not known. Known: mosaic,"),
        (
            (*RUN, "--method", "mosaic", "--num-experts", "4", "--option", "num_domain=2", "{out}"),
            "has no option 'num_domain'. Its options: num_domains,",
        ),
        (
            (*RUN, "--num-experts", "4", "--option", "num_domains", "{out}"),
            "--option num_domains is not of the form NAME=VALUE",
        ),
        (
            (*RUN, "--num-experts", "4", "--protect", "0-1", "{out}"),
            "--protect 0-1 is not of the form LAYER:EXPERT,EXPERT",
        ),
        (
            (*RUN, "--num-experts", "4", "--protect", "0:x", "{out}"),
            "an expert in --protect must be a whole number, and is 'x'",
        ),
        (
            (*RUN, "--method", "pathfinder", "--sparsity", "0.8", "{out}"),
            "keeps 5 of the 24 experts in 3 layers, and each layer keeps at least the 2",
        ),
        ((*RUN, "--method", "pathfinder", "--num-experts", "8", "{out}"), "nothing to prune. Ask for 2 to 7"),
        (
            (*RUN, "--method", "pathfinder", "--sparsity", "0.5", "--option", "num_paths=0", "{out}"),
            "num_paths is 0; there must be at least 1",
        ),
        (
            (*RUN, "--sparsity", "0.5", "--sample-selection", "kmeans", "--num-clusters", "0", "{out}"),
            "--num-clusters is 0",
        ),
        (
            (*RUN, "--sparsity", "0.5", "--sample-selection", "kmeans", "--num-clusters", "6", "{out}"),
            "--num-clusters is 6, and domain 'high' has 5 samples",
        ),
        (
            (*RUN, "--sparsity", "0.5", "--sample-selection", "kmeans", "--num-clusters", "few", "{out}"),
            "--num-clusters (or auto) must be a whole number, and is 'few'",
        ),
        ((*RUN, "--sparsity", "0.5", "--allocation", "global", "{out}"), "allocation 'global' is not for method 'au"),
        ((*RUN, "--num-experts", "4", "--allocation", "x", "{out}"), "allocation 'x' is not known"),
        ((*RUN, "--num-experts", "4", "--device", "warp", "{out}"), "--device warp cannot be used"),
        ((*RUN, "--num-experts", "4", "{full}"), "exists and is not empty"),
        ((*RUN, "--num-experts", "4", "{texts}"), "is a file"),
        (("run", "--model", "{model}", "--num-experts", "4", "{out}"), "a calibration is needed"),
        (
            ("run", "--model", "{model}", "--calibration", "{place}/empty.jsonl", "--num-experts", "4", "{out}"),
            "empty.jsonl is empty",
        ),
        (
            ("run", "--model", "{model}", "--calibration", "{place}/bad.jsonl", "--num-experts", "4", "{out}"),
            "bad.jsonl, line 2 is not JSON",
        ),
        (
            ("run", "--model", "{model}", "--calibration", "{place}/short.jsonl", "--num-experts", "4", "{out}"),
            "short.jsonl, line 1 is blank.",
        ),
        (
            ("run", "--model", "{model}", "--calibration", "{model}/model.safetensors", "--num-experts", "4", "{out}"),
            "is not a text file",
        ),
        (
            ("run", "--model", "{place}", "--calibration", "{texts}", "--num-experts", "4", "{out}"),
            "is not a model's folder",
        ),
        (
            ("run", "--model", "{place}/dense", "--calibration", "{texts}", "--num-experts", "4", "{out}"),
            "has no experts",
        ),
        (
            ("run", "--model", "{place}/words", "--calibration", "{texts}", "--num-experts", "4", "{out}"),
            "outside the model's vocabulary of 40",
        ),
        (
            ("score", "--model", "{model}", "--calibration", "{texts}", "--method", "x", "{out}"),
            "method 'x' is not known",
        ),
        (("score", "--model", "{model}", "--calibration", "{texts}", "{full}"), "exists and is not empty"),
        (("plan", "--stats", "{place}", "--num-experts", "4", "{out}.json"), "holds no calibration statistics"),
        (("plan", "--stats", "{place}", "--num-experts", "4", "{out}"), "must end in .json"),
        (("apply", "--model", "{model}", "--plan", "{place}/none.json", "{out}"), "none.json does not exist"),
        (
            ("apply", "--model", "{model}", "--plan", "{place}/other.json", "{out}"),
            "this plan was made for a model with other router weights",
        ),
        (
            ("apply", "--model", "{place}/qwen", "--plan", "{place}/other.json", "{out}"),
            "this plan is for a 'mixtral' model, and the model is 'qwen2_moe'",
        ),
        (("evaluate", "--model", "{model}", "--data", "{place}/bad.jsonl"), "bad.jsonl, line 2 is not JSON"),
        (("evaluate", "--model", "{model}", "--data", "{texts}", "--batch-size", "-1"), "--batch-size is -1"),
        (
            (*RUN, "--num-experts", "4", "--skip-layers", "9", "{out}"),
            "--skip-layers names layer 9, which has no experts",
        ),
        ((*RUN, "--num-experts", "4", "--protect", "0:77", "{out}"), "protect names expert 77 of layer 0"),
        (
            (*RUN, "--method", "mosaic", "--num-experts", "4", "--option", "num_generalists=5", "{out}"),
            "num_generalists is 5, and the budget",
        ),
        ((*RUN, "--num-experts", "4", "--domain-weight", "x=1", "{out}"), "a positive number for each domain"),
        ((*RUN, "--num-experts", "4", "--config", "{place}/none.json", "{out}"), "none.json"),
        ((*RUN, "--num-experts", "4", "--seed", "99999999999", "{out}"), "seed is 99999999999"),
    ],
)
def test_wrong_requests_end_with_2_and_write_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    if not (place / "dense").exists():
        (place / "empty.jsonl").write_text("")
        (place / "bad.jsonl").write_text('{"text": "w1 w2"}\n{"text": \n')
        (place / "short.jsonl").write_text('{"text": ""}\n')
        LlamaConfig().save_pretrained(place / "dense")
        make_model(vocab_size=40).save_pretrained(place / "words")
        make_tokenizer().save_pretrained(place / "words")
        save_checkpoint("qwen2_moe", place / "qwen", make_tokenizer())
        save_checkpoint("mixtral", place / "scratch", make_tokenizer())
        make_model(seed=5).to(torch.bfloat16).save_pretrained(place / "scratch")
        call(capsys, "run", "--model", place / "scratch", "--method", "random", "--num-experts", 4, place / "made")
        shutil.copy(place / "made" / "moe_pruning_plan.json", place / "other.json")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    names = {
        "model": place / "model",
        "texts": place / "texts.jsonl",
        "place": place,
        "out": tmp_path / "out",
        "full": full,
    }
    code, out, err = call(capsys, *(a.format(**names) for a in arguments))
    assert code == 2, err
    assert out == "" and err.startswith("error: ") and message in err and "Traceback" not in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_what_only_the_run_finds_ends_with_1(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load(place / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 0, 0] = float("inf")
    model.save_pretrained(tmp_path / "nan")
    make_tokenizer().save_pretrained(tmp_path / "nan")
    run = (
        "run",
        "--model",
        tmp_path / "nan",
        "--calibration",
        place / "texts.jsonl",
        "--num-experts",
        4,
        tmp_path / "out",
    )
    code, out, err = call(capsys, *run)
    assert (code, out) == (
        1,
        "",
    ) and "model.safetensors: model.layers.1.block_sparse_moe.experts.3.w2.weight holds NaN or infinite weights" in err
    assert not (tmp_path / "out").exists()
    code, out, err = call(capsys, *run, "--debug")
    assert (code, out) == (1, "") and "Traceback" in err


def test_a_plan_from_another_precision_applies(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_model().save_pretrained(tmp_path / "model")  # float32, whose router weights bfloat16 rounds
    make_tokenizer().save_pretrained(tmp_path / "model")
    score = ("score", "--model", tmp_path / "model", "--calibration", place / "texts.jsonl", "--dtype", "bfloat16")
    assert call(capsys, *score, tmp_path / "stats")[0] == 0
    plan = ("plan", "--stats", tmp_path / "stats", "--method", "reap", "--num-experts", 4, tmp_path / "plan.json")
    assert call(capsys, *plan)[0] == 0
    assert (
        call(capsys, "apply", "--model", tmp_path / "model", "--plan", tmp_path / "plan.json", tmp_path / "out")[0]
        == 0
    )


def test_counts_of_a_multiple(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """From a flag or a saved recipe; where none is asked for, an odd number is noted, once."""
    model, texts, stats = place / "model", place / "texts.jsonl", tmp_path / "stats"
    call(capsys, "score", "--model", model, "--calibration", texts, stats)
    recipe = MoEPrunerConfig(method="pathfinder", sparsity=0.5, count_multiple_of=4).save_pretrained(tmp_path)
    budget = ("--method", "pathfinder", "--sparsity", 0.5)
    for number, how in enumerate([(*budget, "--count-multiple-of", 4), ("--config", recipe)]):
        code, _, _ = call(capsys, "plan", "--stats", stats, *how, tmp_path / f"{number}.json")
        plan = PruningPlan.load(tmp_path / f"{number}.json")
        assert code == 0 and set(plan.num_experts.values()) == {4} and plan.config["count_multiple_of"] == 4
        assert "evenly" not in caplog.text
    code, _, _ = call(capsys, "plan", "--stats", stats, "--method", "reap", "--num-experts", 5, tmp_path / "o.json")
    assert code == 0 and caplog.text.count("5 experts cannot be spread evenly over 8, 4 or 2 devices") == 1


def test_score_gathers_what_options_need(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    score = ("score", "--model", place / "model", "--calibration", place / "texts.jsonl", "--json")
    how = ("--method", "variability", "--option", "num_generalists=2", "--protect-super-experts")
    code, out, _ = call(capsys, *score, *how, tmp_path / "stats")
    assert code == 0 and json.loads(out)["needs"] == ["gram", "routed_norms", "routing"]
    plan = ("plan", "--stats", tmp_path / "stats", *how, "--num-experts", 4, tmp_path / "plan.json")
    assert call(capsys, *plan)[0] == 0


def test_only_earlier_outputs_are_replaced(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "model", tmp_path / "zoo" / "model")
    (tmp_path / "zoo" / "mine.txt").write_text("keep")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    run = ("run", "--model", tmp_path / "zoo" / "model", "--method", "random", "--num-experts", 4, "--overwrite")
    for target, message in (
        (tmp_path / "zoo", "is or holds"),
        (tmp_path / "zoo" / "model", "is or holds"),
        (place, "holds something else than an output of this package"),
    ):
        code, _, err = call(capsys, *run, target)
        assert code == 2 and message in err
    assert sorted(p.name for p in tmp_path.rglob("*")) == before and (place / "texts.jsonl").exists()
    assert call(capsys, *run, tmp_path / "out")[0] == 0
    assert call(capsys, *run, "--seed", 1, tmp_path / "out")[0] == 0
    plan = ("plan", "--stats", tmp_path, "--num-experts", 4, "--overwrite", tmp_path / "zoo" / "model" / "config.json")
    code, _, err = call(capsys, *plan)
    assert code == 2 and "the plan has format version None" in err
    assert PruningPlan.load(tmp_path / "out").config["seed"] == 1


def test_apply_on_a_pruned_checkpoint_keeps_the_earlier_plan(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(capsys, "run", "--model", place / "model", "--method", "random", "--num-experts", 6, tmp_path / "six")
    score = ("score", "--model", tmp_path / "six", "--calibration", place / "texts.jsonl", "--method", "frequency")
    call(capsys, *score, tmp_path / "stats")
    budget = ("--method", "frequency", "--num-experts", 4)
    call(capsys, "plan", "--stats", tmp_path / "stats", *budget, tmp_path / "plan.json")
    code, _, err = call(
        capsys, "apply", "--model", tmp_path / "six", "--plan", tmp_path / "plan.json", tmp_path / "four"
    )
    assert code == 0, err
    parent = PruningPlan.load(tmp_path / "four").provenance["parent"]
    assert PruningPlan.from_dict(parent) == PruningPlan.load(tmp_path / "six")


def test_a_recipe_of_an_unknown_method_does_not_stop_a_plan(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    call(capsys, "run", "--model", place / "model", "--method", "random", "--num-experts", 4, tmp_path / "out")
    for name in ("moe_pruner_config.json", "moe_pruning_plan.json"):
        path = tmp_path / "out" / name
        path.write_text(path.read_text().replace('"method": "random"', '"method": "from_elsewhere"'))
    assert call(capsys, "evaluate", "--model", tmp_path / "out", "--data", place / "texts.jsonl")[0] == 0
    again = MoEPruner.from_pretrained(tmp_path / "out")
    assert "cannot be used, only its plan" in caplog.text
    again.prune(load(place / "model"))
    again.save_pretrained(tmp_path / "again")
    for name in ("moe_pruner_config.json", "moe_pruning_plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert_equal_states(load(tmp_path / "again"), load(tmp_path / "out"))


def test_optimum_cli_has_the_command_and_its_exit_codes(place: Path, tmp_path: Path) -> None:
    """Through the installed entry points, in processes of their own."""

    def ended(*command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(c) for c in command], capture_output=True, text=True)

    optimum = Path(sys.executable).with_name("optimum-cli")
    shown = ended(optimum, "moe-prune", "--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("run", "score", "plan", "apply", "evaluate", "list"))
    imported = ended(
        sys.executable,
        "-c",
        "import sys; sys.argv = ['optimum-cli', 'moe-prune', 'run', '--help']\n"
        "from optimum.commands.optimum_cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules, 'transformers' in sys.modules)",
    )
    assert "--calibration" in imported.stdout and imported.stdout.endswith("False False\n")
    run = ("run", "--model", place / "model", "--method", "random", "--num-experts", 4, "--json", tmp_path / "out")
    done = ended(optimum, "moe-prune", *run)
    # torchao, where it is installed, speaks when transformers imports it
    said = [line for line in done.stderr.splitlines() if "torchao" not in line and "_pytree" not in line]
    assert done.returncode == 0 and said == [], "quiet when nobody watches"
    assert json.loads(done.stdout)["num_experts"] == {"0": 4, "1": 4, "2": 4}
    assert ended(optimum, "moe-prune", *run).returncode == 2
    assert ended(sys.executable, "-m", "optimum_moe_prune", "list", "models").returncode == 0
    assert ended(sys.executable, "-m", "optimum_moe_prune", "run").returncode == 2


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("new_tokens is 0; it must be", "--new-tokens is 0; it must be"),
        ("gen_kwargs is 'zz'; it", "--gen-kwargs is 'zz'; it"),
        ("nothing can be lost (allow_code=True).", "nothing can be lost (--allow-code)."),
        ("replace it (overwrite=True)", "replace it (--overwrite)"),
        ("device='cuda' cannot be used", "--device cuda cannot be used"),
        ("num_generalists is 5, and the budget", "num_generalists is 5, and the budget"),  # an option of a method
    ],
)
def test_messages_speak_of_flags(message: str, said: str) -> None:
    assert as_flags(message) == said


@pytest.mark.parametrize("flag", [("--gen-kwargs", "top_p=1"), ("--apply-chat-template",), ("--task-limit", 2)])
def test_what_is_for_tasks_is_refused_without_them(
    flag: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "evaluate", "--model", tmp_path, "--data", tmp_path / "t.jsonl", *flag)
    assert code == 2 and f"{flag[0]} is for --tasks, and none are named" in err
