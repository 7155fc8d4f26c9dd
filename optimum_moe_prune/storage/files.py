# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or absent: written beside the target and renamed into place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RequestError
from .atomic import replace_file, sync
from .outputs import announce
from .paths import check_name, check_parent, check_spelling, real_path

__all__ = ["check_file", "check_own", "sync", "write_bytes", "write_json", "write_text"]


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
    path = check_spelling(path)
    if path.suffix != suffix:
        raise RequestError(f"the output's file must end in {suffix}, and is {path}.")
    if real_path(path).exists() and not overwrite:
        raise RequestError(f"{path} exists; name another file, or allow replacing it (overwrite=True).")
    check_own(path, read)
    check_parent(path)
    return path


def check_own(path: str | os.PathLike, read: Callable[[Path], object]) -> Path:
    """The path of a file to write, if there is none, or one of the same kind.

    Args:
        path: The file.
        read: Reads such a file, and raises where it is something else.

    Raises:
        RequestError: If it is something else: that is not replaced.
    """
    path = check_name(path)
    there = real_path(path)  # what is replaced: absent/../model.gguf is model.gguf, although nothing opens it so
    if not there.exists():  # also a link to nothing: what it leads to is written
        return path
    if not there.is_file():
        raise RequestError(f"{path} is no file and is not replaced; name another file.")
    try:
        read(path if path.exists() and path.samefile(there) else there)  # messages name it as it was given
    except (OSError, ValueError) as error:
        if "is not replaced" in str(error):
            raise
        raise RequestError(
            f"{path} is not what is to be written there and is not replaced: {str(error).rstrip('.')}. Name another "
            "file."
        ) from error
    return path


def write_text(path: str | os.PathLike, text: str) -> Path:
    """As :func:`write_bytes`, of text in UTF-8."""
    return write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, values: Any, indent: int = 1) -> Path:
    """As :func:`write_bytes`, of plain values as JSON."""
    return write_text(path, json.dumps(values, indent=indent) + "\n")


def write_bytes(path: str | os.PathLike, content: bytes) -> Path:
    """Write a file beside its target and rename it into place; what is added to a finished output is listed there.

    Raises:
        RequestError: If the path names nothing.
        RunError: If it cannot be written.
    """
    path = check_name(path)
    announce(path, content)
    return replace_file(path, content)
