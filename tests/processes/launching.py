# SPDX-License-Identifier: Apache-2.0
"""Processes as a launcher starts them: children of the test's, which have everything imported already."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """A process that ended: its exit code, negative for a signal, and what it printed."""

    code: int
    out: str
    err: str


def environment(rank: int, count: int, port: int = 29500) -> dict[str, str]:
    """What ``torchrun`` says."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return dict(zip(names, (str(rank), str(rank), str(count), str(count), "127.0.0.1", str(port)), strict=True))


def launch(count: int, folder: Path, work: Callable[..., Any], *args: Any) -> list[Ended]:
    """Start processes, each of which does ``work(rank, *args)``, and wait until all have ended.

    Args:
        count: How many.
        folder: For what they print.
        work: What each does; a number it returns, or leaves with, is the exit code.
        args: Further arguments.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_run, args=(rank, count, port, folder, work, args), daemon=True)
        for rank in range(count)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking; nothing calculates here meanwhile
        for process in started:
            process.start()
    for process in started:
        process.join(_SECONDS)
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    printed = [[(folder / f"{name}-{rank}").read_text() for name in ("out", "err")] for rank in range(count)]
    return [Ended(p.exitcode or 0, out, err) for p, (out, err) in zip(started, printed, strict=True)]


def _run(rank: int, count: int, port: int, folder: Path, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    sys.stdout, sys.stderr = (open(folder / f"{name}-{rank}", "w", buffering=1) for name in ("out", "err"))
    logging.getLogger().handlers.clear()  # of pytest
    os.environ.update(environment(rank, count, port))
    try:
        code = work(rank, *args)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code or 0)
