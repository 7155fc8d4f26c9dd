# SPDX-License-Identifier: Apache-2.0
"""The plan of the work: its numbers are those of the work, and it does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures.published import LAYOUTS
from conftest import make_model, make_texts, make_tokenizer, save_checkpoint

from optimum_moe_prune import CalibrationSet, Compute, MoEPruner, MoEPrunerConfig, RequestError, plan_work
from optimum_moe_prune.checkpoints.checkpoint import Checkpoint
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.commands import main
from optimum_moe_prune.planning import recovery_work, run_time
from optimum_moe_prune.planning import work as work_module
from optimum_moe_prune.planning.probe import Speed, probe
from optimum_moe_prune.recovery import layer_refit, least_squares, split
from optimum_moe_prune.recovery.steps import DistilOptions
from optimum_moe_prune.statistics.needs import Need


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("mixtral", tmp_path_factory.mktemp("work") / "model", make_tokenizer())


@pytest.fixture(scope="module")
def texts() -> CalibrationSet:
    return CalibrationSet.build(make_texts(), make_tokenizer())


def test_what_it_says_is_what_is_done(folder: Path, texts: CalibrationSet, tmp_path: Path) -> None:
    config = MoEPrunerConfig(method="reap", sparsity=0.4)
    before = sorted(tmp_path.rglob("*"))
    work = plan_work(open_layout(folder), config, texts, output=tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before
    pruner = MoEPruner.from_pretrained(folder, config)
    pruner.prune_checkpoint(tmp_path / "out", calibration=texts)
    plan = pruner.pruning_plan
    assert plan is not None and work.choice is not None
    assert work.choice.per_layer == plan.num_experts == {0: 5, 1: 5, 2: 5}
    assert (work.choice.sparsity, work.choice.asked) == (plan.sparsity, 0.4)
    assert work.choice.neighbours == {4: 0.5, 6: 0.25}
    assert work.writes == Checkpoint.open(tmp_path / "out").nbytes
    assert work.reads == Checkpoint.open(folder).nbytes + work.writes
    assert work.texts["samples"] == len(texts) and sum(work.texts["tokens_by_domain"].values()) == texts.num_tokens
    assert (work.device, work.dtype, work.streamed) == ("cpu", "bfloat16", False)
    applied = plan_work(open_layout(folder), plan=plan, output=tmp_path / "out")
    assert applied.writes == work.writes and applied.streamed is None
    said = work.summary()
    assert "5 experts in each layer, 15 of 24 (37.5% removed, 40.0% was asked for)" in said
    assert "the next: 4 (50.0%), 6 (25.0%)" in said
    assert json.loads(json.dumps(work.to_dict()))["choice"]["neighbours"] == {"4": 0.5, "6": 0.25}


def test_skipped_layers_are_not_called_pruned(folder: Path) -> None:
    """What is kept is of all layers; what can be asked for instead, and was asked for, of those not skipped."""
    layout = open_layout(folder)
    for recipe, said in (
        ({}, "5 experts in each of 2 layers, 18 of 24 (25.0% removed, 37.5% without the skipped layers, 40.0% was"),
        ({"allocation": "global"}, "18 of 24 experts (25.0% removed, 37.5% without the skipped layers, 40.0% was"),
    ):
        work = plan_work(layout, MoEPrunerConfig(method="random", sparsity=0.4, skip_layers=(1,), **recipe))
        assert said in work.summary() and work.choice is not None
        smaller, larger = work.choice.neighbours.items()
        for count, sparsity in (smaller, larger):
            again = plan_work(layout, MoEPrunerConfig(method="random", sparsity=sparsity, skip_layers=(1,), **recipe))
            assert again.choice is not None and again.choice.sparsity_of_others == pytest.approx(sparsity)
            if recipe:
                assert again.choice.total == count
            else:
                assert again.choice.per_layer == {0: count, 2: count}


def test_budgets_for_the_whole_model(folder: Path, texts: CalibrationSet) -> None:
    layout = open_layout(folder)
    config = MoEPrunerConfig(method="reap", allocation="global", total_experts=13, skip_layers=(1,))
    choice = plan_work(layout, config, texts).choice
    assert choice is not None and (choice.total, choice.original, choice.per_layer) == (21, 24, None)
    assert list(choice.neighbours) == [20, 22] and choice.neighbours[20] == pytest.approx(1 - 12 / 16)
    with pytest.raises(RequestError, match="at least"):
        plan_work(layout, MoEPrunerConfig(method="reap", allocation="global", total_experts=3), texts)


def test_heads_are_counted(tmp_path: Path) -> None:
    layout = open_layout(LAYOUTS["deepseek_v3_fp8"](tmp_path / "model"))
    for mtp in (None, "keep", "drop"):
        config = MoEPrunerConfig(method="random", num_experts=8, mtp=mtp)
        work = plan_work(layout, config, output=tmp_path / "out")
        MoEPruner.from_pretrained(tmp_path / "model", config).prune_checkpoint(tmp_path / "out", overwrite=True)
        assert work.writes == Checkpoint.open(tmp_path / "out").nbytes, mtp


def test_a_layer_is_tried_where_the_work_is_long(
    folder: Path, texts: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = open_layout(folder)
    config = MoEPrunerConfig(method="mosaic", num_experts=4)
    assert plan_work(layout, config, texts).seconds == 0
    monkeypatch.setattr(work_module, "WORTH_PROBING", 0)
    seconds = plan_work(layout, config, texts, compute=Compute(stream=True)).seconds
    assert seconds is not None and seconds > 0
    measured = plan_work(layout, config, texts, compute=Compute(stream=True), measures=True).seconds
    assert measured is not None and measured > 0
    speed = probe(layout, texts, frozenset(Need), Compute(), 8)
    assert speed is not None and min(speed.reading, speed.plain, speed.watched) > 0


def test_a_card_reads_a_layer_while_one_runs(
    folder: Path, texts: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, config = open_layout(folder), MoEPrunerConfig(method="reap", num_experts=4)
    monkeypatch.setattr(work_module, "WORTH_PROBING", 0)
    monkeypatch.setattr(run_time, "probe", lambda *_: Speed(reading=5.0, plain=0.0, watched=3.0 / texts.num_tokens))
    found = []
    for is_card, stream in ((False, True), (True, True), (True, False)):
        monkeypatch.setattr(run_time, "copies_aside", lambda device, is_card=is_card: is_card)
        seconds = plan_work(layout, config, texts, compute=Compute(stream=stream)).seconds
        assert seconds is not None
        found.append(seconds / len(layout.num_experts))
    assert found == pytest.approx([8.0, 5.0, 8.0])


def test_what_cannot_be_tried_takes_no_known_time(
    folder: Path, texts: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise RequestError("one layer cannot be run alone")

    monkeypatch.setattr(work_module, "WORTH_PROBING", 0)
    monkeypatch.setattr("optimum_moe_prune.planning.probe.open_skeleton", refuse)
    work = plan_work(open_layout(folder), MoEPrunerConfig(method="reap", num_experts=4), texts)
    assert work.seconds is None and "cannot be told" in work.summary()


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_dry_runs_write_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))
    plan = MoEPruner.from_pretrained(folder, MoEPrunerConfig(method="random", num_experts=3))
    plan.prune_checkpoint(tmp_path / "pruned")
    before = sorted(tmp_path.rglob("*"))
    texts = ("--calibration", file)
    for command in (
        ("run", "--model", folder, *texts, "--method", "reap", "--num-experts", "3", tmp_path / "out"),
        ("run", "--model", folder, *texts, "--fit", "60KB", tmp_path / "out"),
        ("score", "--model", folder, *texts, tmp_path / "out"),
        ("sensitivity", "--model", folder, *texts, tmp_path / "out.json"),
        ("compare", "--model", folder, *texts, "--data", file, tmp_path / "out"),
        ("apply", "--model", folder, "--plan", tmp_path / "pruned" / "moe_pruning_plan.json", tmp_path / "out"),
    ):
        assert run(*command, "--dry-run", "--json") == 0
        values = json.loads(capsys.readouterr().out)
        assert values["dry_run"] and values["model"]["parameters"] > 0
        assert (values["fit"] is not None) == ("--fit" in command)
        assert run(*command, "--dry-run") == 0
        assert "Nothing was written" in capsys.readouterr().out
        assert sorted(tmp_path.rglob("*")) == before


def test_the_plan_is_shown_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a sparsity rounds to is said when nothing has run."""
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))

    def stop(*args: object, **kwargs: object) -> None:
        raise RequestError("the work begins")

    monkeypatch.setattr(MoEPruner, "prune_checkpoint", stop)
    given = ("--model", folder, "--calibration", file, "--method", "mosaic")
    assert run("run", *given, "--sparsity", "0.4", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.index("37.5% removed") < said.index("the work begins")


def test_a_plan_is_made_to_fit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))
    assert run("score", "--model", folder, "--calibration", file, "--method", "reap", tmp_path / "stats") == 0
    fits = ("plan", "--stats", tmp_path / "stats", "--method", "reap", "--fit", "60KB")
    assert run(*fits, tmp_path / "plan.json") == 0
    stored = json.loads((tmp_path / "plan.json").read_text())
    assert stored["provenance"]["fit"]["asked"] == 60000 and stored["config"]["num_experts"]
    other = save_checkpoint("qwen2_moe", tmp_path / "other", make_tokenizer())
    capsys.readouterr()
    assert run(*fits, "--model", other, tmp_path / "plan2.json") == 2
    assert "is not the model that the statistics are of" in capsys.readouterr().err


