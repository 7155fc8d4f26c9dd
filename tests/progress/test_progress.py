# SPDX-License-Identifier: Apache-2.0
"""How far work is: lines off a terminal, by a clock of our own, and bars on one."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import pytest

from optimum_moe_prune import progress as module
from optimum_moe_prune.progress import Lines, Work, printed_lines, progress, shows_bars, working
from optimum_moe_prune.progress.pace import Pace, count, duration, rough


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def watched(clock: Clock, *args: object, **settings: object) -> tuple[Work, list[str], Lines]:
    """Work whose lines go into a list."""
    said: list[str] = []
    work = Work(*args, **settings, clock=clock)
    work._shown = lines = Lines(said.append)
    return work, said, lines


def spend(clock: Clock, work: Work, steps: Sequence[float]) -> None:
    for seconds in steps:
        clock.now += seconds
        work.update()


# ------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.1 s"), (0.84, "0.8 s"), (2.0, "2 s"), (9.94, "9.9 s"), (9.96, "10 s"), (31.4, "31 s"), (89.4, "89 s"),
        (90, "2 min"), (540, "9 min"), (59.4 * 60, "59 min"), (59.6 * 60, "1 h"), (80 * 60, "1 h 20 min"),
        (47.9 * 3600, "47 h 54 min"), (51 * 3600, "2 d 3 h"), (72 * 3600, "3 d"),
    ],
)  # fmt: skip
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_numbers_and_units() -> None:
    assert [count(1, "layer"), count(2, "batch"), count(0, "layer")] == ["1 layer", "2 batches", "0 layers"]
    assert [count(9_600_000_000, "B"), count(999, "B"), count(1500, "B")] == ["9.6 GB", "999 B", "1.5 kB"]
    assert [rough(s) for s in (0.2, 18.6, 21, 84)] == [1, 19, 20, 85]


# ------------------------------------------------------------------------------------------- lines


def test_a_line_for_each_long_step(clock: Clock) -> None:
    work, said, lines = watched(clock, "calibrating", 24, "layer", "calibrated")
    clock.now += 2
    work.waiting()
    spend(clock, work, [29, *[31] * 23])
    lines.ended(work, clock.now)
    assert said[0] == "calibrating: 24 layers"
    assert said[7] == "calibrating: layer 7 of 24, 31 s a layer, about 9 min left"
    assert len(said) == 1 + 23 + 1  # the last layer is told by the last line
    assert said[-1] == "calibrated 24 layers in 12 min"
    assert not [line for line in said if "\r" in line or "\n" in line]


def test_short_steps_have_a_line_each_half_minute(clock: Clock) -> None:
    work, said, _ = watched(clock, "evaluating", 1000, "batch")
    spend(clock, work, [0.25] * 480)  # two minutes
    assert said[0] == "evaluating: 1000 batches"
    assert said[1] == "evaluating: batch 116 of 1000, 4 batches a second, about 4 min left"
    assert len(said) == 5


def test_quick_work_says_nothing_or_one_line(clock: Clock) -> None:
    for seconds, lines_said in ((0.1, 0), (0.7, 1)):
        work, said, lines = watched(clock, "calibrating", 10, "batch", "calibrated")
        spend(clock, work, [seconds] * 10)
        lines.ended(work, clock.now)
        assert len(said) == lines_said


def test_a_long_step_is_heard_of(clock: Clock) -> None:
    """A layer that takes minutes has lines inside it, with how far it is, and no line twice."""
    work, said, _ = watched(clock, "calibrating", 3, "layer")
    inner = Work("batches", 10, "batch", clock=clock)
    inner._outer, work.inner = work, inner
    for _ in range(9):
        spend(clock, inner, [20])
    assert said == [
        "calibrating: 3 layers",
        "calibrating: layer 1 of 3 for 80 s (batch 4 of 10), about 9 min left",
        "calibrating: layer 1 of 3 for 2 min (batch 7 of 10), about 8 min left",
    ]
    clock.now += 20
    work.inner = None
    work.update()
    assert said[3:] == ["calibrating: layer 1 of 3, 3 min a layer, about 7 min left"]


def test_what_was_done_before_is_not_counted(clock: Clock) -> None:
    work, said, lines = watched(clock, "calibrating", 24, "layer", "calibrated", begun=20)
    clock.now += 3
    work.waiting()
    spend(clock, work, [57, 60, 60, 60])
    lines.ended(work, clock.now)
    assert said == [
        "calibrating: 24 layers, 20 of them were done before",
        "calibrating: layer 21 of 24, 60 s a layer, about 3 min left",
        "calibrating: layer 22 of 24, 60 s a layer, about 2 min left",
        "calibrating: layer 23 of 24, 60 s a layer, about 60 s left",
        "calibrated 4 layers in 4 min, 24 layers in all",
    ]


def test_bytes_and_work_of_no_known_size(clock: Clock) -> None:
    work, said, lines = watched(clock, "writing the checkpoint", 9_600_000_000, "B", "wrote")
    for _ in range(16):
        clock.now += 2
        work.update(300_000_000)
    lines.ended(work, clock.now)
    assert said == [
        "writing the checkpoint: 9.6 GB",
        "writing the checkpoint: 4.5 GB of 9.6 GB, 150 MB a second, about 35 s left",
        "wrote 4.8 GB in 32 s",
    ]
    work, said, lines = watched(clock, "loading the model", None, did="loaded the model")
    for _ in range(30):
        clock.now += 5
        work.waiting()
    lines.ended(work, clock.now)
    assert said == [
        "loading the model",
        "loading the model: 65 s so far",
        "loading the model: 2 min so far",
        "loaded the model in 2 min",
    ]


# ------------------------------------------------------------------------------------------- estimates


def test_the_first_step_warms_up() -> None:
    pace = Pace(0.0, 0, 10)
    pace.finished(1, 100.0)
    assert pace.seconds == 100 and pace.left(100.0) == 900
    pace.finished(2, 110.0)
    assert pace.seconds == 10 and pace.left(110.0) == 80


def test_the_pace_is_a_recent_one() -> None:
    pace, now = Pace(0.0, 0, 100), 0.0
    for step in range(1, 61):
        now += 1 if step <= 30 else 20
        pace.finished(step, now)
    assert pace.seconds == 20 and pace.left(now) == 40 * 20


def test_costs_weigh_what_is_left() -> None:
    costs = [8, 8, 8, 4, 2, 2]  # longest first
    pace, now = Pace(0.0, 0, 6, costs), 0.0
    for step, cost in enumerate(costs[:3], 1):
        now += cost
        pace.finished(step, now)
    assert pace.left(now) == pytest.approx(8)
    assert pace.left(now + 3) == pytest.approx(5)  # of the step at work, a part is over
    assert pace.share() == pytest.approx(24 / 32) and pace.share(0.5) == pytest.approx(26 / 32)


def test_nothing_is_said_of_what_is_not_known() -> None:
    pace = Pace(0.0, 5, 10)
    assert pace.seconds is None and pace.left(60.0) is None
    assert pace.left(60.0, inside=0.25) == pytest.approx(180 + 4 * 240)
    assert Pace(0.0, 0, 0).share() == 1.0


# ------------------------------------------------------------------------------------------- where it is shown


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Clock:
    """A clock of our own for work off a terminal, and no thread that looks at it."""
    monkeypatch.setattr(Work.__init__, "__kwdefaults__", None)
    monkeypatch.setattr(Work.__init__, "__defaults__", ("step", None, 0, None, clock))
    monkeypatch.setattr(module, "_POLL_SECONDS", 3600.0)
    monkeypatch.setattr(module, "shows_bars", lambda: False)
    return clock


@pytest.fixture
def said(ticking: Clock) -> Iterator[io.StringIO]:
    """What is printed."""
    stream = io.StringIO()
    with printed_lines(stream):
        yield stream


def test_work_inside_work_has_no_lines_of_its_own(said: io.StringIO, clock: Clock) -> None:
    with working("choosing", 2, "number", "chose") as outer:
        for _ in outer.over(range(2)):
            with working("choosing (mosaic)", 3, "layer", "did") as inner:
                for _ in inner.over(range(3)):
                    for _ in progress(range(4), "trying sets", unit="set"):
                        clock.now += 10
    assert said.getvalue().splitlines() == [
        "choosing: 2 numbers",
        "choosing: number 1 of 2 for 70 s (layer 2 of 3, set 3 of 4), about 3 min left",
        "choosing: number 1 of 2, 2 min a number, about 2 min left",
        "choosing: number 2 of 2 for 60 s (layer 2 of 3, set 2 of 4), 2 min a number, about 60 s left",
        "choosing: number 2 of 2 for 2 min (layer 3 of 3, set 4 of 4), 2 min a number, about 1 s left",
        "chose 2 numbers in 4 min",
    ]


def test_an_error_ends_it_without_a_word(said: io.StringIO, clock: Clock) -> None:
    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt), working("calibrating", 3, "layer", "calibrated") as work:
        for _ in work.over(range(3)):
            clock.now += 40
            if work.done == 1:
                raise KeyboardInterrupt
    assert said.getvalue() == "calibrating: 3 layers\n" and threading.active_count() == threads
    with working("evaluating", 2, "batch", "evaluated") as work:  # nothing is left of it: this stands alone
        for _ in work.over(range(2)):
            clock.now += 40
    assert said.getvalue().endswith("evaluating: 2 batches\nevaluated 2 batches in 80 s\n")


def test_what_another_process_shows_is_not_shown(said: io.StringIO, clock: Clock) -> None:
    with module.unseen(), working("calibrating", 3, "layer", "calibrated") as work:
        for _ in work.over(range(3)):
            for _ in progress(range(4), "batches", unit="batch"):
                clock.now += 40
    assert said.getvalue() == ""
    for _ in progress(range(4), "batches", unit="batch"):  # seen again
        clock.now += 40
    assert said.getvalue() != ""


def test_a_thread_looks_while_a_step_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "shows_bars", lambda: False)
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.0)
    stream, spoke = io.StringIO(), threading.Event()
    monkeypatch.setattr(stream, "flush", spoke.set, raising=False)
    with printed_lines(stream), working("calibrating", 3, "layer"):
        assert spoke.wait(60)
    assert stream.getvalue() == "calibrating: 3 layers\n"


def test_a_program_hears_of_it_where_it_logs(caplog: pytest.LogCaptureFixture, ticking: Clock) -> None:
    with caplog.at_level(logging.WARNING), working("calibrating", 3, "layer") as work:
        spend(ticking, work, [20] * 3)
    assert not caplog.messages
    with caplog.at_level(logging.INFO, "optimum_moe_prune"), working("calibrating", 3, "layer") as work:
        spend(ticking, work, [20] * 3)
    assert caplog.messages == ["calibrating: 3 layers", "calibrating: done, 3 layers in 60 s"]


def test_printing_is_undone() -> None:
    log = logging.getLogger("optimum_moe_prune.progress")
    before = (log.level, log.propagate, list(log.handlers))
    with printed_lines(io.StringIO()):
        pass
    assert (log.level, log.propagate, list(log.handlers)) == before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Terminal]:
    def begin(**environment: str) -> Terminal:
        for name in ("CI", "TERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stderr", stream := Terminal())
        return stream

    return begin


def test_where_a_person_looks_on(terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    for environment, shown in (({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"CI": "true"}, False)):
        terminal(**environment)
        assert shows_bars() is shown
    terminal(TERM="xterm")
    with module.unseen():
        assert not shows_bars()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not shows_bars()
    monkeypatch.setattr(sys, "stderr", None)
    assert not shows_bars()
    kernel = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: kernel))
    assert shows_bars()
    kernel.config = {}  # IPython on a terminal
    assert not shows_bars()


def test_a_terminal_has_a_bar_that_begins_where_work_does(
    terminal: Callable[..., Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = terminal(TERM="xterm")
    monkeypatch.setattr(module, "FIRST_SECONDS", 0.0)
    with printed_lines(stream), working("calibrating", 24, "layer", "calibrated", begun=7) as work:
        with working("batches", 3, "batch") as inner:
            inner.update()
        work.update()
    bars = stream.getvalue().split("\r")
    assert re.search(r"calibrating: +29%.* 7/24 ", bars[1]) and re.search(r" 8/24 ", bars[-1])
    assert "batches" not in stream.getvalue() and "calibrated" not in stream.getvalue()
