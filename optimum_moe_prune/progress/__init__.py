# SPDX-License-Identifier: Apache-2.0
"""How far work is: a bar where a person looks on, and plain lines elsewhere.

On a terminal and in a notebook there is a bar after two seconds. Elsewhere (standard error in a file, ``nohup``, a
batch queue, continuous integration, ``TERM=dumb``) the logger ``optimum_moe_prune.progress`` gets plain lines at level
INFO, about every half minute or step, whichever takes longer::

    calibrating: 24 layers
    calibrating: layer 7 of 24, 31 s a layer, about 9 min left
    calibrated 24 layers in 12 min

The command line prints them on standard error. In a program they appear where logging is set to INFO. What takes less
than two seconds says nothing; work inside other work speaks in its lines: ``layer 8 of 24 for 2 min (batch 3 of 16)``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextvars import ContextVar
from typing import Any, TypeVar

from .pace import Pace, count, duration, plural, rough, size

logger = logging.getLogger(__name__)

T = TypeVar("T")
Clock = Callable[[], float]

FIRST_SECONDS = 2.0
"""What takes less is quick, and shows nothing."""
LINE_SECONDS = 27.0
"""Between two lines, where steps are short; a step of half a minute has a line of its own."""
WAITING_SECONDS = 60.0
"""Between two lines inside a step."""
LAST_SECONDS = 10.0
"""What takes less has no line that says that it is done."""

_POLL_SECONDS = 5.0


class Work:
    """Work that goes on; made by :func:`working`.

    Args:
        doing: What is being done.
        total: How many steps there are; None where that is not known.
        unit: What a step is; ``"B"`` for bytes.
        did: What was done, at the end.
        begun: Steps that an earlier run finished.
        costs: What each step costs, where they differ.
        clock: The time, in seconds.

    Attributes:
        done: Steps that are finished.
        inner: Work inside the step at work.
    """

    def __init__(
        self,
        doing: str,
        total: int | None,
        unit: str = "step",
        did: str | None = None,
        begun: int = 0,
        costs: Sequence[float] | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.doing, self.total, self.unit, self.did = doing, total, unit, did
        self.begun = self.done = begun
        self.inner: Work | None = None
        self.clock = clock
        self.began = clock()
        self._pace = Pace(self.began, begun, sys.maxsize if total is None else total, costs)
        self._outer: Work | None = None
        self._shown: Lines | _Bar | None = None

    def update(self, steps: int = 1) -> None:
        """So many more steps are finished."""
        now = self.clock()
        self.done += steps
        self._pace.finished(self.done, now)
        if self._shown is not None:
            self._shown.stepped(self, now)
        elif self._outer is not None:
            self._outer.waiting()

    def over(self, items: Iterable[T], steps: Callable[[T], int] = lambda item: 1) -> Iterator[T]:
        """Go through items, each of which is a step, or so many."""
        for item in items:
            yield item
            self.update(steps(item))

    def waiting(self) -> None:
        """Say that a step is still at work, where that is due."""
        if self._shown is not None:
            self._shown.waited(self, self.clock())
        elif self._outer is not None:
            self._outer.waiting()

    # -- in words

    @property
    def fraction(self) -> float:
        """How much is done, from 0 to 1."""
        return self._pace.share(self._inside) if self.total else 0.0

    @property
    def _inside(self) -> float:
        return 0.0 if self.inner is None else self.inner.fraction

    def opening(self) -> str:
        """The first line."""
        if self.total is None:
            return self.doing
        before = f", {self.begun} of them were done before" if self.begun else ""
        return f"{self.doing}: {count(self.total, self.unit)}{before}"

    def line(self, now: float, is_waiting: bool = False) -> str:
        """How far it is."""
        if self.total is None:
            counted = f"{count(self.done, self.unit)} in " if self.done else ""
            return f"{self.doing}: {counted}{duration(now - self.began)} so far"
        parts = [self.position(now if is_waiting else None)]
        if (seconds := self._pace.seconds) is not None:
            parts.append(self._rate(seconds))
        left = self._pace.left(now, self._inside)
        if left is not None and self.done < self.total:
            parts.append(f"about {duration(rough(left))} left")
        return f"{self.doing}: {', '.join(parts)}"

    def position(self, waiting: float | None = None) -> str:
        """The step that was finished last, or, at a time of waiting, the one at work."""
        if self.total is None:
            return count(self.done, self.unit) if self.done else self.doing
        if self.unit == "B":
            return f"{size(self.done)} of {size(self.total)}"
        if waiting is None or self.done >= self.total:
            return f"{self.unit} {self.done} of {self.total}"
        inside = f" ({self.inner.inside()})" if self.inner is not None and self.inner.inside() else ""
        return f"{self.unit} {self.done + 1} of {self.total} for {duration(self._pace.since(waiting))}{inside}"

    def inside(self) -> str:
        """How far it is, for the line of the work it is in; empty where it has only begun."""
        deeper = "" if self.inner is None else self.inner.inside()
        if deeper and self.total is not None and self.unit != "B":
            return f"{self.unit} {self.done + 1} of {self.total}, {deeper}"
        return deeper or (self.position() if self.done else "")

    def ending(self, now: float) -> str:
        """The last line."""
        took = duration(now - self.began)
        did = self.did or f"{self.doing}: done,"
        if self.total is None:
            return f"{self.did or self.doing + ': done'} in {took}"
        if self.begun:
            here = count(self.done - self.begun, self.unit)
            return f"{did} {here} in {took}, {count(self.done, self.unit)} in all"
        return f"{did} {count(self.done, self.unit)} in {took}"

    def _rate(self, seconds: float) -> str:
        if self.unit == "B":
            return f"{size(1 / max(seconds, 1e-12))} a second"
        if seconds >= 1:
            return f"{duration(seconds)} {'an' if self.unit[0] in 'aeiou' else 'a'} {self.unit}"
        return f"{1 / max(seconds, 1e-6):.3g} {plural(self.unit)} a second"


class Lines:
    """Plain lines about work.

    Args:
        say: What takes a line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last: float | None = None  # when a line was said
        self._lock = threading.Lock()

    def stepped(self, work: Work, now: float) -> None:
        """A step is finished."""
        if work.done != work.total:  # that is for the last line
            self._line(work, now, LINE_SECONDS, is_waiting=False)

    def waited(self, work: Work, now: float) -> None:
        """A step is at work."""
        self._line(work, now, WAITING_SECONDS, is_waiting=True)

    def ended(self, work: Work, now: float) -> None:
        """All is done."""
        if self._last is not None and now - work.began >= LAST_SECONDS:
            self._say(work.ending(now))

    def _line(self, work: Work, now: float, after: float, is_waiting: bool) -> None:
        with self._lock:  # steps come from one thread, and waiting is seen by another
            opens = self._last is None
            if now - (work.began if self._last is None else self._last) >= (FIRST_SECONDS if opens else after):
                self._last = now
                self._say(work.opening() if opens else work.line(now, is_waiting))


