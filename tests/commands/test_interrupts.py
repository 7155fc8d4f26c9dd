# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, SIGTERM and SIGHUP: one line that says what is kept, the exit code, and folders as they were."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_texts, save_checkpoint
from optimum.commands.base import CommandInfo

from optimum_moe_prune import MoEPruner, MoEPrunerConfig
from optimum_moe_prune.calibration.observer import LayerObserver
from optimum_moe_prune.commands import main
from optimum_moe_prune.commands import publishing as publishing_module
from optimum_moe_prune.commands.base import Command, execute
from optimum_moe_prune.commands.interrupts import Interrupted, raised_signals
from optimum_moe_prune.errors import RequestError, RunError
from optimum_moe_prune.publishing import outputs
from optimum_moe_prune.storage.growing import Store
from optimum_moe_prune.surgery import files as surgery_files

CODES = [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "interrupted by SIGTERM")]
CODES += [("SIGHUP", 129, "interrupted by SIGHUP")] if hasattr(signal, "SIGHUP") else []
ON = "the same command continues, --restart begins anew"


def arguments(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"debug": False, "json": False, **values})


def command(work: Callable[[argparse.Namespace], Any]) -> type[Command]:
    names = {"work": staticmethod(work), "parse_args": staticmethod(lambda parser: None)}
    return type("Made", (Command,), {"COMMAND": CommandInfo("made", "for a test"), **names})


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(args)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def keep(folder: Path, finished: int, steps: int = 24, what: str = "calibration") -> None:
    store = Store(folder, what=what)
    store.check_steps(steps, "layer")
    store.commit(finished)


