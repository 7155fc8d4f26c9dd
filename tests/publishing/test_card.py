# SPDX-License-Identifier: Apache-2.0
"""The model card: made of the folder's files, valid by the client's own classes, whatever people write."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import load, make_model, make_texts, make_tokenizer
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from optimum_moe_prune import CalibrationSet, MoEPruner, MoEPrunerConfig, PruningPlan, RequestError, list_methods
from optimum_moe_prune.calibration.texts import DEFAULT_DOMAIN
from optimum_moe_prune.evaluation.comparison import Comparison, ModelResult, reference_of
from optimum_moe_prune.evaluation.losses import evaluate
from optimum_moe_prune.evaluation.overlap import Overlap
from optimum_moe_prune.evaluation.speed import Generation
from optimum_moe_prune.methods import get_method
from optimum_moe_prune.publishing.card import model_card, write_card

BASE_CARD = """---
license: other
license_name: tiny
license_link: https://example.org/licence
language: [en, de]
tags: [theirs]
datasets: [some/data]
---

# The original

Do not trust it.
"""


PARTLY = Overlap(12, 3, {"low": 3})


def prune(folder: Path, output: Path, texts: list[dict[str, str]] | None = None, **settings: Any) -> MoEPruner:
    """A checkpoint in ``folder``, pruned into ``output``."""
    if not folder.exists():
        make_model().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    config = MoEPrunerConfig(**{"method": "frequency", "num_experts": 4, **settings})
    pruner = MoEPruner.from_pretrained(folder, config=config)
    pruner.prune_checkpoint(output, calibration=texts or make_texts())
    return pruner


def test_the_card_says_first_how_to_load(tmp_path: Path) -> None:
    for name in ("plain", "standalone"):
        pruner = prune(
            tmp_path / "model",
            tmp_path / name,
            method="pathfinder",
            num_experts=None,
            sparsity=0.4,
            allocation="global",
        )
        if name == "standalone":
            pruner.prune_checkpoint(tmp_path / name, overwrite=True, standalone=True)
        card = ModelCard.load(tmp_path / name / "README.md")
        first = card.text.strip().split("\n# ")[0]
        assert "pip install optimum-moe-prune" in first and "import optimum_moe_prune" in first
        assert f"from_pretrained('{name}')" in first
        assert ("trust_remote_code=True" in first) == (name == "standalone")
        assert "pathfinder" in card.text and "| 0 | " in card.text and "low" in card.text
        assert card.data.library_name == "transformers" and card.data.base_model is None
        kept = sum(pruner.pruning_plan.num_experts.values())
        assert f"{kept} of 24 routed experts are retained" in card.text


def test_numbers_are_those_of_the_models(kind: str, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    pruner = MoEPruner.from_pretrained(folder, config=MoEPrunerConfig(method="random", num_experts=5))
    pruner.prune_checkpoint(tmp_path / "out")
    text = str(model_card(tmp_path / "out", "out"))
    before = model.num_parameters()
    after = pruner.prune(model).num_parameters()
    assert f"| parameters | {before / 1e6:.3g} M | {after / 1e6:.3g} M |" in text
    assert f"| weights on disk | {2 * before / 1e6:.3g} MB | {2 * after / 1e6:.3g} MB |" in text
    experts = pruner.pruning_plan.original_num_experts[0]
    assert f"| routed experts in a layer | {experts} | 5 |" in text


def test_a_model_of_the_hub_and_its_licence(tmp_path: Path) -> None:
    pruner = prune(tmp_path / "model", tmp_path / "first")
    (tmp_path / "model" / "README.md").write_text(BASE_CARD)
    model = {**pruner.pruning_plan.made_for, "name_or_path": "someone/some-model", "revision": "0" * 40}
    plan = replace(pruner.pruning_plan, provenance={**pruner.pruning_plan.provenance, "model": model})
    MoEPruner.from_plan(plan, tmp_path / "model").prune_checkpoint(tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.text.strip().startswith("# out") and "plain transformers loads it" in card.text
    assert card.data.base_model == "someone/some-model" and card.data.base_model_relation == "finetune"
    assert "[someone/some-model](https://huggingface.co/someone/some-model)" in card.text
    assert "import optimum_moe_prune" not in card.text
    assert card.data.license == "other" and card.data.license_name == "tiny" and card.data.language == ["en", "de"]
    assert "theirs" not in card.data.tags and "datasets" not in card.data.to_dict()
    assert (tmp_path / "out" / "README.base.md").read_text() == BASE_CARD
    command = next(line for line in card.text.splitlines() if "moe-prune apply" in line)
    assert f"--model someone/some-model --revision {'0' * 40} --plan moe_pruning_plan.json" in command
    # Pruned again, the original's card is still the one that is kept.
    prune(tmp_path / "out", tmp_path / "again", num_experts=3)
    assert (tmp_path / "again" / "README.base.md").read_text() == BASE_CARD
    again = ModelCard.load(tmp_path / "again" / "README.md")
    assert "is a pruned model itself" in again.text and "had been pruned before" in again.text
    assert again.data.base_model == "someone/some-model"
    (tmp_path / "out" / "README.base.md").write_text("---\nlicense: mit\nlanguage: no\nmodel-index: 5\n---\n")
    data = model_card(tmp_path / "out", "out").data
    assert data.license == "mit" and data.language is None
    for damaged in ("---\nlicense: [\n---\n", "---\n- 1\n---\n", "\x00", "no front matter"):
        (tmp_path / "out" / "README.base.md").write_text(damaged)
        assert model_card(tmp_path / "out", "out").data.license is None


def test_results_are_shown_and_are_in_the_front_matter(tmp_path: Path) -> None:
    pruner = prune(tmp_path / "model", tmp_path / "out")
    assert "were not measured" in (tmp_path / "out" / "README.md").read_text()
    samples = CalibrationSet.build(make_texts(seed=5), make_tokenizer())
    model, original = pruner.prune(make_model()), make_model()
    found = evaluate(model, samples, reference=original)
    speed = Generation(8, 4, 0.1, 40.0, 2 * 10**9, 5, (39.0, 41.0), 1.3, (1.2, 1.4), "a processor, 1 thread")
    mine = replace(ModelResult.of(model, found), generation=speed, tasks={"arc": {"acc": 0.25, "acc_stderr": 0.01}})
    theirs = replace(
        ModelResult.of(original, reference_of(found)), generation=replace(speed, tokens_per_second=30.0, speedup=None)
    )
    comparison = Comparison({"out": mine, "model": theirs}, "model")
    comparison.save(tmp_path / "out" / "moe_evaluation.json")
    assert Comparison.load(tmp_path / "out" / "moe_evaluation.json") == comparison
    write_card(tmp_path / "out", "me/my-model")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "# my-model" in card.text and "from_pretrained('me/my-model'" in card.text
    figures = found.domains["low"]
    row = next(line for line in card.text.splitlines() if line.startswith("| low |") and "%" in line)
    assert f" {figures.perplexity:.2f} | {figures.reference_perplexity:.2f} | {figures.lost:.3f} |" in row
    assert "| arc | acc | 0.250 ± 0.010 |" in card.text and "held-out" in card.text
    speeds = "| tokens per second on a processor, 1 thread | 30 (39 to 41) | 40 (39 to 41); x 1.3 (1.2 to 1.4) |"
    assert speeds in card.text
    assert "were not measured" not in card.text
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "my-model"
    values = {(r.dataset_name, r.metric_type): r.metric_value for r in results}
    assert values["held-out text: low", "perplexity"] == pytest.approx(figures.perplexity, abs=1e-3)
    assert values["held-out text: all", "kl_divergence"] == pytest.approx(found.domains["all"].kl_divergence, abs=1e-4)
    assert values["arc", "acc"] == 0.25 and ("arc", "acc_stderr") not in values
    before = replace(comparison.models["out"], generation=Generation(8, 4, 0.1, 40.0, 2 * 10**9), overlap=PARTLY)
    Comparison({**comparison.models, "out": before}, "model").save(tmp_path / "out" / "moe_evaluation.json")
    write_card(tmp_path / "out", "me/my-model")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "tokens per second" not in card.text and "peak memory" in card.text, (
        "of an earlier version, without a spread"
    )
    assert "held-out" not in str(card)
    assert "Perplexity on text that was partly calibrated on" in card.text
    assert "3 of 12 evaluation samples were calibrated on" in card.text
    (tmp_path / "out" / "moe_evaluation.json").write_text('{"format_version": 1, "models": {"a": {}}}')
    with pytest.raises(RequestError, match="the evaluation is damaged"):
        write_card(tmp_path / "out", "out")


def test_the_commands_make_the_same_cut_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from optimum_moe_prune.commands import main

    texts = tmp_path / "a text's file.jsonl"
    texts.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))
    model = tmp_path / "model"
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    config = MoEPrunerConfig(
        method="mosaic", sparsity=0.5, method_options={"num_generalists": 2, "ward": "distances"},
        protect={0: (6, 7)}, skip_layers=(1,), num_samples=9, seed=3,
    )  # fmt: skip
    pruner = MoEPruner.from_pretrained(model, config=config)
    weights = {"low": 2.0, "high": 1.0}
    pruner.prune_checkpoint(tmp_path / "out", calibration=[texts], domain_weights=weights)
    card = (tmp_path / "out" / "README.md").read_text()
    for number, verb in enumerate(("apply", "run")):
        line = next(line for line in card.splitlines() if f"moe-prune {verb}" in line)
        words = {"ORIGINAL": str(model), "OUTPUT": str(tmp_path / f"again{number}"), texts.name: str(texts)}
        words["moe_pruning_plan.json"] = str(tmp_path / "out" / "moe_pruning_plan.json")
        with pytest.raises(SystemExit) as done:
            main([words.get(word, word) for word in shlex.split(line)[2:]])
        assert not done.value.code, capsys.readouterr().err
        again = PruningPlan.load(tmp_path / f"again{number}")
        assert again.retained == pruner.pruning_plan.retained
        assert MoEPrunerConfig.from_dict(again.config) == config


def test_a_card_that_was_edited_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    prune(tmp_path / "model", tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    before = card.read_text()
    write_card(tmp_path / "out", "another-name")
    assert "# another-name" in card.read_text() and before != card.read_text()
    edited = card.read_text().replace("# another-name", "# My model")
    card.write_text(edited)
    write_card(tmp_path / "out", "a-third-name")
    assert card.read_text() == edited and "was edited and is kept" in caplog.text
    assert "# a-third-name" in (tmp_path / "out" / "README.new.md").read_text()


def test_every_method_is_explained() -> None:
    for name in list_methods():
        assert len(get_method(name).formula.split()) >= 6 and get_method(name).formula.endswith(".")


def test_the_card_survives_what_people_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [{"text": "w1 w2 w3", "domain": "two\n# lines | `a` <b>"}, {"text": "w4 w5"}]
    pruner = prune(tmp_path / "model", tmp_path / "out", texts)
    card = str(model_card(tmp_path / "out", "x"))
    assert "two # lines \\| \\`a\\` &lt;b>" in card and "\n# lines" not in card and DEFAULT_DOMAIN in card
    plan = pruner.pruning_plan
    for calibration in (
        "my text", {"samples": 3}, {"tokens_by_domain": 5}, None,
        {"tokens_by_domain": {"a": None}, "sources": [1, "`"], "versions": {"x": "<y>"}, "domain_weights": {"a": "b"}},
    ):  # fmt: skip
        strange = replace(plan, provenance={"calibration": calibration}, method="of another package")
        strange = replace(strange, config={"method_options": 3, "protect": "x", "skip_layers": None, "seed": {}})
        strange.save(tmp_path / "out")
        assert "`of another package`." in str(model_card(tmp_path / "out", "x"))
    model = make_model()
    pruner = MoEPruner(MoEPrunerConfig(method="frequency", num_experts=4), tokenizer=make_tokenizer())
    pruner.prune(model, calibration=make_texts())
    monkeypatch.chdir(tmp_path)
    pruner.save_pretrained("here")
    assert "\n# here\n" in (tmp_path / "here" / "README.md").read_text()
    with pytest.raises(RequestError, match="does not exist"):
        model_card(tmp_path / "model", "x")
