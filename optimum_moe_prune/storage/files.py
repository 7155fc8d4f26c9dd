# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside the target and renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RequestError, RunError
from .targets import check_parent


def check_file(path: str | os.PathLike, suffix: str, overwrite: bool, read: Callable[[Path], object]) -> Path:
    """A file to write as a path, if it may be written.

    Args:
        path: The file.
        suffix: How its name must end.
        overwrite: Whether an earlier output there may be replaced.
        read: Reads such an output, and raises where it is something else: nothing else is replaced.

    Raises:
        RequestError: If it is in the way.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise RequestError(f"the output's file must end in {suffix}, and is {path}.")
    if path.exists():
        if not overwrite:
            raise RequestError(f"{path} exists; name another file, or allow replacing it (overwrite=True).")
        read(path)
    check_parent(path)
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """As :func:`write_bytes`, of text in UTF-8."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, values: Any, indent: int = 1) -> Path:
    """As :func:`write_bytes`, of plain values as JSON."""
    return write_text(path, json.dumps(values, indent=indent) + "\n")


def write_bytes(path: str | os.PathLike, content: bytes) -> Path:
    """Write a file beside its target and rename it into place.

    Raises:
        RunError: If it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.writing")  # not the name of a folder for unfinished work
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
    return path


def sync(path: str | os.PathLike) -> None:
    """Return when a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
