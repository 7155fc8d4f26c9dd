# SPDX-License-Identifier: Apache-2.0
"""Interrupted at any moment, nothing that is not finished looks finished, and the same command completes the work."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import make_texts, make_tokenizer, save_checkpoint
from oracles import assert_identical, assert_same_result, calibrated, call, layout_of

import optimum_moe_prune.calibration.in_memory as in_memory
import optimum_moe_prune.models.memory as memory
import optimum_moe_prune.pruner as pruner_module
from optimum_moe_prune import (
    CalibrationSet,
    MoEPruner,
    MoEPrunerConfig,
    Need,
    PruningPlan,
    RequestError,
    RunError,
)
from optimum_moe_prune.calibration.observer import LayerObserver
from optimum_moe_prune.models.skeleton import Skeleton
from optimum_moe_prune.storage.folders import working_on, written_folder
from optimum_moe_prune.storage.outputs import MARKERS

COMMANDS = ("run", "score", "apply")
SEEDS = [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 50))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint in several files, calibration texts, and a plan."""
    folder = tmp_path_factory.mktemp("place")
    save_checkpoint("qwen2_moe", folder / "model", make_tokenizer())
    lines = [json.dumps(record) for record in make_texts(24)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    pruner = MoEPruner.from_pretrained(folder / "model", method="random", num_experts=4)
    pruner.prune_checkpoint(folder / "expected_apply")
    assert pruner.pruning_plan is not None
    pruner.pruning_plan.save(folder / "plan.json")
    return folder


def arguments(command: str, place: Path, output: Path, streamed: bool = False) -> list[str]:
    model = ["--model", str(place / "model")]
    calibration = ["--calibration", str(place / "texts.jsonl"), "--batch-size", "3"]
    calibration += ["--stream" if streamed else "--no-stream"]
    return {
        "run": ["run", *model, *calibration, "--method", "reap", "--num-experts", "4", str(output)],
        "score": ["score", *model, *calibration, str(output)],
        "apply": ["apply", *model, "--plan", str(place / "plan.json"), str(output)],
    }[command]


def assert_nothing_looks_finished(folder: Path, allowed: Path | None = None) -> None:
    for marker in MARKERS:
        for path in folder.rglob(marker):
            hidden = any(part.startswith(".") and part.endswith((".partial", ".writing")) for part in path.parts)
            assert hidden or (allowed is not None and path.is_relative_to(allowed)), path


# ------------------------------------------------------------------------------------------- killed

FORKER = """
import os, signal, sys, time, json
import torch
torch.set_num_threads(1)  # no threads before a fork
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, Qwen2MoeForCausalLM
from transformers.utils import logging
from optimum_moe_prune import pruner
from optimum_moe_prune.calibration import calibrate, in_memory as collect, streamed
from optimum_moe_prune import commands as cli
logging.disable_progress_bar()
collect.GROUP_SECONDS = 0  # every batch is a group
for line in sys.stdin:
    order = json.loads(line)
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.setsid()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1); os.dup2(null, 2)
        try:
            cli.main(order["arguments"])
        except SystemExit as end:
            os._exit(end.code)
        finally:
            os._exit(99)
    if order["after"] is not None:
        time.sleep(order["after"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    print(json.dumps([code, time.perf_counter() - began]), flush=True)
"""


@pytest.fixture(scope="module")
def forked() -> Iterator[Callable[..., tuple[int, float]]]:
    """Runs a command in a child forked after the imports, killed after some seconds or not: exit code, seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", FORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )

    def run(arguments: list[str], after: float | None = None) -> tuple[int, float]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"arguments": arguments, "after": after}) + "\n")
        code, seconds = json.loads(process.stdout.readline())
        return code, seconds

    yield run
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(place: Path, forked: Callable[..., tuple[int, float]]) -> dict[tuple[str, bool], tuple[Path, float]]:
    """The result of each command and how long it takes."""
    found = {}
    for command in COMMANDS:
        for streamed in (False, True):
            output = place / f"whole_{command}_{streamed}"
            code, seconds = forked(arguments(command, place, output, streamed))
            assert code == 0
            found[command, streamed] = (output, seconds)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_any_moment(
    command: str, seed: int, place: Path, tmp_path: Path, forked: Callable[..., tuple[int, float]],
    undisturbed: dict[tuple[str, bool], tuple[Path, float]],
) -> None:  # fmt: skip
    rng = random.Random(f"{command} {seed}")
    streamed = bool(seed % 2)
    expected, seconds = undisturbed[command, streamed]
    output = tmp_path / "out"
    line = arguments(command, place, output, streamed)
    for _ in range(2):  # also what continues can be killed
        code, _ = forked(line, after=rng.uniform(0, seconds))
        assert code in (0, -9)
        assert_nothing_looks_finished(tmp_path, allowed=output)
        if output.exists():  # it was faster than that, or killed after the last rename
            break
        assert code == -9
    else:
        assert forked(line)[0] == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert_same_result(command, output, expected)


# ------------------------------------------------------------------------------------------- failures

CALLS = [
    (os, "fsync"), (os, "rename"), (os, "replace"), (os, "write"), (os, "copy_file_range"), (os, "posix_fallocate"),
    (os, "mkdir"), (shutil, "copyfile"), (Path, "write_text"),
]  # fmt: skip


class Failing:
    """Makes one call of those that write, sync or rename fail; counts them all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int | None, error: int) -> None:
        self.calls = 0
        self.failed = ""
        for owner, name in CALLS:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name), name, number, error))

    def _wrapped(self, real: Callable, name: str, number: int | None, error: int) -> Callable:
        def wrapped(*args: object, **kwargs: object) -> object:
            self.calls += 1
            if self.calls == number:
                self.failed = name
                raise OSError(error, os.strerror(error))
            return real(*args, **kwargs)

        return wrapped


