# SPDX-License-Identifier: Apache-2.0
"""The smallest step of writing: a file that is whole or absent."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from ..errors import RunError


def replace_file(path: str | os.PathLike, content: bytes) -> Path:
    """Write a file beside its target and rename it into place; behind a link, the file that it leads to.

    Raises:
        RunError: If it cannot be written.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.writing")  # not the name of a folder for unfinished work
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        sync(partial)
        os.replace(partial, target)
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