@pytest.mark.parametrize(("name", "code", "said"), CODES)
def test_a_signal_is_one_line_and_its_code(
    name: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(getattr(signal, n)) for n, *_ in CODES]

    def work(args: argparse.Namespace) -> Any:
        keep(tmp_path / ".OUT.partial" / "calibration", 7)
        signal.raise_signal(getattr(signal, name))
        pytest.fail("went on")

    assert execute(command(work), arguments(output="OUT", restart=False)) == code
    kept = "7 of 24 layers of the calibration are kept in .OUT.partial"
    assert capsys.readouterr() == ("", f"{said}: {kept}; {ON}\n")
    assert [signal.getsignal(getattr(signal, n)) for n, *_ in CODES] == before


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ({"output": "OUT", "restart": False}, ", and nothing is left of OUT"),
        ({"output": "OUT"}, ", and nothing is left of OUT"),
        ({"output": None}, ""),
        ({}, ""),
        ({"output": "\0", "restart": True}, ", and nothing is left of \0"),
    ],
)
def test_where_nothing_is_kept(
    values: dict[str, Any], left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if "restart" not in values:  # another command's
        keep(tmp_path / ".OUT.partial" / "calibration", 7)

    def work(args: argparse.Namespace) -> Any:
        raise KeyboardInterrupt

    assert execute(command(work), arguments(**values)) == 130
    assert capsys.readouterr().err == f"interrupted: nothing was finished{left}; the same command begins anew\n"


def test_an_error_after_hours_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(args: argparse.Namespace) -> Any:
        keep(tmp_path / ".OUT.partial" / "calibration", 24)
        raise RunError("the disk is full.")

    def wrong(args: argparse.Namespace) -> Any:
        raise RequestError("no such method.")

    args = arguments(output="OUT", restart=False)
    whole = "the whole calibration (24 layers) is kept in .OUT.partial"
    assert execute(command(full), args) == 1
    assert capsys.readouterr().err == f"error: the disk is full. T{whole[1:]}; {ON}.\n"
    assert execute(command(wrong), args) == 2  # which has nothing to do with it
    assert capsys.readouterr().err == "error: no such method.\n"


def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    """Under ``nohup`` the terminal's end is no end."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with raised_signals():
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_nothing_is_done_outside_the_main_thread() -> None:
    found: list[Any] = []

    def look() -> None:
        with raised_signals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]


def test_a_second_signal_ends_the_process() -> None:
    with pytest.raises(Interrupted), raised_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


# ------------------------------------------------------------------------------------------- commands at work


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_checkpoint("mixtral", folder / "model", tokenizer)
    (folder / "c.jsonl").write_text("\n".join(map(json.dumps, make_texts(10))))
    return folder


def asked(place: Path, name: str, *more: str) -> list[str]:
    flags = ["--model", str(place / "model"), "--calibration", str(place / "c.jsonl"), "--batch-size", "4", "--stream"]
    budget = ["--method", "reap", "--num-experts", "4"] if name == "run" else []
    return [name, *flags, *budget, *more]


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, name: str) -> None:
    """A signal while a layer's experts are observed for the given time."""
    forward, seen = LayerObserver.experts_forward, []

    def observed(self: LayerObserver, *args: Any) -> Any:
        seen.append(self.block.layer)
        if len(seen) == number:
            signal.raise_signal(getattr(signal, name))
        return forward(self, *args)

    monkeypatch.setattr(LayerObserver, "experts_forward", observed)


def test_a_calibration_stops_continues_and_names_what_was_changed(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    partial = tmp_path / ".OUT.partial" / "calibration"
    with monkeypatch.context() as patched:
        stop_at(patched, 1, "SIGTERM")
        code, out, err = call(capsys, *asked(place, "score", "OUT"))
    said = "nothing was finished, and nothing is left of OUT; the same command begins anew"
    assert (code, out) == (143, "") and err.splitlines()[-1] == f"interrupted by SIGTERM: {said}"
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patched:
        stop_at(patched, 2 * 3 + 1, "SIGINT")
        code, out, err = call(capsys, *asked(place, "score", "OUT", "--json"))
    assert (code, out) == (130, "") and "Traceback" not in err
    kept = "2 of 3 layers of the calibration are kept in .OUT.partial"
    assert err.splitlines()[-1] == f"interrupted: {kept}; {ON}"
    for more, said in (
        (["--num-samples", "5"], "num_samples is 128 there and 5 now"),
        (["--sample-selection", "random", "--num-samples", "5"], "sample_selection is first there and random now"),
        (["--method", "reap"], "method is all there and reap now"),
        (["--max-tokens", "99"], "max_tokens is 8192 there and 99 now"),
    ):
        code, _, err = call(capsys, *asked(place, "score", "OUT", *more))
        flagged = said.replace(said.split()[0], f"--{said.split()[0].replace('_', '-')}", 1)
        assert code == 2 and (said in err or flagged in err) and "(--restart)" in err
    texts = (place / "c.jsonl").read_text()
    (place / "c.jsonl").write_text(texts.replace("w1", "w2"))
    code, _, err = call(capsys, *asked(place, "score", "OUT"))
    assert code == 2 and "something else: the calibration texts differ (c.jsonl changed). Run" in err
    (place / "c.jsonl").write_text(texts)
    assert call(capsys, *asked(place, "score", "OUT"))[0] == 0
    assert f"continuing the unfinished calibration in {partial}: 2 of 3 layers are done." in caplog.messages
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


def test_an_interrupt_while_writing_keeps_the_calibration(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = "the whole calibration (3 layers) is kept in .OUT.partial"

    def raising(*args: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(surgery_files, "_write_file", raising)
        code, _, err = call(capsys, *asked(place, "run", "OUT"))
    assert code == 130 and err.splitlines()[-1] == f"interrupted: {whole}, and nothing else; {ON}"
    assert [path.name for path in tmp_path.iterdir()] == [".OUT.partial"]
    (tmp_path / ".OUT.partial" / "calibration" / "progress.json").rename(tmp_path / "aside")
    with monkeypatch.context() as patched:
        patched.setattr(surgery_files, "_write_file", full)
        code, _, err = call(capsys, *asked(place, "run", "OUT"))
    assert code == 1 and err.splitlines()[-1].endswith(f"T{whole[1:]}; {ON}.")
    stop_at(monkeypatch, 1, "SIGINT")  # nothing is observed again
    assert call(capsys, *asked(place, "run", "OUT"))[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["OUT", "aside"]


def test_an_interrupt_after_the_checkpoint_says_that_it_is_there(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(*args: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(publishing_module, "_finish", raising)
    code, _, err = call(capsys, *asked(place, "run", str(tmp_path / "OUT")))
    assert code == 143 and (tmp_path / "OUT" / "config.json").is_file()
    assert err.splitlines()[-1].startswith(
        f"interrupted by SIGTERM: the pruned checkpoint is written in {tmp_path}/OUT"
    )


def test_in_python_an_interrupt_passes_through(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MoEPrunerConfig(method="reap", num_experts=4, batch_size=4)
    pruner = MoEPruner.from_pretrained(place / "model", config)

    def raising(*args: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(outputs, "pruned_checkpoint", raising)
        with pytest.raises(KeyboardInterrupt) as caught:
            pruner.prune_checkpoint(tmp_path / "out", calibration=place / "c.jsonl", stream=True)
    assert type(caught.value) is KeyboardInterrupt
    stop_at(monkeypatch, 1, "SIGINT")
    pruner.prune_checkpoint(tmp_path / "out", calibration=place / "c.jsonl", stream=True)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_process_ends_by_signals() -> None:
    """The first unwinds, a second ends it at once."""
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "unwinding\n"
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT
    process.stdout.close()


STUBBORN = """
import time
from optimum_moe_prune.commands.interrupts import raised_signals
with raised_signals():
    try:
        print("at work", flush=True)
        time.sleep(600)
    finally:
        print("unwinding", flush=True)
        time.sleep(600)
"""