@pytest.mark.parametrize("all_of_them", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_failure_at_every_write_sync_and_rename(
    command: str, streamed: bool, all_of_them: bool, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    undisturbed: dict[tuple[str, bool], tuple[Path, float]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if command == "apply" and streamed:
        pytest.skip("apply calculates nothing")
    expected, _ = undisturbed[command, streamed]
    monkeypatch.setattr(in_memory, "GROUP_SECONDS", 0)
    line = arguments(command, place, tmp_path / "out", streamed)
    with monkeypatch.context() as patched:
        counted = Failing(patched, None, 0)
        assert call(capsys, *line)[0] == 0
    shutil.rmtree(tmp_path / "out")
    total = counted.calls
    assert total > 10
    kinds = set()
    step = 1 if command == "apply" or all_of_them else total // 12  # an even choice
    for number in range(1 + random.Random(command).randrange(step), total + 1, step):
        with monkeypatch.context() as patched:
            failing = Failing(patched, number, random.Random(number).choice([errno.ENOSPC, errno.EIO]))
            code, _, err = call(capsys, *line)
        if code == 0:  # syncing the folder above, and making a folder that is there, may fail without harm
            assert failing.failed in ("fsync", "mkdir", ""), failing.failed
        else:
            kinds.add(failing.failed)
            lines = [text for text in err.splitlines() if text.startswith("error: ")]
            assert code == 1 and len(lines) == 1 and ("No space left" in lines[0] or "Input/output" in lines[0]), err
            assert not (tmp_path / "out").exists()
            assert_nothing_looks_finished(tmp_path)
            assert call(capsys, *line)[0] == 0
        assert_same_result(command, tmp_path / "out", expected)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        shutil.rmtree(tmp_path / "out")
    assert {"fsync", "write", "rename"} <= kinds or step > 1


def test_replacing_an_earlier_output(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any failure the earlier output or the new one is there, whole."""
    plan = PruningPlan.load(place / "plan.json")
    other = MoEPruner.from_pretrained(place / "model", method="random", num_experts=3)
    other.prune_checkpoint(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "out")
    for number in range(1, 200):
        with monkeypatch.context() as patched:
            failing = Failing(patched, number, errno.EIO)
            try:
                plan.apply_to_checkpoint(place / "model", tmp_path / "out", overwrite=True)
                break
            except RunError:
                assert failing.failed
        if not (tmp_path / "out").exists():  # the process could have ended between two renames
            assert (tmp_path / ".out.replaced").exists()
            with pytest.raises(RequestError, match="exists and is not empty"):
                plan.apply_to_checkpoint(place / "model", tmp_path / "out")
        assert_same_result("apply", tmp_path / "out", tmp_path / "before")
    else:
        raise AssertionError("it never completed")
    assert number > 10
    assert_same_result("apply", tmp_path / "out", place / "expected_apply")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before", "out"]


def test_killed_between_the_two_renames(place: Path, tmp_path: Path) -> None:
    other = MoEPruner.from_pretrained(place / "model", method="random", num_experts=3)
    other.prune_checkpoint(tmp_path / ".out.replaced")
    (tmp_path / ".out.partial" / "output").mkdir(parents=True)
    (tmp_path / ".out.partial" / "lock").touch()
    plan = PruningPlan.load(place / "plan.json")
    with pytest.raises(RequestError, match="exists and is not empty"):
        plan.apply_to_checkpoint(place / "model", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / ".out.replaced").exists()
    plan.apply_to_checkpoint(place / "model", tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_files_that_may_not_grow(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The system itself refuses to write beyond a size."""
    before = {path: path.stat().st_mtime_ns for path in (place / "model").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for command in COMMANDS:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            code, _, err = call(capsys, *arguments(command, place, tmp_path / "out", streamed=True))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert code == 1 and "File too large" in err, err
        assert not (tmp_path / "out").exists()
        assert call(capsys, *arguments(command, place, tmp_path / "out", streamed=True))[0] == 0
        shutil.rmtree(tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (place / "model").iterdir()} == before


def test_targets_that_may_not_be_written(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for command in COMMANDS:
        for output in (tmp_path / "out", tmp_path / "file" / "out"):
            code, _, err = call(capsys, *arguments(command, place, output))
            assert code == 2 and "is not a folder that may be written to" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_else_the_sibling_holds_stays(place: Path, tmp_path: Path) -> None:
    """An unfinished calibration outlives other commands with the same target, failing or not."""
    with working_on(tmp_path / "out") as partial:
        (partial / "calibration").mkdir()
    with pytest.raises(ValueError, match="stop"), written_folder(tmp_path / "out") as output:
        (output / "a").write_text("a")
        raise ValueError("stop")
    assert sorted(path.name for path in partial.iterdir()) == ["calibration", "lock"]
    PruningPlan.load(place / "plan.json").apply_to_checkpoint(place / "model", tmp_path / "out")
    assert sorted(path.name for path in partial.iterdir()) == ["calibration", "lock"]


def test_one_process_at_a_time(place: Path, tmp_path: Path) -> None:
    plan = PruningPlan.load(place / "plan.json")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RequestError, match="another process is working on"):
        plan.apply_to_checkpoint(place / "model", tmp_path / "out")
    assert (tmp_path / ".out.partial" / "lock").exists()
    holder.kill()
    holder.communicate()
    plan.apply_to_checkpoint(place / "model", tmp_path / "out")  # the lock of a process that is gone holds nothing
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


HOLDER = """
import sys
from optimum_moe_prune.storage.folders import working_on
with working_on(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_whoever_holds_a_target_may_hold_it_again(tmp_path: Path) -> None:
    def hold() -> None:
        with working_on(tmp_path / "out"):
            pass

    with working_on(tmp_path / "out") as partial:
        (partial / "calibration").mkdir()
        with working_on(tmp_path / "out") as same, written_folder(tmp_path / "out") as output:
            assert partial == same == output.parent
        with ThreadPoolExecutor(1) as pool, pytest.raises(RequestError, match="another process is working on"):
            pool.submit(hold).result()
    hold()
    assert sorted(path.name for path in partial.iterdir()) == ["calibration", "lock"]
    (partial / "calibration").rmdir()
    hold()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_others_made_is_not_touched(place: Path, tmp_path: Path) -> None:
    plan = PruningPlan.load(place / "plan.json")
    (tmp_path / ".out.replaced").mkdir()
    (tmp_path / ".out.replaced" / "photo.jpg").write_text("mine")
    plan.apply_to_checkpoint(place / "model", tmp_path / "out")
    assert (tmp_path / ".out.replaced" / "photo.jpg").exists()
    (tmp_path / ".more.partial").mkdir()
    (tmp_path / ".more.partial" / "photo.jpg").write_text("mine")
    with pytest.raises(RequestError, match="is in the way and was not made by this package"):
        plan.apply_to_checkpoint(place / "model", tmp_path / "more")
    assert (tmp_path / ".more.partial" / "photo.jpg").exists()


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), written_folder(tmp_path / "a" / "b" / "out"):
        raise ValueError("stop")
    assert not list(tmp_path.iterdir())


def test_stopped_between_the_two_renames(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = PruningPlan.load(place / "plan.json")
    plan.apply_to_checkpoint(place / "model", tmp_path / "out")
    before = (tmp_path / "out").stat().st_ino
    rename, calls = os.rename, []

    def stopping(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", stopping)
    with pytest.raises(KeyboardInterrupt):
        plan.apply_to_checkpoint(place / "model", tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").stat().st_ino == before and len(calls) == 3


def test_nothing_is_called_finished_before_it_is_on_disk(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every file is synced before the rename, or the word, that makes it part of something finished."""
    synced: set[tuple[int, int]] = set()
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def key(found: os.stat_result) -> tuple[int, int]:
        return found.st_dev, found.st_ino

    def syncing(descriptor: int) -> None:
        synced.add(key(os.fstat(descriptor)))
        fsync(descriptor)

    def inside(folder: Path) -> set[Path]:
        return {path for path in folder.rglob("*") if key(path.stat()) not in synced} | (
            set() if key(folder.stat()) in synced else {folder}
        )

    def renaming(source: Path, target: Path) -> None:
        if Path(source).is_dir() and Path(source).name == "output":
            assert not inside(Path(source))
        rename(source, target)

    def replacing(source: Path, target: Path) -> None:
        if Path(target).name == "progress.json":
            step = json.loads(Path(source).read_text())["finished"]
            folder = Path(target).parent
            written = {path for path in inside(folder) if path.suffix == ".safetensors"}
            assert not written and key(folder.stat()) in synced, (step, written)
            assert key(Path(source).stat()) in synced
            for path in folder.glob("*.safetensors"):
                synced.discard(key(path.stat()))  # the next step writes to it again
        replace(source, target)

    monkeypatch.setattr(in_memory, "GROUP_SECONDS", 0)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    monkeypatch.setattr(os, "replace", replacing)
    for command in COMMANDS:
        assert call(capsys, *arguments(command, place, tmp_path / command))[0] == 0


# ------------------------------------------------------------------------------------------- continued


class Stopped(Exception):
    pass


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[tuple[int, int]]]:
    """Counts how often a layer's experts are observed, and stops at the given one."""
    forward = LayerObserver.experts_forward

    def stop_at(number: int) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []

        def counting(self: LayerObserver, *args: torch.Tensor) -> torch.Tensor:
            seen.append((self.block.layer, self.current.num_tokens))
            if len(seen) == number:
                raise Stopped
            return forward(self, *args)

        monkeypatch.setattr(LayerObserver, "experts_forward", counting)
        return seen

    return stop_at


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_a_calibration_continues_where_it_stopped(
    streamed: bool, folder: Path, samples: CalibrationSet, tmp_path: Path, stopping: Callable,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(in_memory, "GROUP_SECONDS", 0)
    layout = layout_of(folder)
    how = {"batch_size": 3, "stream": streamed, "max_tokens": 60}
    expected = calibrated(layout, samples, Need, **how)
    everything = stopping(0)
    calibrated(layout, samples, Need, **how)
    for number in range(1, len(everything) + 1):
        kept = tmp_path / str(number)
        stopping(number)
        with pytest.raises(Stopped):
            calibrated(layout, samples, Need, **how, folder=kept)
        steps = number - 1  # observed before the stop
        batches = samples.num_batches(3)
        finished = steps // batches if streamed else steps // len(layout.layers)
        assert kept.exists() == (finished > 0)  # nothing finished, nothing to keep
        again = stopping(0)
        assert_identical(calibrated(layout, samples, Need, **how, folder=kept), expected)
        per_step = batches if streamed else len(layout.layers)
        assert len(again) == len(everything) - finished * per_step
    assert "continuing the unfinished calibration" in caplog.text


def test_another_request_is_refused_and_named(
    folder: Path, samples: CalibrationSet, tmp_path: Path, stopping: Callable
) -> None:
    layout = layout_of(folder)
    needs = {Need.ROUTING}
    how = {"batch_size": 3, "stream": True, "folder": tmp_path / "kept"}
    stopping(7)
    with pytest.raises(Stopped):
        calibrated(layout, samples, needs, **how)
    stopping(0)
    fewer = CalibrationSet(samples.samples[1:], samples.token_ids[1:])
    changes: list[tuple[str, dict[str, object]]] = [
        ("batch_size is 3 there and 4 now", {"batch_size": 4}),
        ("the calibration samples are others", {"calibration": fewer}),
        ("needs is", {"needs": {Need.ROUTING, Need.GRAM}}),
        ("max_tokens is 8192 there and 9 now", {"max_tokens": 9}),
        ("seed is 0 there and 1 now", {"seed": 1}),
        ("dtype is auto there and float32 now", {"dtype": "float32"}),
        ("stream is True there and False now", {"stream": False}),
    ]
    for message, change in changes:
        asked = {"calibration": samples, "needs": needs, **how, **change}
        with pytest.raises(RequestError, match=rf"of something else: {message}.*begin anew \(restart=True\)"):
            calibrated(layout, asked.pop("calibration"), asked.pop("needs"), **asked)
    os.utime(folder / "model.safetensors")
    with pytest.raises(RequestError, match=r"else: model.safetensors of the model was changed\. Run"):
        calibrated(layout_of(folder), samples, needs, **how)
    found = calibrated(layout_of(folder), samples, needs, **how, restart=True)
    assert_identical(found, calibrated(layout_of(folder), samples, needs, batch_size=3, stream=True))


def test_the_way_stays_when_memory_changes(
    folder: Path, samples: CalibrationSet, tmp_path: Path, stopping: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda _: 0)
    stopping(samples.num_batches(3) + 1)
    with pytest.raises(Stopped):
        calibrated(layout_of(folder), samples, {Need.ROUTING}, batch_size=3, folder=tmp_path / "kept")
    again = stopping(0)
    monkeypatch.setattr(memory, "available_memory", lambda _: 2**50)
    stats = calibrated(layout_of(folder), samples, {Need.ROUTING}, batch_size=3, folder=tmp_path / "kept")
    assert stats.provenance["streamed"] and 0 not in {layer for layer, _ in again}


@pytest.mark.parametrize("streamed", [False, True], ids=["memory", "stream"])
def test_interrupted_after_the_last_step(
    streamed: bool, folder: Path, samples: CalibrationSet, tmp_path: Path, stopping: Callable
) -> None:
    how = {"batch_size": 3, "stream": streamed, "folder": tmp_path / "kept"}
    first = calibrated(layout_of(folder), samples, Need, **how)
    again = stopping(1)
    assert_identical(calibrated(layout_of(folder), samples, Need, **how), first)
    assert again == []


@pytest.mark.parametrize("content", ["{", "{}", '{"format_version": 9, "of": {}, "finished": 1}', "[]"])
def test_damaged_progress(content: str, folder: Path, samples: CalibrationSet, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "progress.json").write_text(content)
    with pytest.raises(RequestError, match=r"(?i)begin anew \(restart=True\)"):
        calibrated(layout_of(folder), samples, {Need.ROUTING}, folder=kept)
    calibrated(layout_of(folder), samples, {Need.ROUTING}, folder=kept, restart=True)


def test_more_finished_than_there_is(folder: Path, samples: CalibrationSet, tmp_path: Path) -> None:
    for streamed in (False, True):
        how = {"stream": streamed, "folder": tmp_path / f"kept_{streamed}"}
        calibrated(layout_of(folder), samples, {Need.ROUTING}, **how)
        progress = json.loads((how["folder"] / "progress.json").read_text())
        for finished in (99, -1, True, "1"):
            (how["folder"] / "progress.json").write_text(json.dumps({**progress, "finished": finished}))
            with pytest.raises(RequestError, match=r"is damaged.*Begin anew \(restart=True\)"):
                calibrated(layout_of(folder), samples, {Need.ROUTING}, **how)


@pytest.mark.parametrize("name", ["layer_00000.safetensors", "states_0.safetensors"])
def test_damaged_unfinished_work(
    name: str, folder: Path, samples: CalibrationSet, tmp_path: Path, stopping: Callable
) -> None:
    kept = tmp_path / "kept"
    stopping(samples.num_batches(3) + 1)
    how = {"batch_size": 3, "stream": True, "folder": kept}
    with pytest.raises(Stopped):
        calibrated(layout_of(folder), samples, {Need.ROUTING}, **how)
    stopping(0)
    (kept / name).write_bytes((kept / name).read_bytes()[:-8])
    with pytest.raises(RequestError, match=f"{name} is damaged"):
        calibrated(layout_of(folder), samples, {Need.ROUTING}, **how)


def test_the_budget_may_change_between_two_tries(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration is of samples and settings; what is chosen from it is another matter."""
    config = MoEPrunerConfig(method="reap", num_experts=4, batch_size=3)
    pruner = MoEPruner.from_pretrained(place / "model", config)
    with monkeypatch.context() as patched:
        patched.setattr(pruner_module, "choose_experts", lambda *_, **__: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            pruner.prune_checkpoint(tmp_path / "out", calibration=place / "texts.jsonl", stream=True)
    assert (tmp_path / ".out.partial" / "calibration" / "progress.json").exists()
    monkeypatch.setattr(Skeleton, "embedded", lambda *_: pytest.fail("began anew"))
    other = MoEPruner.from_pretrained(place / "model", MoEPrunerConfig(method="reap", num_experts=5, batch_size=3))
    other.prune_checkpoint(tmp_path / "out", calibration=place / "texts.jsonl", stream=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
