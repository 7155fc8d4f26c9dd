# SPDX-License-Identifier: Apache-2.0
"""What other libraries say while a command runs: nothing, unless it is an error or ``--debug`` was asked for."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from ..errors import RequestError
from ..processes import Processes

_VERBOSITY = {
    "TRANSFORMERS_VERBOSITY": "transformers",
    "HF_HUB_VERBOSITY": "huggingface_hub",
    "DATASETS_VERBOSITY": "datasets",
}
"""How much each library says, if it is imported later, and its logger, if it was imported before."""
_AT_IMPORT = ("torchao", "torch.utils._pytree", "accelerate", "py.warnings")
"""Loggers of those that say something already when they are imported, and cannot be told otherwise."""
_OURS = logging.getLogger(__name__.partition(".")[0])


@contextlib.contextmanager
def quiet_libraries(debug: bool, bars: bool = True, voice: Voice | None = None) -> Iterator[None]:
    """Inside, warnings of this package are lines on standard error, and those of others are not shown.

    Whoever asked for them (``TRANSFORMERS_VERBOSITY``, ``python -W``) gets them.

    Args:
        debug: Show everything, this package's details too.
        bars: Whether they may show progress bars.
        voice: Of one of several processes.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_own_lines(logging.INFO if debug else logging.WARNING, voice))
        if not bars:
            _without_bars(stack)
        if not debug:
            for name in _AT_IMPORT:
                stack.enter_context(_level(logging.getLogger(name), logging.ERROR))
            for variable, name in _VERBOSITY.items():
                if _set(variable, "error", stack):
                    stack.enter_context(_level(logging.getLogger(name), logging.ERROR))
            if not sys.warnoptions and not any(action == "error" for action, *_ in warnings.filters):
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
        yield


def _without_bars(stack: contextlib.ExitStack) -> None:
    if "transformers" in sys.modules:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    else:  # read when it is imported
        _set("HF_HUB_DISABLE_PROGRESS_BARS", "1", stack)


def _set(variable: str, value: str, stack: contextlib.ExitStack) -> bool:
    """Set a variable of the environment that is not set, until the stack is unwound; whether it was not."""
    if variable in os.environ:
        return False
    os.environ[variable] = value
    stack.callback(os.environ.pop, variable, None)
    return True


@contextlib.contextmanager
def _level(logger: logging.Logger, level: int) -> Iterator[None]:
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _own_lines(level: int, voice: Voice | None = None) -> Iterator[None]:
    """This package's log on standard error, unless the program has a log of its own."""
    if logging.getLogger().handlers or sys.stderr is None:
        yield
        return
    handler = logging.StreamHandler(sys.stderr) if voice is None else voice
    handler.setFormatter(_OneLine("%(levelname)s: %(message)s"))
    before = _OURS.propagate
    _OURS.addHandler(handler)
    _OURS.propagate = False
    try:
        with _level(_OURS, level):
            yield
    finally:
        _OURS.removeHandler(handler)
        _OURS.propagate = before


class Voice(logging.StreamHandler[Any]):
    """What one of several processes says: the main one its lines, and in the end what it has not said of the others'.

    Args:
        processes: Which of them this is.
    """

    def __init__(self, processes: Processes) -> None:
        super().__init__(sys.stderr)
        self._processes = processes
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        from ..processes.meeting import leave_word

        self._lines.append(self.format(record))
        if self._processes.is_main:
            super().emit(record)
        else:
            leave_word(self._processes, self._lines)

    def of_others(self) -> list[str]:
        """The lines of the other processes that the main one has not said, each with the number of its process."""
        from ..processes.meeting import words

        said = set(self._lines)
        found = []
        for rank, lines in words(self._processes).items() if self._processes.is_main else ():
            for line in lines:
                if line not in said:
                    level, _, message = line.partition(": ")
                    found.append(f"{level}: process {rank} of {self._processes.count}: {message}")
                    said.add(line)
        return found


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Inside, warnings wait until all is checked: a request that is refused is told that, in one line, and no more."""
    waiting: dict[int, logging.LogRecord] = {}

    def wait(record: logging.LogRecord) -> bool:
        waiting[id(record)] = record
        return False

    handlers = list(_OURS.handlers)
    for handler in handlers:
        handler.addFilter(wait)
    refused = False
    try:
        yield
    except RequestError:
        refused = True
        raise
    finally:
        for handler in handlers:
            handler.removeFilter(wait)
            for record in () if refused else waiting.values():
                handler.handle(record)


class _OneLine(logging.Formatter):
    """``warning: ...``"""

    def format(self, record: logging.LogRecord) -> str:
        level, colon, text = super().format(record).partition(":")
        return level.lower() + colon + text
