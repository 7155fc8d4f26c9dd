# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, and the signals by which schedulers and terminals end a process: work unwinds, and says what is kept."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..storage.kept import Kept, kept_beside, kept_sentence

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal that ends the process, raised where it was at work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def raised_signals(ends_at_once: bool = True) -> Iterator[None]:
    """Raise the first signal as :class:`Interrupted` inside a ``with``; a second one ends the process at once.

    Signals that are ignored (``nohup``, a job in the background) stay so. Nothing is done outside the main thread.

    Args:
        ends_at_once: Whether a second one does; a launcher passes on what the terminal had sent to all already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    ours = [n for n, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]

    def raised(number: int, frame: Any) -> None:
        for other in ours:
            signal.signal(other, signal.SIG_DFL if ends_at_once else signal.SIG_IGN)
        raise Interrupted(number)

    for number in ours:
        signal.signal(number, raised)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


def exit_code(error: KeyboardInterrupt) -> int:
    """What a shell says of a process that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def said_of(error: KeyboardInterrupt, args: argparse.Namespace, cause: str | None = None) -> str:
    """One line: what is kept, and how it goes on; or what the interruption says itself.

    Args:
        error: The interruption.
        args: The command's.
        cause: Why it was interrupted, where that is known.
    """
    number = error.number if isinstance(error, Interrupted) else signal.SIGINT
    began = "interrupted" if number == signal.SIGINT else f"interrupted by {signal.Signals(number).name}"
    began = cause or began
    if str(error):
        return f"{began}: {error}"
    kept = kept_of(args)
    if kept:
        alone = ", and nothing else" if all(part.is_whole for part in kept) else ""
        return f"{began}: {kept_sentence(kept, args.output)}{alone}; {GOES_ON}"
    left = f", and nothing is left of {args.output}" if _is_absent(args) else ""
    return f"{began}: nothing was finished{left}; the same command begins anew"


GOES_ON = "the same command continues, --restart begins anew"


def kept_of(args: argparse.Namespace) -> list[Kept]:
    """What is kept of a command's unfinished work; of one that keeps none, nothing."""
    if not hasattr(args, "restart") or not getattr(args, "output", None):
        return []
    try:
        return kept_beside(args.output)
    except (OSError, ValueError):  # a name that can be no folder's
        return []


def _is_absent(args: argparse.Namespace) -> bool:
    output = getattr(args, "output", None)
    if not output:
        return False
    try:
        return not Path(output).exists()
    except (OSError, ValueError):  # a name that can be no folder's
        return True