class _Bar:
    """A bar about work."""

    def __init__(self, work: Work) -> None:
        if is_notebook():
            from tqdm.auto import tqdm
        else:
            from tqdm import tqdm
        scaled = {"unit_scale": True} if work.unit == "B" else {}
        self._bar = tqdm(
            total=work.total, initial=work.begun, desc=work.doing, unit=work.unit, delay=FIRST_SECONDS, **scaled
        )
        self._last = work.began

    def stepped(self, work: Work, now: float) -> None:
        self._bar.set_postfix_str("", refresh=False)
        self._bar.update(work.done - self._bar.n)

    def waited(self, work: Work, now: float) -> None:
        """Show how far a step is, about once in a second."""
        if now - work.began >= FIRST_SECONDS and now - self._last >= 1:
            self._last = now
            self._bar.set_postfix_str("" if work.inner is None else work.inner.inside())

    def close(self) -> None:
        self._bar.close()


_CURRENT: ContextVar[Work | None] = ContextVar("work", default=None)  # what goes on, inside its ``with``
_UNSEEN: ContextVar[bool] = ContextVar("unseen", default=False)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Show nothing of what goes on inside a ``with``: another process does."""
    token = _UNSEEN.set(True)
    try:
        yield
    finally:
        _UNSEEN.reset(token)


@contextlib.contextmanager
def working(
    doing: str,
    total: int | None,
    unit: str = "step",
    did: str | None = None,
    *,
    begun: int = 0,
    costs: Sequence[float] | None = None,
) -> Iterator[Work]:
    """Show how far work is, inside a ``with``.

    Args:
        doing: What is being done, as ``"calibrating"``.
        total: How many steps there are; None where that is not known: then there are lines and no bar.
        unit: What a step is, as ``"layer"``; ``"B"`` for bytes.
        did: What was done, before its number, as ``"calibrated"``.
        begun: Steps that an earlier run finished; they are not counted in how long the others will take.
        costs: What each step costs, in any unit, where some take longer than others.

    Yields:
        The work, whose ``update`` says that steps are finished.
    """
    work = Work(doing, total, unit, did, begun, costs)
    with _shown(work), contextlib.ExitStack() as stack:
        token = _CURRENT.set(work)
        stack.callback(_CURRENT.reset, token)
        if isinstance(work._shown, Lines):
            stack.enter_context(_watched(work))
        yield work


def progress(
    items: Iterable[T],
    doing: str,
    total: int | None = None,
    unit: str = "item",
    *,
    costs: Sequence[float] | None = None,
) -> Iterator[T]:
    """Iterate over items, each of which is a short step, and show how far that is.

    Args:
        items: What to iterate over.
        doing: What is being done.
        total: The number of items, where ``items`` cannot tell.
        unit: What one item is.
        costs: As for :func:`working`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    work = Work(doing, total, unit, costs=costs)
    with _shown(work):  # not what goes on: a loop that is left by an error ends nobody knows when
        yield from work.over(items)


