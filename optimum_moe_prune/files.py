# SPDX-License-Identifier: Apache-2.0
"""Outputs that are whole or absent: written beside the target and renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import RequestError


def check_target(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """The target as a path, if it may be written.

    Raises:
        RequestError: If it exists and is not an empty folder, unless ``overwrite`` allows replacing a folder.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; name a folder that is absent or empty.")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise RequestError(
            f"{folder} exists and is not empty; name another folder, or allow replacing it (--overwrite)."
        )
    return folder


@contextlib.contextmanager
def written_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside the target, renamed to it when the block ends without an error.

    Yields:
        The sibling ``.<name>.partial`` to write into. After an error it is removed and the target is as it was.

    Raises:
        RequestError: If the target is in the way (:func:`check_target`).
    """
    target = check_target(folder, overwrite).absolute()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                _sync(path)
        _sync(partial)
        if target.exists():
            replaced = target.with_name(f".{target.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
            partial.rename(target)
            shutil.rmtree(replaced)
        else:
            partial.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a file beside its target and rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RequestError: If the file is missing, is not JSON, or holds something else than an object.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError as error:
        raise RequestError(f"{path} does not exist.") from error
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RequestError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{path} must hold a JSON object, and holds a {type(value).__name__}.")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
