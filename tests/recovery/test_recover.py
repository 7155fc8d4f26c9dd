# SPDX-License-Identifier: Apache-2.0
"""Recovery as a part of pruning: in memory and from files alike, never worse, and remembered by the plan."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_equal_states, load, make_model, make_texts, make_tokenizer, save_checkpoint
from oracles import call
from safetensors.torch import load_file
from torch import Tensor

from optimum_moe_prune import CalibrationSet, MoEPruner, MoEPrunerConfig, PruningPlan, RequestError, RunError, recover
from optimum_moe_prune.calibration.calibrate import no_calibration
from optimum_moe_prune.planning.sensitivity import ALL
from optimum_moe_prune.publishing.again import recover_command, run_command
from optimum_moe_prune.recovery import recover as recovering
from optimum_moe_prune.recovery.refit import Refit
from optimum_moe_prune.recovery.steps import DistilOptions
from optimum_moe_prune.recovery.verdict import Verdict, recovery_of, sentence_of, table_of
from optimum_moe_prune.storage.values import Json

TEXTS = make_texts(80, length=(12, 24))
REFIT = MoEPrunerConfig(method="reap", num_experts=4, recover="refit")
DOWN = "down_proj"


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distillations of a few steps."""
    monkeypatch.setattr(recovering, "DistilOptions", partial(DistilOptions, steps=8, check_every=4))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny float32 Mixtral and calibration texts."""
    place = tmp_path_factory.mktemp("recovered")
    save_checkpoint("mixtral", place / "model", make_tokenizer(), torch.float32)
    (place / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in TEXTS))
    return place


def files(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_files_and_memory_alike_and_nothing_else_changes(place: Path, tmp_path: Path) -> None:
    pruner = MoEPruner.from_pretrained(place / "model", REFIT)
    pruner.prune_checkpoint(tmp_path / "out", calibration=TEXTS, stream=True)
    plan = PruningPlan.load(tmp_path / "out")
    assert pruner.pruning_plan is not None and pruner.pruning_plan.to_dict() == plan.to_dict()
    recovery = recovery_of(plan)
    assert recovery is not None and recovery["accepted"] and recovery["steps"] == ["refit"]
    assert recovery["kl_after"][ALL] < recovery["kl_before"][ALL]
    assert recovery["samples"] == {"fit": 64, "held_back": 16}
    plan.apply_to_checkpoint(place / "model", tmp_path / "cut")
    recovered, cut = files(tmp_path / "out"), files(tmp_path / "cut")
    changed = {name for name in cut if not torch.equal(cut[name], recovered[name])}
    assert changed and all(".w2." in name or DOWN in name for name in changed), changed

    other = MoEPruner.from_pretrained(place / "model", REFIT)
    model = other.prune(load(place / "model"), TEXTS)
    loaded = load(tmp_path / "out")
    for (name, mine), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4), name
        assert DOWN in name or torch.equal(mine, theirs), name
    assert other.pruning_plan is not None
    found = recovery_of(other.pruning_plan)
    assert found is not None and found["kl_after"][ALL] == pytest.approx(recovery["kl_after"][ALL], rel=1e-4)
    other.save_pretrained(tmp_path / "saved")
    assert_equal_states(load(tmp_path / "saved"), model)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## What the cut cost, and what recovery gave back" in card and "nothing was trained" not in card
    assert "gives the cut without the recovery" in card
    assert sentence_of(recovery) in card.replace("\\", "")


def test_a_plan_alone_gives_the_cut(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MoEPruner.from_pretrained(place / "model", REFIT).prune_checkpoint(tmp_path / "out", calibration=TEXTS)
    again = MoEPruner.from_pretrained(tmp_path / "out")
    with caplog.at_level(logging.WARNING):
        model = again.prune(load(place / "model"))
    assert "the plan's cut alone is repeated" in caplog.text
    expected = PruningPlan.load(tmp_path / "out").apply(load(place / "model"))
    assert_equal_states(model, expected)
    again.save_pretrained(tmp_path / "cut")  # and nobody says that it was recovered
    assert recovery_of(PruningPlan.load(tmp_path / "cut")) is None
    assert "nothing was trained afterwards" in (tmp_path / "cut" / "README.md").read_text()


@pytest.mark.parametrize("worse", ["all", "low"])
def test_what_is_no_better_is_not_kept(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worse: str
) -> None:
    """In all, or in one domain by more than a twentieth."""
    real: Callable[..., Refit] = recovering.refit

    def spoiled(runner: object, split: recovering.Split, *args: object, **settings: object) -> Refit:
        found = real(runner, split, *args, **settings)
        before, after = found.divergences.clone()
        for row, sample in enumerate(split.held_back.samples):
            after[row] = before[row] * (1.06 if worse in ("all", sample.domain) else 0.5)
        return replace(found, divergences=torch.stack([before, after]))

    monkeypatch.setattr(recovering, "refit", spoiled)
    pruner = MoEPruner.from_pretrained(place / "model", REFIT)
    pruner.prune_checkpoint(tmp_path / "out", calibration=TEXTS)
    plan = PruningPlan.load(tmp_path / "out")
    recovery = recovery_of(plan)
    assert recovery is not None and not recovery["accepted"]
    assert recovery["kl_after"] == recovery["kl_before"]
    assert any(note.startswith("recovery changed nothing: refit: ") for note in plan.notes)
    plan.apply_to_checkpoint(place / "model", tmp_path / "cut")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "cut" / "model.safetensors"
    ).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "is not kept" in card and "nothing was trained afterwards" in card


def test_both_steps_in_memory(place: Path) -> None:
    recipe = MoEPrunerConfig(method="reap", num_experts=4, recover="refit,distil", recover_what="router,norms")
    pruner = MoEPruner.from_pretrained(place / "model", recipe)
    pruner.prune(load(place / "model"), TEXTS)
    assert pruner.pruning_plan is not None
    recovery = recovery_of(pruner.pruning_plan)
    assert recovery is not None and recovery["steps"] == ["refit", "distil"]
    assert recovery["distil"]["kl_before"][ALL] == pytest.approx(recovery["refit"]["kl_after"][ALL], rel=2e-3)
    assert recovery["kl_after"][ALL] < recovery["refit"]["kl_after"][ALL] < recovery["kl_before"][ALL]
    assert recovery["distil"]["numbers"].keys() == {"router", "norms"}
    low, high = recovery["left_interval"]
    assert low < recovery["kl_after"][ALL] / recovery["kl_before"][ALL] < high


def test_files_recovered_by_both_steps_load_as_what_was_judged(place: Path, tmp_path: Path) -> None:
    recipe = MoEPrunerConfig(method="random", num_experts=4, recover="distil", recovery_samples=40)
    pruner = MoEPruner.from_pretrained(place / "model", recipe)
    pruner.prune_checkpoint(tmp_path / "out", calibration=TEXTS)
    plan = PruningPlan.load(tmp_path / "out")
    recovery = recovery_of(plan)
    assert recovery is not None and recovery["accepted"]
    assert sum(recovery["samples"].values()) == 40
    samples = CalibrationSet.for_recipe(TEXTS, recipe, make_tokenizer(), load(place / "model").config, recovers=True)
    held_back = recovering.split_samples(samples).held_back
    original, pruned = load(place / "model"), load(tmp_path / "out")
    total = 0.0
    with torch.no_grad():
        for ids in held_back.token_ids:
            p, q = (model(ids[None]).logits[0, :-1].log_softmax(-1) for model in (original, pruned))
            total += float((p.exp() * (p - q)).sum())
    tokens = held_back.num_tokens - len(held_back)
    assert recovery["kl_after"][ALL] == pytest.approx(total / tokens, rel=1e-3)


def test_the_commands(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, texts = place / "model", place / "texts.jsonl"
    run = ("--model", model, "--calibration", texts, "--method", "reap", "--num-experts", 4)
    code, out, err = call(capsys, "run", *run, "--recover", "refit", "--dry-run", tmp_path / "none")
    assert code == 0 and "recovers refit with 80 samples" in out and not (tmp_path / "none").exists()
    code, out, err = call(capsys, "run", *run, "--recover", "refit", tmp_path / "out")
    assert code == 0, err
    recovery = recovery_of(PruningPlan.load(tmp_path / "out"))
    assert recovery is not None
    assert sentence_of(recovery) in out
    assert all(cell in out for row in table_of(recovery) for cell in row)
    plan = ("--model", model, "--plan", tmp_path / "out" / "moe_pruning_plan.json")
    code, out, err = call(capsys, "apply", *plan, "--recover", "refit", "--calibration", texts, tmp_path / "again")
    assert code == 0, err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    code, out, err = call(capsys, "apply", *plan, tmp_path / "cut")
    assert code == 0 and not out.count("Recovery by"), out
    # The card of a cut alone has no recovery in its command, and all there is to recover by is in that of the other.
    assert "--recover" not in (tmp_path / "cut" / "README.md").read_text()
    for folder in ("out", "again"):
        assert (
            f"{' '.join(map(str, plan[2:3]))} moe_pruning_plan.json --recover refit --calibration texts.jsonl OUT"
            in ((tmp_path / folder / "README.md").read_text())
        )


def test_evaluation_text_that_will_be_recovered_with_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Though experts are chosen on a few of the samples."""
    run = ("--model", place / "model", "--calibration", place / "texts.jsonl", "--method", "reap", "--num-experts", 4)
    few = (*run, "--num-samples", 4, "--evaluate", place / "texts.jsonl", "--dry-run", tmp_path / "none")
    for more, number in (((), 4), (("--recover", "refit"), 80)):
        caplog.clear()
        code, _, err = call(capsys, "run", *few, *more)
        assert code == 0 and f"{number} of 80 evaluation samples were calibrated on" in err + caplog.text


