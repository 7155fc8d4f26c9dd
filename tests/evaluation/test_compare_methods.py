# SPDX-License-Identifier: Apache-2.0
"""Methods compared by masking against models that are really pruned; what is left out; the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import aligned, make_model, make_texts, make_tokenizer
from oracles import call

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    MoEPrunerConfig,
    PruningPlan,
    RequestError,
    Workspace,
    calibrate,
    compare_methods,
    write_method_comparison,
)
from optimum_moe_prune.evaluation import compare_methods as module
from optimum_moe_prune.evaluation.comparison import Comparison
from optimum_moe_prune.evaluation.losses import DomainResult, evaluate
from optimum_moe_prune.evaluation.method_comparison import MethodComparison
from optimum_moe_prune.evaluation.overlap import HELD_OUT, PARTLY
from optimum_moe_prune.models.memory import Compute

SEEN, FRESH = make_texts(10), make_texts(9, seed=7)
TOKENIZER = make_tokenizer()


def close(a: DomainResult, b: DomainResult) -> None:
    assert (a.samples, a.tokens) == (b.samples, b.tokens)
    for name in ("loss", "reference_loss", "kl_divergence", "top1_agreement"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-4, abs=2e-6), name
    assert (a.lost_interval is None) == (b.lost_interval is None)


@pytest.fixture(scope="module")
def found() -> MethodComparison:
    methods = ["reap", "mosaic", "pathfinder", "random"]
    return compare_methods(make_model(), SEEN, FRESH, methods=methods, sparsities=(0.5, 0.25), tokenizer=TOKENIZER)


def test_the_numbers_are_those_of_models_that_are_really_pruned(kind: str) -> None:
    model, reference = make_model(kind), aligned(make_model(kind))
    methods = ["frequency", MoEPrunerConfig(method="importance", method_options={"tau": 0.2})]
    result = compare_methods(model, SEEN, FRESH, methods=methods, sparsities=(0.4, 0.2), tokenizer=TOKENIZER)
    assert list(result.plans) == [f"{m} {s}" for s in ("40%", "20%") for m in ("frequency", "importance (global)")]
    assert set(result.plans["importance (global) 40%"].num_experts.values()) != {4}
    for name, plan in result.plans.items():
        expected = evaluate(plan.apply(make_model(kind)), FRESH, TOKENIZER, reference=reference)
        mine = result.comparison.models[name].evaluation
        assert list(mine.domains) == list(expected.domains) == ["high", "low", "all"]
        for domain in mine.domains:
            close(mine.domains[domain], expected.domains[domain])
    for parameter, own in zip(model.parameters(), reference.parameters(), strict=True):
        assert parameter.shape == own.shape, "the model is as it was"


def test_tables_have_plans_as_columns_in_the_order_that_was_asked_for(found: MethodComparison) -> None:
    assert found.sparsities == [0.5, 0.25] and found.labels == ["reap", "mosaic", "pathfinder (global)", "random"]
    text = found.summary()
    first, second = text.split("25% of the experts removed")
    for part in (first, second):
        head = next(line for line in part.splitlines() if line.startswith("lost (nats)"))
        assert head.split() == ["lost", "(nats)", "reap", "mosaic", "pathfinder", "(global)", "random"]
        rows = [line.split("  ")[0] for line in part.splitlines()]
        order = ["high", "low", "mean", "all text", "perplexity", "KL (nats)", "top-1 same"]
        assert rows[rows.index("high") :][:7] == order
    assert "nats lost per token of held-out text" in text and text.count("Perplexity: among how many") == 1
    lost = {label: found.lost(label, 0.5) for label in found.labels}
    best = min(lost, key=lambda label: lost[label])
    assert f"50% removed: {best} loses least of 4, {lost[best]:.3f} nats per token (perplexity x " in found.verdict()
    mean = next(line for line in found.markdown().splitlines() if line.startswith("| mean"))
    assert [cell.strip() for cell in mean.split("|")][2 + list(lost).index(best)] == f"**{lost[best]:.3f}**"
    assert f"\x1b[1m{lost[best]:.3f}\x1b[0m" in found.summary(bold=True) and "\x1b" not in text
    narrow = found.summary(width=40)
    assert max(map(len, narrow.splitlines()[1:8])) <= 40 and narrow.count("lost (nats)") > 2
    a, b = (found.comparison.models[f"reap {s}"].overlap for s in ("25%", "50%"))
    assert a == b and a.kind == HELD_OUT


def test_text_that_was_calibrated_on_is_called_so(caplog: pytest.LogCaptureFixture) -> None:
    result = compare_methods(
        make_model(), SEEN, SEEN[:3] + FRESH, methods=["reap", "random"], sparsities=[0.5], tokenizer=TOKENIZER
    )
    kinds = {name: result.comparison.models[name].overlap.kind for name in result.plans}
    assert kinds == {"reap 50%": PARTLY, "random 50%": HELD_OUT}
    assert "held-out text" not in result.summary().split("\n")[0]
    assert "3 of 12 evaluation samples were calibrated on for reap 50%" in result.verdict()
    assert "3 of 12 evaluation samples were calibrated on" in caplog.text


def test_what_cannot_be_planned_is_named_and_left_out(found: MethodComparison) -> None:
    assert found.left_out == {}
    recipes = [MoEPrunerConfig(method="reap"), MoEPrunerConfig(method="reap", protect={0: [1]}), "mosaic"]
    model = make_model()
    stats = calibrate(model, CalibrationSet.build(SEEN, TOKENIZER), ["reap"])
    result = compare_methods(
        model, stats, FRESH, methods=recipes, sparsities=[0.5, 0.9], allocations=["global"], tokenizer=TOKENIZER
    )
    assert list(result.plans) == ["reap (global) 50%", "reap #2 (global) 50%"]
    assert (
        "removes 7 of 8 experts" in result.left_out["reap (global) 90%"]
        or "0.9" in result.left_out["reap (global) 90%"]
    )
    assert "allocation 'global' is not for method 'mosaic'" in result.left_out["mosaic (global) 50%"]
    assert result.summary().count("Left out: mosaic (global) 50%, mosaic (global) 90%: ") == 1
    lacking = compare_methods(model, stats, FRESH, methods=["reap", "mosaic"], sparsities=[0.5], tokenizer=TOKENIZER)
    assert "needs the statistics" in lacking.left_out["mosaic 50%"] and list(lacking.plans) == ["reap 50%"]
    for settings, message in (
        ({"sparsities": [0.95]}, r"nothing can be compared: reap 95%: "),
        ({"sparsities": []}, "no sparsity is named"),
        ({"sparsities": [25]}, "sparsity is 25; the fraction"),
        ({"methods": []}, "no method is named"),
        ({"methods": ["rep"]}, "reap"),
    ):
        with pytest.raises(RequestError, match=message):
            compare_methods(model, stats, FRESH, **{"methods": ["reap"], **settings}, tokenizer=TOKENIZER)
    with pytest.raises(RequestError, match="another model"):
        compare_methods(make_model(seed=1), stats, FRESH, methods=["reap"], tokenizer=TOKENIZER)


def test_one_set_of_experts_is_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    own = module.outcomes
    monkeypatch.setattr(module, "outcomes", lambda r, s, plans, **how: asked.append(plans) or own(r, s, plans, **how))
    recipes = [MoEPrunerConfig(method="reap"), MoEPrunerConfig(method="reap", batch_size=4)]
    result = compare_methods(make_model(), SEEN, FRESH, methods=recipes, sparsities=[0.5], tokenizer=TOKENIZER)
    assert len(asked[0]) == 2 and len(result.plans) == 2  # the original's and theirs


def test_streamed_and_continued_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    settings = {"methods": ["reap", "frequency"], "allocations": ["uniform", "sensitivity"], "sparsities": [0.25]}
    whole = compare_methods(tmp_path / "model", SEEN, FRESH, **settings)
    assert len(whole.plans) == 4
    work = Workspace(tmp_path / "work")

    def killed(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_judged", killed)
        with pytest.raises(KeyboardInterrupt):
            compare_methods(tmp_path / "model", SEEN, FRESH, **settings, compute=Compute(stream=True), workspace=work)
    kept = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert kept == ["calibration", "sensitivity"]
    again = compare_methods(tmp_path / "model", SEEN, FRESH, **settings, workspace=work)
    assert again.plans["reap (sensitivity) 25%"].provenance["calibration"]["streamed"] is True
    for name, plan in whole.plans.items():
        assert again.plans[name].retained == plan.retained
        close(
            again.comparison.models[name].evaluation.domains["all"],
            whole.comparison.models[name].evaluation.domains["all"],
        )


def test_the_files(found: MethodComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    write_method_comparison(out, found)
    assert sorted(path.name for path in out.iterdir()) == ["picture.png", "plans", "results.json", "table.md"]
    values = json.loads((out / "results.json").read_text())
    assert Comparison.load(out / "results.json") == found.comparison
    assert list(values["plans"]) == list(found.plans) and values["left_out"] == {}
    for name, entry in values["plans"].items():
        assert PruningPlan.load(out / entry["file"]) == found.plans[name]
    assert (out / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "table.md").read_text() == found.markdown() + "\n"
    (out / "notes.txt").write_text("mine")
    (out / "plans" / "mine.json").write_text("mine")
    with pytest.raises(RequestError, match="exists and is not empty"):
        write_method_comparison(out, found)
    fewer = compare_methods(make_model(), SEEN, FRESH, methods="reap", sparsities=[0.5], tokenizer=TOKENIZER)
    write_method_comparison(out, fewer, overwrite=True)
    assert sorted(path.name for path in (out / "plans").iterdir()) == ["mine.json", "reap_0.5.json"]
    assert (out / "notes.txt").read_text() == "mine" and (out / "picture.png").is_file()
    (out / "results.json").write_text("{}")
    with pytest.raises(RequestError, match="something else than a comparison of methods"):
        write_method_comparison(out, found, overwrite=True)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    for name, records in (("seen", SEEN), ("fresh", FRESH)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    base = ("compare", "--model", tmp_path / "model", "--data", tmp_path / "fresh.jsonl")
    run = (*base, "--calibration", tmp_path / "seen.jsonl", "--method", "reap", "--method", "random")
    code, out, err = call(capsys, *run, "--sparsity", "25%", "--sparsity", 0.5, tmp_path / "out")
    assert code == 0, err
    assert "25% removed: " in out and "50% removed: " in out and not (tmp_path / ".out.partial").exists()
    assert call(capsys, "score", "--model", tmp_path / "model", *run[5:9], tmp_path / "stats")[0] == 0
    stats = ("--stats", tmp_path / "stats", "--method", "reap")
    code, out, err = call(capsys, *base, *stats, "--sparsity", "25%", "--json", tmp_path / "again")
    values = json.loads(out)
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert code == 0 and list(values["plans"]) == ["reap 25%"], err
    assert values["models"]["reap 25%"]["domains"] == first["models"]["reap 25%"]["domains"]
    assert CalibrationStats.load(tmp_path / "stats").fingerprint[:12] == values["settings"]["calibration_fingerprint"]
    for arguments, message in (
        ((*base, *stats, "--sparsity", "25", tmp_path / "x"), "write 25% or 0.25"),
        ((*base, *stats, "--sparsity", "a%", tmp_path / "x"), "is no fraction"),
        ((*base, *stats, tmp_path / "model"), "exists and is not empty"),
        ((*base, *stats, "--overwrite", tmp_path / "model"), "something else than a comparison"),
        ((*base, "--method", "reap", tmp_path / "x"), "name a file (--calibration FILE)"),
        ((*base, *stats, "--json", "--markdown", tmp_path / "x"), "exclude each other"),
        ((*run, "--option", "a=1", tmp_path / "x"), "--option is for one method"),
    ):
        code, out, err = call(capsys, *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1, (arguments, err)
        assert not (tmp_path / "x").exists()
