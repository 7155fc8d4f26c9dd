# SPDX-License-Identifier: Apache-2.0
"""What is shown, wherever it leads: to a file, to a pipe that nobody reads, to a terminal that knows ASCII alone."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from io import TextIOWrapper

from ..errors import RequestError, one_line, printable
from ..processes import launched

_BOLD = re.compile("(\x1b\\[[01]m)")


def prepare_streams() -> None:
    """Have characters that a terminal does not know shown by their numbers, not end the process."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def is_spokesman() -> bool:
    """Whether this is the one of several processes that says what all of them know."""
    try:
        return launched().is_main
    except RequestError:  # which is said when the work begins
        return True


def show(text: str) -> None:
    """Print a result, where this is the main process; a reader that has seen enough (``... | head``) is no mistake.

    Plans and statistics come from others: of what terminals obey only bold print is let through.
    """
    text = "".join(part if _BOLD.fullmatch(part) else printable(part) for part in _BOLD.split(text))
    if sys.stdout is None or not is_spokesman():  # closed: `>&-`
        return
    try:
        print(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would be written, and fail, once more when the process ends.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_error(message: str) -> None:
    """Print a mistake in one line on standard error; standard output is for results alone, with ``--json`` too."""
    message = one_line(message)
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