def test_commands_that_recover_again() -> None:
    """A method that needs no text gets it for the recovery; of an edited plan nothing wrong is said."""
    config = MoEPrunerConfig(method="random", num_experts=2, recover="refit,distil", recover_what="router").to_dict()
    said: Json = {
        "kl_before": {"all": 1.0}, "kl_after": {"all": 0.5}, "samples": {"fit": 4, "held_back": 2}, "accepted": True,
        "steps": ["refit"], "asked": ["refit", "distil"], "sources": ["/home/me/more.jsonl"],
        "settings": {"recover_what": ["router", "norms"], "recovery_samples": 6, "max_length": 2048, "seed": 0},
    }  # fmt: skip
    cut = PruningPlan("mixtral", 2, "random", {0: (0, 1)}, {0: 4}, config=config)
    plan = replace(cut, provenance={"recovery": said})
    assert recover_command(cut, "M", []) == [] and "--recover" not in run_command(cut, "M", [])
    run = " ".join(run_command(plan, "M", []))
    assert "--calibration more.jsonl" in run and "--recover refit,distil --recover-what router" in run
    for sources, is_alike in ((["more.jsonl"], False), (said["sources"], True)):
        chosen = replace(plan, provenance={**plan.provenance, "calibration": {"sources": sources}})
        assert ("--recover" in run_command(chosen, "M", [])) == is_alike
    apply = " ".join(recover_command(plan, "M", ["--revision", "R"]))
    assert apply == (
        "optimum-cli moe-prune apply --model M --revision R --plan moe_pruning_plan.json --recover refit,distil "
        "--recover-what router,norms --recovery-samples 6 --calibration more.jsonl OUTPUT"
    )
    reading = {"text_column": "body", "template_args": {"a": 1}, "skip_bad": True}  # of which apply takes none over
    read = replace(plan, config={**plan.config, **reading})
    assert "--text-column body --template-arg a=1 --skip-bad --calib" in " ".join(recover_command(read, "M", []))
    for change in ({"asked": ["<b>"]}, {"settings": {"recover_what": 3}}):
        assert recover_command(replace(plan, provenance={"recovery": {**said, **change}}), "M", []) == []
    for change in ({"asked": None}, {"settings": 3, "sources": {}}, {"settings": {"seed": "; x"}}):
        assert "refit" in " ".join(
            recover_command(replace(plan, provenance={"recovery": {**said, **change}}), "M", [])
        )


