# SPDX-License-Identifier: Apache-2.0
"""Two and three real processes give what one gives, to the bit; and nothing is lost when one is killed."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, make_model, make_texts, make_tokenizer, save_checkpoint
from launching import launch
from oracles import assert_identical

from optimum_moe_prune import (
    CalibrationSet,
    CalibrationStats,
    Compute,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    PruningPlan,
    RequestError,
    RunError,
    Workspace,
    calibrate,
    evaluate,
    measure_sensitivity,
)
from optimum_moe_prune.calibration import calibrate as calibrating
from optimum_moe_prune.calibration.shares import shares_of
from optimum_moe_prune.checkpoints.layout import open_layout
from optimum_moe_prune.commands import main
from optimum_moe_prune.evaluation.best import choose_by_measuring
from optimum_moe_prune.evaluation.progressive import calibrate_progressively
from optimum_moe_prune.models import memory
from optimum_moe_prune.models.memory import model_bytes
from optimum_moe_prune.processes import ALONE, Processes
from optimum_moe_prune.recovery import recover as recovering
from optimum_moe_prune.recovery.steps import DistilOptions
from optimum_moe_prune.storage.growing import Store

SETTINGS: dict[str, Any] = {"batch_size": 2, "max_tokens": 60, "seed": 3}
AUTO = MoEPrunerConfig(
    num_experts=4, batch_size=2, sensitivity_samples=4, method_options={"candidates": "soft_frequency,reap"}
)
RECIPE = MoEPrunerConfig(method="mosaic", num_experts=4, batch_size=2, max_tokens=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2-MoE with a dense layer, in float32."""
    place = tmp_path_factory.mktemp("shared") / "model"
    return save_checkpoint("qwen2_moe", place, make_tokenizer(), torch.float32)


@pytest.fixture(scope="module")
def texts() -> list[dict[str, str]]:
    return make_texts(9)


@pytest.fixture(scope="module")
def samples(texts: list[dict[str, str]]) -> CalibrationSet:
    return CalibrationSet.build(texts, make_tokenizer())


def without_origin(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != "provenance"}


def everything(folder: Path, samples: CalibrationSet, stream: bool, out: Path) -> None:
    """All that is shared, saved where it is compared."""
    compute = Compute(stream=stream)
    stats = calibrate(folder, samples, ["all", Need.FISHER], compute=compute, **SETTINGS)
    stats.save(out / "stats")
    one_of_each = {"counts": [3], "sparsities": [0.25], "compute": compute, "batch_size": 2}
    measured = measure_sensitivity(folder, samples, [RECIPE], stats, **one_of_each)
    (chosen,), _ = choose_by_measuring(folder, [AUTO], stats, samples, compute=compute)
    found = {"sensitivity": without_origin(measured.to_dict())}
    found["chosen"] = {"retained": chosen.retained, "choice": chosen.provenance["choice"]}
    if not stream:
        model = load(folder)
        pruned = MoEPruner(RECIPE).prune(load(folder), samples)
        found["evaluation"] = evaluate(pruned, samples, reference=model, batch_size=2).to_dict()
        calibrate(model, samples, compute=compute, **{**SETTINGS, "max_tokens": 5}).save(out / "of model")
    (out / "found.json").write_text(json.dumps(found, default=str))


@pytest.mark.parametrize(("count", "stream"), [(2, False), (3, True)])
def test_the_numbers_are_those_of_one_process(
    count: int, stream: bool, folder: Path, samples: CalibrationSet, tmp_path: Path
) -> None:
    places = [tmp_path / name for name in ("alone", *map(str, range(count)))]
    for place in places:
        place.mkdir()

    def work(rank: int) -> None:
        everything(folder, samples, stream, places[1 + rank])

    ended = launch(count, tmp_path / "printed", work)
    assert [process.code for process in ended] == [0] * count, ended
    everything(folder, samples, stream, places[0])
    expected = CalibrationStats.load(places[0] / "stats")
    for place in places[1:]:
        found = CalibrationStats.load(place / "stats")
        assert_identical(found, expected)
        passing = ("made", "processes", "statistics_on_disk")
        assert {k: v for k, v in found.provenance.items() if k not in passing} == {
            k: v for k, v in expected.provenance.items() if k not in passing
        }
        assert found.provenance["processes"] == count
        if not stream:
            few = CalibrationStats.load(places[0] / "of model")
            assert_identical(CalibrationStats.load(place / "of model"), few)
        assert (place / "found.json").read_text() == (places[0] / "found.json").read_text()