@contextlib.contextmanager
def _shown(work: Work) -> Iterator[None]:
    """Show work by a bar, by lines, or in the line of the work that it is in."""
    outer = _CURRENT.get()
    if outer is not None:
        before, outer.inner, work._outer = outer.inner, work, outer
        try:
            yield
        finally:
            outer.inner = before
    elif _UNSEEN.get():
        yield
    elif not shows_bars():
        lines = work._shown = Lines(logger.info)
        yield
        lines.ended(work, work.clock())
    elif work.total is not None:
        bar = work._shown = _Bar(work)
        try:
            yield
        finally:
            bar.close()
    else:
        yield


@contextlib.contextmanager
def _watched(work: Work) -> Iterator[None]:
    """Have a thread look whether a line is due while a step is at work."""
    if not logger.isEnabledFor(logging.INFO):
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        wait = FIRST_SECONDS
        while not ended.wait(wait):
            work.waiting()
            wait = _POLL_SECONDS

    thread = threading.Thread(target=watch, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def say(line: str) -> None:
    """One line about work that begins, where lines of progress go."""
    logger.info("%s", line)


def shows_bars() -> bool:
    """Whether a person looks on, in a notebook or on a terminal that can draw."""
    if _UNSEEN.get():
        return False
    if is_notebook():
        return True
    draws = os.environ.get("TERM") != "dumb" and not os.environ.get("CI")
    return draws and sys.stderr is not None and sys.stderr.isatty()


def is_notebook() -> bool:
    """Whether this is a notebook, which draws bars though its output is no terminal."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


@contextlib.contextmanager
def printed_lines(stream: Any) -> Iterator[None]:
    """Print lines of progress to a stream inside a ``with``, whatever logging is set to and that stream becomes."""
    handler = logging.StreamHandler(stream)
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # said once
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
