# SPDX-License-Identifier: Apache-2.0
"""How fast work goes, how long the rest of it takes, and both in words."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate

_PACE_SECONDS = 60.0
_PACE_MARKS = 9


def duration(seconds: float) -> str:
    """A time for people: ``45 s``, ``9 min``, ``1 h 20 min``, ``2 d 3 h``."""
    if seconds < 9.95:
        return f"{max(seconds, 0.1):.1f}".removesuffix(".0") + " s"
    if seconds < 89.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min".removesuffix(" 0 min")
    hours = round(minutes / 60)
    return f"{hours // 24} d {hours % 24} h".removesuffix(" 0 h")


def rough(seconds: float) -> float:
    """A time that is only known roughly: whole seconds, or fives of them."""
    return max(1.0, float(round(seconds) if seconds < 20 else 5 * round(seconds / 5)))


def count(number: int, unit: str) -> str:
    """``1 layer``, ``3 batches``; bytes as ``9.6 GB``."""
    if unit == "B":
        return size(number)
    return f"{number} {unit if number == 1 else plural(unit)}"


def plural(unit: str) -> str:
    """``layers``, ``batches``."""
    return f"{unit}es" if unit.endswith(("ch", "s", "x")) else f"{unit}s"


def size(number: float) -> str:
    """Bytes for people: ``9.6 GB``."""
    scale, name = next((s, n) for s, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if number >= s or s == 1)
    return f"{number / scale:.3g} {name}"


class Pace:
    """How fast steps are finished, lately, and how long the others take.

    Only what this process did counts, of it the last minute (or eight steps), and not the first step once there are
    others: files are cached and memory is taken there.

    Args:
        now: When the work begins.
        done: Steps that were finished before.
        total: All steps.
        costs: What each step costs, in any unit; by default all the same.
    """

    def __init__(self, now: float, done: int, total: int, costs: Sequence[float] | None = None) -> None:
        self._total = total
        self._costs = None if costs is None else [0.0, *accumulate(costs)]
        self._marks = deque([(now, done)])
        self._is_warm = False

    def finished(self, done: int, now: float) -> None:
        """So many steps are finished now."""
        marks = self._marks
        if len(marks) > 1 and now - marks[-2][0] < 1:  # many steps in a second are one mark
            marks[-1] = (now, done)
        else:
            marks.append((now, done))
        if not self._is_warm and len(marks) > 2:
            marks.popleft()
            self._is_warm = True
        while len(marks) > _PACE_MARKS and now - marks[1][0] > _PACE_SECONDS:
            marks.popleft()

    def since(self, now: float) -> float:
        """Seconds since the last step was finished."""
        return now - self._marks[-1][0]

    @property
    def seconds(self) -> float | None:
        """What a step takes lately; None before the first is finished."""
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        return (ended - began) / (last - first) if last > first else None

    def left(self, now: float, inside: float = 0.0) -> float | None:
        """Seconds until all is done; None where nothing can be said yet.

        Args:
            now: When that is asked.
            inside: How much of the step at work is done, from 0 to 1, as far as that is known.
        """
        (began, first), (ended, last) = self._marks[0], self._marks[-1]
        waited, step = now - ended, self._cost(last + 1) - self._cost(last)
        spent = self._cost(last) - self._cost(first)
        if spent > 0:
            each = (ended - began) / spent
        elif inside > 0.02 and step > 0:
            each = waited / (inside * step)
        else:
            return None
        of_step = waited / inside * (1 - inside) if inside > 0.1 else max(each * step - waited, 0.0)
        return of_step + each * (self._cost(self._total) - self._cost(min(last + 1, self._total)))

    def share(self, inside: float = 0.0) -> float:
        """How much of all is done, from 0 to 1, and of the step at work."""
        last, whole = self._marks[-1][1], self._cost(self._total)
        done = self._cost(last) + inside * (self._cost(last + 1) - self._cost(last))
        return min(1.0, done / whole) if whole else 1.0

    def _cost(self, steps: int) -> float:
        steps = min(steps, self._total)
        return float(steps) if self._costs is None else self._costs[steps]