def test_what_does_not_fit_is_refused_before_texts_are_read(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))
    assert run("run", "--model", folder, "--calibration", file, "--fit", "1KB", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "What would fit: " in said


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ("compare --data texts.jsonl --allocation foo", "allocation 'foo' is not known"),
        ("compare --data texts.jsonl --domain-weight x=1", "a positive number for each domain"),
        ("compare --data texts.jsonl --sparsity 0.99", "removes 8 of 8 experts"),
        ("sensitivity --domain-weight x=1", "a positive number for each domain"),
        ("sensitivity --protect 0:9", "names expert 9 of layer 0"),
        ("sensitivity --skip-layers 0,1,2", "names every MoE layer"),
        ("run --num-experts 4 --domain-weight x=1", "a positive number for each domain"),
    ],
)
def test_the_plan_of_refused_work_is_not_shown(
    request_: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in make_texts()))
    command, *flags = request_.replace("texts.jsonl", str(file)).split()
    out = tmp_path / ("out.json" if command == "sensitivity" else "out")
    assert run(command, "--model", folder, "--calibration", file, *flags, out) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_what_a_refit_takes_to_solve_is_counted(tmp_path: Path, texts: CalibrationSet) -> None:
    """Matrices of features by features, of as many experts as are solved for together."""
    model = make_model(hidden_size=64, intermediate_size=1024, num_local_experts=8, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "model")
    layout = open_layout(tmp_path / "model")
    recipe = MoEPrunerConfig("random", num_experts=4, recover="refit")
    work = plan_work(layout, recipe, recovery=texts, output=tmp_path / "out")
    assert work.recovery is not None
    features = 4 * 1024
    assert 4 * 4 * features**2 < work.recovery.memory < 1.5 * 5 * 4 * features**2
    assert work.memory > work.recovery.memory
    assert recovery_work.MOST_FEATURES == least_squares.MOST_FEATURES
    assert recovery_work.EXACT_FEATURES == least_squares._EXACT_FEATURES
    assert recovery_work.FEATURE_BYTES == layer_refit._FEATURE_BYTES and recovery_work.HELD_BACK == split.HELD_BACK


@pytest.mark.parametrize("count", [4, 100, 2000])
@pytest.mark.parametrize("streamed", [False, True])
def test_what_a_distillation_is_trained_on_is_known_before(count: int, streamed: bool) -> None:
    """Neither more for much text than it ever takes, nor less for little."""
    samples = CalibrationSet.build([torch.arange(n, n + 64) for n in range(count)])
    options = DistilOptions()
    options = options.streamed(samples) if streamed else options.in_memory(samples, samples)
    assert options.steps is not None and options.tokens is not None
    expected = options.steps * options.tokens
    assert recovery_work.trained_tokens(samples.num_tokens, 64, streamed) == pytest.approx(expected, rel=0.01)
    assert recovery_work.trained_tokens(samples.num_tokens, 4096, False) >= 60 * 4096