def test_a_recovery_in_place_of_another_takes_its_settings_along(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = MoEPrunerConfig("random", num_experts=4, recover="distil", recover_what="router", recovery_samples=9)
    assert MoEPrunerConfig.from_dict(full.to_dict(), recover="refit").recovery_samples == 9
    assert MoEPrunerConfig.from_dict(full.to_dict(), recover="refit").recover_what == ()
    assert MoEPrunerConfig.from_dict(full.to_dict(), recover=()).recovery_samples is None
    assert MoEPrunerConfig.from_dict(full.to_dict(), seed=1).recover_what == ("router",)
    with pytest.raises(RequestError, match="recover_what is for recover='distil'"):
        MoEPrunerConfig.from_dict(full.to_dict(), recover="refit", recover_what="router")
    _, plan = _by_random("distil", recover_what="router")
    plan.save(tmp_path / "plan.json")
    given = ("--model", place / "model", "--plan", tmp_path / "plan.json", "--calibration", place / "texts.jsonl")
    code, _, err = call(capsys, "apply", *given, "--recover", "refit", "--dry-run", tmp_path / "out")
    assert code == 0, err


WRONG = {
    "steps": ({"recover": "refitt"}, TEXTS, "recover 'refitt' is not known. Known: refit"),
    "what": ({"recover": "refit", "recover_what": "router"}, TEXTS, "recover_what is for recover='distil'"),
    "comma": ({"recover": " , "}, TEXTS, "recover is ' , '; it must be of refit, distil"),
    "single": (
        {"recover": "refit", "recovery_samples": 1},
        TEXTS,
        "recovery_samples is 1; it must be an integer of at least 2",
    ),
    "number": ({"recovery_samples": 4}, TEXTS, "recovery_samples is for recover"),
    "no text": ({"recover": "refit", "method": "random"}, None, "recover='refit' needs texts, and none are given"),
    "one": ({"recover": "refit"}, [*TEXTS, {"text": "w1 w2 w3", "domain": "rare"}], "domain 'rare' has 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_requests(place: Path, case: str) -> None:
    settings, texts, message = WRONG[case]
    with pytest.raises(RequestError, match=message.replace("(", r"\(")):
        recipe = MoEPrunerConfig.from_dict({"method": "reap", "num_experts": 4}, **settings)
        MoEPruner.from_pretrained(place / "model", recipe).prune(make_model(), texts)


def test_a_function_for_a_model_and_a_plan(place: Path, tmp_path: Path) -> None:
    plan = PruningPlan.from_dict(
        MoEPruner(MoEPrunerConfig(method="random", num_experts=4)).plan(no_calibration(make_model())).to_dict()
    )
    model = load(place / "model")
    done = recover(model, plan, TEXTS, "refit")
    recovery = recovery_of(done)
    assert recovery is not None and recovery["accepted"] and done.retained == plan.retained
    expected = plan.apply(load(place / "model"))
    changed = {
        name
        for (name, mine), theirs in zip(model.named_parameters(), expected.parameters(), strict=True)
        if not torch.equal(mine, theirs)
    }
    assert changed and all(DOWN in name for name in changed)
    cut = replace(plan, config={}, provenance={})  # as one made by hand
    by_hand = MoEPrunerConfig(recover="refit")
    MoEPruner.from_plan(cut, place / "model", by_hand).prune_checkpoint(tmp_path / "hand", recovery=TEXTS)
    assert json.loads((tmp_path / "hand" / "moe_pruner_config.json").read_text()) == {}
    card = (tmp_path / "hand" / "README.md").read_text()
    assert "--recover refit" in card and "moe-prune run" not in card and "recipe as a file" not in card
    with pytest.raises(RequestError, match="names nothing to recover with"):
        recover(load(place / "model"), plan, TEXTS, "")


def test_statistics_hold_no_text(place: Path) -> None:
    pruner = MoEPruner.from_pretrained(place / "model", REFIT)
    stats = pruner.calibrate(make_model(), TEXTS)
    with pytest.raises(RequestError, match="needs texts, and statistics hold none"):
        pruner.prune(make_model(), stats)


def test_an_interval_and_what_a_damaged_plan_says() -> None:
    samples = CalibrationSet.build(TEXTS, make_tokenizer())
    before = torch.rand(len(samples), dtype=torch.float64) + 1
    verdict = Verdict.of(samples, before, before / 2)
    assert verdict.is_better and verdict.interval == (0.5, 0.5)
    plan = PruningPlan("mixtral", 2, "reap", {0: (0, 1)}, {0: 4})
    assert recovery_of(plan) is None
    good: Json = {
        "kl_before": {"all": 1.0, "a": 1}, "kl_after": {"all": 0.5, "a": 0.0}, "left_interval": [0.4, 0.6],
        "samples": {"fit": 4, "held_back": 1}, "steps": ["refit"], "accepted": True, "reason": "",
    }  # fmt: skip
    found = recovery_of(replace(plan, provenance={"recovery": good}))
    assert found is not None and "left 50% (95% interval 40% to 60%)" in sentence_of(found)
    assert sentence_of(found).endswith("on 1 sample that was held back.") and len(table_of(found)) == 3
    damaged: list[Json] = [
        {name: value} for name in good if name != "reason" for value in (None, 3, "x", [], {}, [[]])
    ]
    damaged.remove({"left_interval": None})
    damaged.remove({"left_interval": []})
    damaged.remove({"left_interval": {}})
    damaged += [
        *({"kl_before": {"all": value, "a": 1}} for value in ("1", 0.0, 1e999, 10**400)),
        *({"kl_after": {"all": value, "a": 1}} for value in (-1, True, None)),
        {"left_interval": [0.5]}, {"steps": ["refit", "<b>"]}, {"steps": "refit"}, {"steps": [["refit"]]},
        {"samples": {"fit": 4, "held_back": "<b>"}}, {"samples": {"fit": 4, "held_back": 1.5}}, {"accepted": "no"},
    ]  # fmt: skip
    for change in damaged:
        assert recovery_of(replace(plan, provenance={"recovery": {**good, **change}})) is None, change
    for nothing in ("no", {}, [good]):
        assert recovery_of(replace(plan, provenance={"recovery": nothing})) is None


def _by_random(recover_with: str, **settings: object) -> tuple[MoEPruner, PruningPlan]:
    pruner = MoEPruner(
        MoEPrunerConfig.from_dict({"method": "random", "num_experts": 4}, recover=recover_with, **settings),
        tokenizer=make_tokenizer(),
    )
    return pruner, pruner.plan(no_calibration(make_model()))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RunError("no."), RequestError("no."), MemoryError("no")])
def test_what_fails_after_the_cut_leaves_the_cut_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Refitted weights are taken back, and who reads or saves it is told so."""

    def fails(*args: object, **settings: object) -> None:
        raise error

    pruner, plan = _by_random("refit,distil")
    model = load(place / "model").train()
    model.lm_head.requires_grad_(False)
    monkeypatch.setattr(recovering, "distil", fails)
    expected = RunError if isinstance(error, (RunError, RequestError)) else type(error)
    with pytest.raises(expected) as raised:
        pruner.prune(model, TEXTS)
    if not isinstance(error, MemoryError):
        assert "no weight was recovered: the model is what the plan alone makes of it" in str(raised.value)
    assert model.training and not model.lm_head.weight.requires_grad
    assert_equal_states(model, plan.apply(load(place / "model")))
    assert pruner.pruning_plan is not None and recovery_of(pruner.pruning_plan) is None
    pruner.save_pretrained(tmp_path / "cut")
    assert "nothing was trained afterwards" in (tmp_path / "cut" / "README.md").read_text()


def test_what_can_be_refused_is_refused_before_any_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(*args: object, **settings: object) -> None:
        raise AssertionError("it worked")

    for name in ("refit", "teacher_outputs"):
        monkeypatch.setattr(recovering, name, works)
    rare = [*TEXTS, {"text": "w1 w2 w3", "domain": "rare"}]
    pruner = MoEPruner.from_pretrained(place / "model", REFIT)
    monkeypatch.setattr("optimum_moe_prune.pruner.statistics_to_plan", works)
    for prune in (partial(pruner.prune, make_model()), partial(pruner.prune_checkpoint, tmp_path / "out")):
        with pytest.raises(RequestError, match="domain 'rare' has 1"):
            prune(calibration=rare)
    beyond = [torch.tensor([1, 2, 3 + 10**6]), torch.tensor([1, 2, 3])]
    with pytest.raises(RequestError, match="token id 1000003"):
        pruner.prune(make_model(), beyond)
    _, plan = _by_random("refit")
    other = replace(plan, provenance={"model": {"fingerprint": "0" * 64}})
    with pytest.raises(RequestError, match="other router weights"):
        recover(make_model(), other, TEXTS, tokenizer=make_tokenizer())
    bound = MoEPruner.from_plan(other, place / "model", REFIT)
    for prune in (partial(bound.prune, make_model()), partial(bound.prune_checkpoint, tmp_path / "out")):
        with pytest.raises(RequestError, match="other router weights"):
            prune(recovery=TEXTS)
    assert [path.name for path in tmp_path.iterdir()] == []
    monkeypatch.setattr("optimum_moe_prune.recovery.trained.norms_before", lambda blocks, run: {})
    model = make_model()
    with pytest.raises(RequestError, match="nothing to train of recover_what: norms"):
        recover(model, plan, TEXTS, "refit,distil", what="norms", tokenizer=make_tokenizer())
    assert_equal_states(model, make_model())


def test_a_new_plan_is_recovered_though_the_last_one_was(place: Path) -> None:
    pruner = MoEPruner.from_pretrained(place / "model", REFIT)
    pruner.prune(load(place / "model"), TEXTS)
    with pytest.raises(RequestError, match="needs texts, and none are given"):
        pruner.prune(load(place / "model"), domain_weights={"low": 1.0, "high": 1.0})


def test_both_steps_together_make_no_domain_much_worse() -> None:
    samples = CalibrationSet.build(TEXTS, make_tokenizer())
    before = torch.ones(len(samples), dtype=torch.float64)
    low = torch.tensor([sample.domain == "low" for sample in samples.samples])
    refitted = Verdict.of(samples, before, torch.where(low, 1.04, 0.5).double())
    distilled = torch.where(low, 1.07, 0.3).double()
    assert refitted.is_better and Verdict.of(samples, refitted.sums[1], distilled).is_better
    together = Verdict.of(samples, refitted.sums[1], distilled, kl_first=refitted.kl_before)
    assert "worse by more than 5% (low " in together.reason


def test_both_steps_are_measured_by_whole_distributions(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where of a large vocabulary only the top is kept to teach by, that measures less."""
    monkeypatch.setattr("optimum_moe_prune.recovery.teacher.FULL_VOCABULARY", 0)
    monkeypatch.setattr("optimum_moe_prune.recovery.teacher.teacher_shapes.__defaults__", (4,))
    found = {}
    for steps in ("distil", "refit,distil"):
        pruner, _ = _by_random(steps)
        model = pruner.prune(load(place / "model"), TEXTS)
        assert pruner.pruning_plan is not None
        found[steps] = recovery_of(pruner.pruning_plan)
        assert any("most likely next tokens" in note for note in pruner.pruning_plan.notes) == (steps == "distil")
    both = found["refit,distil"]
    assert both is not None and both["steps"] == ["refit", "distil"]
    assert both["distil"]["kl_before"][ALL] < 0.9 * both["refit"]["kl_after"][ALL]
    held_back = recovering.split_samples(CalibrationSet.build(TEXTS, make_tokenizer())).held_back
    original, total = load(place / "model"), 0.0
    with torch.no_grad():
        for ids in held_back.token_ids:
            p, q = (one(ids[None]).logits[0, :-1].log_softmax(-1) for one in (original, model))
            total += float((p.exp() * (p - q)).sum())
    assert both["kl_after"][ALL] == pytest.approx(total / (held_back.num_tokens - len(held_back)), rel=0.05)


def test_nothing_of_an_interrupted_recovery_stays(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once the output is written, recovered or not; another amount of text is named by its own flag."""
    plan = tmp_path / "plan.json"
    _by_random("refit")[1].save(plan)
    apply = ("apply", "--model", place / "model", "--plan", plan)
    recovers = ("--calibration", place / "texts.jsonl", "--recover", "refit", "--stream")
    with monkeypatch.context() as patch:
        patch.setattr("optimum_moe_prune.recovery.refit._Pass._divergences", _stopped)
        code, _, err = call(capsys, *apply, *recovers, tmp_path / "out")
    assert code == 130, err
    code, _, err = call(capsys, *apply, *recovers, "--recovery-samples", 20, tmp_path / "out")
    assert code == 2 and "--recovery-samples is not set there and 20 now" in err and "--num-samples" not in err
    assert (tmp_path / ".out.partial" / "recovery").is_dir()
    code, _, err = call(capsys, *apply, tmp_path / "out")
    assert code == 0 and sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"], err


def _stopped(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_distillation_takes_gradients_in_any_mode(place: Path, mode: Callable[[], Any]) -> None:
    found = []
    for context in (contextlib.nullcontext, mode):
        model = load(place / "model")
        pruner, _ = _by_random("distil")
        with context():
            pruner.prune(model, TEXTS)
        assert pruner.pruning_plan is not None
        found.append((pruner.pruning_plan.provenance["recovery"]["kl_after"], model))
    assert found[0][0] == found[1][0]
    assert_equal_states(found[0][1], found[1][1])
