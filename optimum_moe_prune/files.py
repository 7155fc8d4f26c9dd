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

from .errors import RequestError, RunError

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

    An earlier output that an interrupted run had moved aside is put back first.

    Raises:
        RequestError: If it exists and is not an empty folder, unless ``overwrite`` allows replacing an earlier output;
            if it is a source, or holds one; or if it may not be written.
        RunError: If that earlier output cannot be put back.
    """
    folder = Path(folder)
    target = Path(os.path.abspath(folder))
    if not target.exists() and (moved := _replaced(target)).is_dir():
        try:
            moved.rename(target)
        except OSError as error:
            raise RunError(f"{moved}, the earlier output, cannot be put back: {error}.") from error
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
    above = next(parent for parent in target.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise RequestError(f"{folder} cannot be written: {above} is not a folder that may be written to.")
    return target


def partial_folder(folder: str | os.PathLike) -> Path:
    """The sibling of a target that holds unfinished work."""
    target = Path(os.path.abspath(folder))
    return target.with_name(f".{target.name}.partial")


def check_space(folder: str | os.PathLike, nbytes: int) -> None:
    """Raise unless the disk of a folder, which may not exist yet, has room.

    Raises:
        RequestError: With what is needed and what is free.
    """
    target = Path(os.path.abspath(folder))
    above = next(path for path in (target, *target.parents) if path.exists())
    free = shutil.disk_usage(above).free
    if nbytes > free:
        raise RequestError(
            f"writing {folder} takes {nbytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there; make room, or "
            "name a folder on another disk."
        )


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
        The folder to write into, inside the sibling ``.<name>.partial``. After an error it is removed and the target
        is as it was; what else the sibling holds stays. In the end the sibling is removed.

    Raises:
        RequestError: If the target is in the way (:func:`check_target`).
        RunError: If something cannot be written.
    """
    target = check_target(folder, overwrite, sources)
    partial, replaced = partial_folder(target), _replaced(target)
    output = partial / "output"
    try:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        yield output
        for path in sorted(output.rglob("*"), reverse=True):
            sync(path)
        sync(output)
        earlier = target.exists()
        if earlier:
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        try:
            output.rename(target)
        except OSError:
            if earlier:
                replaced.rename(target)
            raise
        with contextlib.suppress(OSError):  # not every file system can; the output is whole in any case
            sync(target.parent)
    except OSError as error:
        raise RunError(f"writing {folder} failed: {error}. Nothing was left there.") from error
    finally:
        shutil.rmtree(output, ignore_errors=True)
        with contextlib.suppress(OSError):
            partial.rmdir()  # unless it holds something else
    shutil.rmtree(replaced, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _replaced(target: Path) -> Path:
    """Where an earlier output waits while it is replaced."""
    return target.with_name(f".{target.name}.replaced")


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a file beside its target and rename it into place.

    Raises:
        RunError: If it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}.") from error
    finally:
        with contextlib.suppress(OSError):
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


def sync(path: str | os.PathLike) -> None:
    """Return when a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