def test_one_that_is_killed_ends_the_others_and_all_go_on(
    folder: Path, samples: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Workspace(tmp_path / "kept")
    commit = Store.commit

    def dying(store: Store, finished: int, *args: Any) -> None:
        commit(store, finished, *args)
        if finished == 2 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    def work(rank: int, out: Path) -> int:
        try:
            stats = calibrate(folder, samples, compute=Compute(stream=True), workspace=kept, **SETTINGS)
        except RunError as error:
            out.write_text(str(error))
            return 1
        if rank == 0:
            stats.save(tmp_path / "stats")
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", dying)
        ended = launch(2, tmp_path / "first", work, tmp_path / "said")
    assert [process.code for process in ended] == [1, -signal.SIGKILL]
    assert "process 1 of 2 ended before its work was done" in (tmp_path / "said").read_text()
    assert not (tmp_path / "stats").exists()
    with pytest.raises(RequestError, match="processes is 2 there and 1 now"):
        calibrate(folder, samples, compute=Compute(stream=True), workspace=kept, **SETTINGS)
    again = launch(2, tmp_path / "second", work, tmp_path / "said")
    assert [process.code for process in again] == [0, 0], again
    assert "is finished: none of 3 layers is done again" in again[0].err
    assert "2 of 3 layers are done" in again[1].err
    expected = calibrate(folder, samples, compute=Compute(stream=True), **SETTINGS)
    assert_identical(CalibrationStats.load(tmp_path / "stats"), expected)


def test_the_command_writes_and_speaks_once(
    folder: Path, texts: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what one process alone meets is told by its number."""
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    command = [
        "score",
        "--model",
        str(folder),
        "--calibration",
        "texts.jsonl",
        "--method",
        "reap",
        "--batch-size",
        "2",
    ]

    collect = calibrating.collect

    def odd(*args: Any, **settings: Any) -> CalibrationStats:
        calibrating.logger.warning("all say this")
        if os.environ["RANK"] == "1":
            calibrating.logger.warning("something is odd here")
            if Path("stats").exists():
                raise RunError("a weight is odd")
        return collect(*args, **settings)

    def work(rank: int, output: str) -> None:
        main([*command, output])

    monkeypatch.setattr(calibrating, "collect", odd)
    ended = launch(2, tmp_path / "fine", work, "stats")
    assert [process.code for process in ended] == [0, 0], ended
    assert ended[0].out.count("statistics of 2 layers: stats") == 1
    for line in ("warning: all say this\n", "warning: process 1 of 2: something is odd here\n", "shared  by 2 proc"):
        assert ended[0].err.count(line) == 1
    assert ended[0].err.count("all say this") == 1 and (ended[1].out, ended[1].err) == ("", "")
    monkeypatch.setattr(calibrating, "collect", collect)
    expected = calibrate(folder, CalibrationSet.build(texts, make_tokenizer()), "reap", batch_size=2)
    assert_identical(CalibrationStats.load("stats"), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fine", "stats", "texts.jsonl"]

    monkeypatch.setattr(calibrating, "collect", odd)
    ended = launch(2, tmp_path / "failed", work, "not")
    assert [process.code for process in ended] == [1, 1]
    told = "error: process 1 of 2: a weight is odd"
    assert [(process.out, process.err.count("error:")) for process in ended] == [("", 1), ("", 0)]
    assert told in ended[0].err
    assert not Path("not").exists()


@pytest.mark.parametrize("max_tokens", [1, 7, 60, 10**6])
def test_shares_are_whole_batches_and_keep_what_the_whole_keeps(samples: CalibrationSet, max_tokens: int) -> None:
    whole = list(samples.batches(2))
    kept = list(zip(*(part.tolist() for part in samples.kept_tokens(max_tokens, 3)), strict=True))
    found, tokens = [], []
    shares = shares_of(samples, 2, Processes(0, 4))
    for rank, share in enumerate(shares):
        for batch, expected in zip(share.batches(99), whole[rank::4], strict=True):
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert torch.equal(batch.attention_mask, expected.attention_mask)
            assert torch.equal(share.numbers[batch.samples], expected.samples)
        sample, position = share.kept_tokens(max_tokens, 3)
        tokens += list(zip(share.numbers[sample].tolist(), position.tolist(), strict=True))
        found += share.samples
        assert share.passages.to_dict() == samples.passages.to_dict()
    assert sorted(tokens) == kept
    assert sorted(found, key=lambda sample: sample.hash) == list(samples.samples)
    assert len(shares_of(samples, 99, Processes(0, 4))[1]) == 0


def test_of_several_processes_each_has_its_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fourth = Processes(3, 4, 3, 4)
    assert Compute(processes=fourth).on_own_device().device == "auto"  # there is no card
    assert Compute(processes=fourth).copies == 4  # in the memory of one machine
    monkeypatch.setattr(memory, "cards", lambda: ["cuda:0", "cuda:1"])
    for device, expected in {"auto": "cuda:1", "cuda": "cuda:1", "cuda:0": "cuda:0", "cpu": "cpu"}.items():
        own = Compute(device=device, processes=fourth).on_own_device()
        assert (own.device, own.copies) == (expected, 4 if device == "cpu" else 2)
    assert Compute(device="auto").on_own_device().device == "auto"
    layout, free = open_layout(folder), 3 * model_bytes(open_layout(folder), "auto") + 2 * 2**30
    monkeypatch.setattr(memory, "available_memory", lambda device: free)
    assert [Compute(device="cpu", processes=p).settled(layout).stream for p in (ALONE, fourth)] == [False, True]


def test_a_model_spread_over_devices_gives_the_same(samples: CalibrationSet) -> None:
    """Each layer moved to a device by accelerate's hooks, as ``device_map="auto"`` has it."""
    from accelerate import dispatch_model

    expected = calibrate(make_model("qwen2_moe"), samples, **SETTINGS)
    model = make_model("qwen2_moe")
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{index}": "cpu" for index in range(3)}
    spread = dispatch_model(model, parts, main_device="cpu", force_hooks=True)
    assert hasattr(spread.model.layers[1], "_hf_hook")
    assert_identical(calibrate(spread, samples, **SETTINGS), expected)
    before = spread.model.layers[1].forward
    losses = [evaluate(each, samples).to_dict() for each in (spread, make_model("qwen2_moe"))]
    assert losses[0] == losses[1]
    assert spread.model.layers[1].forward is before


def test_layers_that_are_pruned_in_turn(
    folder: Path, samples: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes, of which one has no batch, choose each layer by what all gathered; interrupted, they go on."""
    recipe = MoEPrunerConfig(method="reap", num_experts=4, batch_size=5, progressive=True)
    assert [len(share) for share in shares_of(samples, 5, Processes(0, 3))] == [5, 4, 0]
    commit = Store.commit

    def failing(store: Store, finished: int, *args: Any) -> None:
        commit(store, finished, *args)
        if finished == 1 and os.environ.get("RANK") == "1":
            raise RunError("enough")

    def work(rank: int, out: Path) -> None:
        given: Any = (recipe, folder, samples)
        compute, kept = Compute(stream=True), Workspace(tmp_path / "kept")
        stats, _ = calibrate_progressively(*given, compute=compute, workspace=kept)
        stats.save(out / str(rank))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", failing)
        assert all(process.code for process in launch(3, tmp_path / "first", work, tmp_path / "none"))
    again = launch(3, tmp_path / "second", work, tmp_path)
    assert [process.code for process in again] == [0, 0, 0], again
    expected, _ = calibrate_progressively(recipe, folder, samples, compute=Compute(stream=True))
    for rank in range(3):
        found = CalibrationStats.load(tmp_path / str(rank))
        assert_identical(found, expected)
        assert found.provenance["progressive"] == expected.provenance["progressive"]


@pytest.mark.parametrize(("count", "batch_size"), [(2, 4), (3, 16)])
def test_recovery(count: int, batch_size: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of some of the tokens in each process, also where one of them has none; the main one distils."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recovering, "DistilOptions", partial(DistilOptions, steps=2, check_every=1))
    Path("texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in make_texts(20, length=(20, 24))))
    command = [
        *("run", "--model", str(folder), "--calibration", "texts.jsonl", "--method", "random", "--num-experts", "4"),
        *("--recover", "refit,distil", "--batch-size", str(batch_size), "--dtype", "float32"),
    ]

    def work(rank: int, output: str) -> None:
        main([*command, output])

    ended = launch(1, tmp_path / "said", work, "alone") + launch(count, tmp_path / "said", work, "together")
    assert [process.code for process in ended] == [0] * (1 + count), ended
    found, expected = (PruningPlan.load(name).provenance["recovery"] for name in ("together", "alone"))
    assert found["refit"]["layers"].keys() == expected["refit"]["layers"].keys()
    for step in ("refit", "distil"):
        for when in ("kl_before", "kl_after"):
            assert found[step][when] == pytest.approx(expected[step][when], rel=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "said", "texts.jsonl", "together"]
