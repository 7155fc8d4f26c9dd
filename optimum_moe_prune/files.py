# SPDX-License-Identifier: Apache-2.0
"""Outputs that are whole or absent: written beside the target and renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import RequestError

MARKERS = ("moe_pruning_plan.json", "stats.json")
"""Files that show a folder to be an output of this package; only such a folder is ever replaced."""


def check_target(
    folder: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike | None] = ()
) -> Path:
    """The target as a path, if it may be written.

    Args:
        folder: The target.
        overwrite: Whether an earlier output there may be replaced.
        sources: What is read to make the output, and must outlive it.

    Raises:
        RequestError: If it exists and is not an empty folder, unless ``overwrite`` allows replacing an earlier output;
            or if it is a source, or holds one.
    """
    folder = Path(folder)
    target = Path(os.path.abspath(folder))
    for source in sources:
        if source is not None and os.path.exists(source) and Path(source).resolve().is_relative_to(target.resolve()):
            raise RequestError(f"{folder} is or holds {source}, which is read; name another folder.")
    if target.exists() and not target.is_dir():
        raise RequestError(f"{folder} is a file; name a folder that is absent or empty.")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise RequestError(
                f"{folder} exists and is not empty; name another folder, or allow replacing it (--overwrite)."
            )
        if not any((target / marker).is_file() for marker in MARKERS):
            raise RequestError(
                f"{folder} holds something else than an output of this package and is not replaced; name another "
                "folder."
            )
    return target


@contextlib.contextmanager
def written_folder(
    folder: str | os.PathLike, overwrite: bool = False, sources: Iterable[str | os.PathLike | None] = ()
) -> Iterator[Path]:
    """A new folder beside the target, renamed to it when the block ends without an error.

    Args:
        folder: The target.
        overwrite: As in :func:`check_target`.
        sources: As in :func:`check_target`.

    Yields:
        The sibling ``.<name>.partial`` to write into. After an error it is removed and the target is as it was.

    Raises:
        RequestError: If the target is in the way (:func:`check_target`).
    """
    target = check_target(folder, overwrite, sources)
    partial, replaced = (target.with_name(f".{target.name}.{kind}") for kind in ("partial", "replaced"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*")):
            if path.is_file():
                _sync(path)
        _sync(partial)
        earlier = target.exists()
        if earlier:
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        try:
            partial.rename(target)
        except OSError:
            if earlier:
                replaced.rename(target)
            raise
        if earlier:
            shutil.rmtree(replaced)
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


def is_integer(value: Any) -> bool:
    """Whether a value read from JSON is an integer; Python counts truth values among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
